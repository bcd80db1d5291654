"""Which files folders and patterns stand for: links once each, and nothing left out in silence."""

import glob
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.text import folders
from pretrain.text.documents import SourceError, local_source, plan_units, read_unit

ROOT = Path(__file__).parents[2]


def tree(top, *names):
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return top


def names_of(source, top):
    return [os.path.relpath(file.path, top) for file in source.files]


def documents(source):
    """(texts, number of files left out as a whole)."""
    batches = [
        batch
        for unit in plan_units(source, unit_bytes=1 << 20)
        for batch in read_unit(source, unit, on_bad_document="skip")
    ]
    left_out = sum(len(batch.skipped.get("unreadable file", [])) for batch in batches)
    return [text for batch in batches for text in batch.texts.to_pylist()], left_out


@pytest.fixture
def no_access(monkeypatch):
    """Call with a folder to make it one that may not be listed, for root too."""
    scandir, refused = os.scandir, []

    def scan(path):
        if os.fspath(path) in refused:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    return lambda path: refused.append(os.fspath(path))


def test_folders_behind_links_are_read_once_each(tmp_path):
    elsewhere = tree(tmp_path / "elsewhere", "e.txt", "deep/f.txt")
    top = tree(tmp_path / "top", "a.txt", "b/c.txt", "z/y.txt")
    (top / "link").symlink_to(elsewhere)
    (top / "again").symlink_to(elsewhere / "deep")
    (top / "b" / "alias").symlink_to(top / "z")  # within the folder: its own name is kept
    (top / "copy.txt").symlink_to(top / "a.txt")
    found = names_of(local_source([top]), top)
    assert found == ["a.txt", "again/f.txt", "b/c.txt", "link/e.txt", "z/y.txt"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/**/*.txt", "**/b/**/*.txt", "**"])
def test_loops_of_links_end(tmp_path, pattern):
    top = tree(tmp_path / "top", "a.txt", "b/c.txt", "b/d/e.txt")
    for number in range(3):
        (top / f"loop{number}").symlink_to(top)
        (top / "b" / f"up{number}").symlink_to("..")
    (top / "self").symlink_to("self")
    code = (
        "import sys; from pretrain.text.documents import local_source\n"
        "source = local_source([sys.argv[1]], on_bad_document='skip')\n"
        "print(*sorted({f.path.rpartition('/')[2] for f in source.files if not f.problem}))"
    )
    command = [sys.executable, "-c", code, str(top / pattern)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    names = {"**/b/**/*.txt": "c.txt e.txt"}.get(pattern, "a.txt c.txt e.txt")
    assert set(names.split()) <= set(done.stdout.split())


@pytest.mark.parametrize(
    "pattern",
    ["*.txt", "**/*.txt", "b/*", "?/*.txt", "[ab]*/*.txt", "**/d/*.txt", ".h/*.txt", "*/.x.txt"],
)
def test_patterns_match_what_glob_matches_where_there_are_no_links(tmp_path, monkeypatch, pattern):
    tree(
        tmp_path, "a.txt", "b/c.txt", "b/d/e.txt", "b/.x.txt", ".h/f.txt", "b/.h/d/g.txt", "b/n.md"
    )
    monkeypatch.chdir(tmp_path)
    expected = sorted(path for path in glob.glob(pattern, recursive=True) if path.endswith(".txt"))
    assert [found.path.as_posix() for found in folders.find(pattern)] == expected


@pytest.mark.parametrize("place", ["folder", "pattern"])
def test_a_subfolder_that_may_not_be_listed_is_named_or_counted(tmp_path, no_access, place):
    top = tree(tmp_path / "top", "a.txt", "locked/b.txt", "z.txt")
    no_access(top / "locked")
    given = top if place == "folder" else top / "**" / "*.txt"
    with pytest.raises(SourceError, match=r"top/locked: Permission denied \(--on_bad_document"):
        local_source([given])
    source = local_source([given], on_bad_document="skip")
    assert documents(source) == (["a.txt", "z.txt"], 1)
    assert [entry["size"] for entry in source.description["files"]] == [5, 0, 5]


def test_a_subfolder_whose_files_may_not_be_looked_at_is_not_left_out_in_silence(
    tmp_path, monkeypatch
):
    top = tree(tmp_path / "top", "a.txt", "blind/b.txt")
    look = os.stat

    def refuse(path, *args, **options):
        if os.fspath(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(SourceError, match=r"blind/b\.txt: Permission denied"):
        local_source([top])
    source = local_source([top], on_bad_document="skip")
    assert [bool(file.problem) for file in source.files] == [False, True]


@pytest.mark.parametrize("name", ["gone.txt", "gone", "part.jsonl.gz"])
def test_a_link_to_nothing_is_named_or_counted(tmp_path, name):
    top = tree(tmp_path / "top", "a.txt")
    (top / name).symlink_to(tmp_path / "not there")
    with pytest.raises(SourceError, match=rf"{name}: a link to .*not there, which does not exist"):
        local_source([top])
    assert documents(local_source([top], on_bad_document="skip")) == (["a.txt"], 1)
    with pytest.raises(SourceError, match="a link to"):
        local_source([top / name])


def test_links_that_are_no_documents_do_not_matter(tmp_path):
    top = tree(tmp_path / "top", "a.txt")
    for name in ("notes.md", ".#lock.txt", "_build", ".hidden"):
        (top / name).symlink_to(tmp_path / "not there")
    assert names_of(local_source([top]), top) == ["a.txt"]


@pytest.mark.parametrize("where", ["named", "in a folder", "behind a link", "by a pattern"])
def test_a_pipe_is_refused_at_once(tmp_path, where):
    top = tree(tmp_path / "top", "a.txt")
    os.mkfifo(top / "pipe.txt")
    (top / "b").mkdir()
    (top / "b" / "link.txt").symlink_to(top / "pipe.txt")
    given = {"named": "pipe.txt", "in a folder": "", "behind a link": "b/link.txt"}
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        local_source([top / given.get(where, "*.txt")])
    assert stat.S_ISFIFO(os.stat(top / "pipe.txt").st_mode)


def test_a_name_that_is_not_utf8_is_refused_or_left_out_and_told(tmp_path):
    top = tree(tmp_path / "top", "a.txt")
    (top / "b\udcff.txt").write_text("b")
    with pytest.raises(SourceError, match=r"b.*\.txt: its name is not UTF-8.*rename it"):
        local_source([top])
    source = local_source([top], on_bad_document="skip")
    assert [file.problem is None for file in source.files] == [True, False]


def test_a_device_is_refused():
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        local_source(["/dev/zero"])


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = local_source([path])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="no longer a file"):
        documents(source)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data[v2].txt", ["data[v2].txt"]),
        ("data[v2]", ["data[v2]/x[1].txt", "data[v2]/y.txt"]),
        ("data[v2]/*.txt", ["data[v2]/x[1].txt", "data[v2]/y.txt"]),
        ("data[v2]/x[1].txt", ["data[v2]/x[1].txt"]),
        ("data[v2]/**/[x]*.txt", ["data[v2]/x[1].txt"]),
        ("data[0-9].txt", ["data1.txt"]),
    ],
)
def test_what_exists_by_a_name_is_not_taken_for_a_pattern(tmp_path, monkeypatch, given, expected):
    tree(tmp_path, "data[v2].txt", "data[v2]/x[1].txt", "data[v2]/y.txt", "datav.txt", "data1.txt")
    monkeypatch.chdir(tmp_path)
    source = local_source([given])
    assert [file.path for file in source.files] == expected
    assert documents(source) == (expected, 0)


def test_a_source_with_brackets_in_its_name_is_called_by_it(tmp_path, monkeypatch):
    tree(tmp_path, "data[v2].txt", "more[v3]/x.txt")
    monkeypatch.chdir(tmp_path)
    assert [
        local_source([name]).name for name in ("data[v2].txt", "more[v3]", "more[v3]/*.txt")
    ] == [
        "data-v2",
        "more-v3",
        "more-v3",
    ]


def test_where_nothing_can_be_read_there_is_no_source(tmp_path, no_access):
    top = tree(tmp_path / "top", "locked/b.txt")
    no_access(top / "locked")
    with pytest.raises(SourceError, match="Permission denied, and nothing else is there"):
        local_source([top], on_bad_document="skip")
