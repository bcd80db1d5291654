"""A source that is edited is noticed: between two runs, and while it is read."""

import json
import os
import shutil

import pytest

from pretrain.text import documents
from pretrain.text.documents import (
    SourceError,
    changed_files,
    local_source,
    plan_units,
    read_unit,
)

SIZE = 400_000


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of text\n" * (SIZE // 15))
    os.utime(path, ns=(10**18, 10**18))
    return path


def recorded(path):
    """What a manifest has of the source."""
    return json.loads(json.dumps(local_source([path]).description["files"]))


def edit(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"X")


@pytest.mark.parametrize("at", [70_000, 200_000, 300_001])
def test_an_edit_in_the_middle_is_noticed(corpus, at):
    before = recorded(corpus)
    edit(corpus, at)
    assert changed_files(before, local_source([corpus])) == [f"{corpus} changed in its middle"]


def test_an_edit_in_the_middle_is_noticed_where_the_time_is_set_back(corpus, tmp_path):
    before = recorded(corpus)
    copy = tmp_path / "copy.txt"
    shutil.copy2(corpus, copy)  # as rsync -a and tar leave it
    edit(copy, 200_000)
    os.utime(copy, ns=(10**18, 10**18))
    os.replace(copy, corpus)
    assert changed_files(before, local_source([corpus])) == [f"{corpus} changed in its middle"]


@pytest.mark.parametrize("at", [0, 60_000, 399_980])
def test_an_edit_at_the_edges_is_noticed_even_where_the_time_is_set_back(corpus, at):
    before = recorded(corpus)
    edit(corpus, at)
    os.utime(corpus, ns=(10**18, 10**18))
    assert changed_files(before, local_source([corpus])) == [f"{corpus} changed"]


def test_a_touched_or_copied_file_is_the_same(corpus, tmp_path):
    before = recorded(corpus)
    os.utime(corpus)
    assert changed_files(before, local_source([corpus])) == []
    copy = tmp_path / "elsewhere" / "a.txt"
    copy.parent.mkdir()
    shutil.copy(corpus, copy)
    assert changed_files(before, local_source([copy])) == []


def test_records_of_before_there_were_times_are_compared_by_size_and_edges(corpus):
    before = [
        {key: entry[key] for key in ("path", "size", "edges_sha256")} for entry in recorded(corpus)
    ]
    os.utime(corpus)
    assert changed_files(before, local_source([corpus])) == []
    edit(corpus, 3)
    assert changed_files(before, local_source([corpus])) == [f"{corpus} changed"]


def test_a_source_too_large_to_be_hashed_goes_by_its_times(corpus, monkeypatch):
    monkeypatch.setattr(documents, "HASHED_BYTES", 1000)
    before = recorded(corpus)
    assert "sha256" not in before[0]
    assert changed_files(before, local_source([corpus])) == []
    os.utime(corpus, ns=(10**18, 10**18 + 5))
    (problem,) = changed_files(before, local_source([corpus]))
    assert "too large for its content to be compared" in problem
    os.utime(corpus, ns=(10**18, 10**18))  # as the message says
    assert changed_files(before, local_source([corpus])) == []


def test_another_number_of_files_is_told(corpus, tmp_path):
    before = recorded(corpus)
    (tmp_path / "b.txt").write_text("b")
    assert changed_files(before, local_source([tmp_path])) == ["1 files then, 2 now"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
def test_an_edit_while_a_file_is_read_ends_the_run(tmp_path, kind):
    import gzip

    data = b'{"text": "a"}\n' * 50
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    source = local_source([path])
    (unit,) = plan_units(source, unit_bytes=1 << 30)
    batches = read_unit(source, unit)
    next(batches)
    status = path.stat()
    edit(path, path.stat().st_size - 1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(SourceError, match="was written to while it was read; start again"):
        list(batches)
    with pytest.raises(SourceError, match="was written to since the run began"):
        list(read_unit(source, unit))
