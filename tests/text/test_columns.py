"""Sources whose text is in columns of their own, PATH#COLUMN, and files named more than once."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
from pretrain.text.columns import split
from pretrain.text.documents import SourceError, local_source, plan_units, read_unit
from pretrain.tokens.owntext import prepare
from pretrain.tokens.shards import Manifest

TEXTS = {
    "web.parquet": ["The mill stands.", "It turns."],
    "news.jsonl": ["Rain in the north.", "Sun."],
    "notes#2.jsonl": ["A name with a mark."],
    "plain.txt": ["No key at all."],
}
COLUMNS = {"web.parquet": "text", "news.jsonl": "body", "notes#2.jsonl": "content"}
ALL = ["web.parquet", "news.jsonl#body", "notes#2.jsonl#content", "plain.txt"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the files of TEXTS in it, each with its own key."""
    for name, texts in TEXTS.items():
        if name.endswith(".parquet"):
            pq.write_table(pa.table({COLUMNS[name]: texts}), tmp_path / name)
        elif name.endswith(".jsonl"):
            lines = [json.dumps({COLUMNS[name]: text}) + "\n" for text in texts]
            (tmp_path / name).write_text("".join(lines))
        else:
            (tmp_path / name).write_text("".join(texts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(paths, **options):
    source = local_source(paths, **options)
    units = plan_units(source, unit_bytes=1000)
    return [text for unit in units for b in read_unit(source, unit) for text in b.texts.to_pylist()]


def main(*args):
    return fineweb.main(list(map(str, args)))


def test_files_with_different_keys_lose_nothing(folder):
    everything = [text for texts in TEXTS.values() for text in texts]
    assert documents(ALL) == everything
    with pytest.raises(SourceError, match="no key 'text'; choose --text_column from body"):
        documents([path.partition("#")[0] for path in ALL[:2]])
    assert documents(["web.parquet#text", *ALL[1:]], text_column="other") == everything
    source = local_source(ALL)
    recorded = [file.get("text_column") for file in source.description["files"]]
    assert recorded == [None, "body", "content", None] and source.name == "web"
    assert local_source(ALL[1:]).name == "news"


def test_folders_and_patterns_have_columns_too(folder):
    (folder / "sub").mkdir()
    for name in ("a", "b"):
        (folder / "sub" / f"{name}.jsonl").write_text(json.dumps({"body": name}) + "\n")
    (folder / "sub" / "c.txt").write_text("c")
    assert documents(["sub#body"]) == documents(["sub/#body"]) == ["a", "b", "c"]
    assert documents(["s?b/*.jsonl#body"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("notes#2.jsonl", ("notes#2.jsonl", None)),
        ("gone#2.jsonl", ("gone#2.jsonl", None)),
        ("a#b/*.jsonl", ("a#b/*.jsonl", None)),
        ("a#b/c.jsonl#d", ("a#b/c.jsonl", "d")),
        ("*.jsonl#b", ("*.jsonl", "b")),
        ("#b", ("#b", None)),
        ("a#", ("a#", None)),
        ("c#", ("c#", None)),
    ],
)
def test_a_name_with_the_mark_in_it_stays_a_name(folder, given, found):
    (folder / "c#").mkdir()
    assert split(given) == split(Path(given)) == found


def test_a_file_that_is_named_again_is_told_and_read_once(folder):
    source = local_source(["plain.txt", "web.parquet", folder / "plain.txt", "./plain.txt"])
    assert [Path(file.path).name for file in source.files] == ["plain.txt", "web.parquet"]
    assert source.notes == ("plain.txt is given more than once and read once",)
    assert local_source(ALL).notes == ()


def test_a_column_of_a_file_goes_before_that_of_its_folder_and_two_are_refused(folder):
    (folder / "notes#2.jsonl").unlink()
    (folder / "plain.txt").unlink()
    expected = [*TEXTS["news.jsonl"], *TEXTS["web.parquet"]]
    assert documents([".", "news.jsonl#body"]) == expected
    assert documents(["news.jsonl#body", "."]) == expected
    with pytest.raises(SourceError, match=r"news.jsonl: given with the columns 'body' and 'head'"):
        local_source(["news.jsonl#body", "news.jsonl#head"])
    (folder / "plain.txt").write_text("x")
    with pytest.raises(SourceError, match=r"plain.txt: plain text has no columns; leave out #a"):
        local_source(["plain.txt#a"])


def test_a_build_goes_on_and_is_verified_by_the_columns_it_was_made_from(folder, capsys):
    build = ("--source", *ALL, "web.parquet", "--shard_size", 10, "--out_dir", "out")
    assert main(*build) == 0
    assert "note: web.parquet is given more than once" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    shards = Manifest.load(folder / "out").shards
    (folder / "out" / shards[1].file).unlink()
    assert main(*build) == 0  # made again
    assert before == {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    capsys.readouterr()
    assert main("--verify", "--out_dir", "out") == 0
    verified = capsys.readouterr().out
    assert "documents encoded again" in verified and "note:" not in verified
    assert main(*(str(word).replace("#body", "#head") for word in build)) == 1
    assert "news.jsonl is read by head, was read by body" in capsys.readouterr().err


def test_training_on_a_text_takes_the_same_words(folder, capsys):
    prepare(ALL, folder / "run" / "data")
    manifest = Manifest.load(folder / "run" / "data")
    assert manifest.complete and manifest.documents == sum(map(len, TEXTS.values()))
    with pytest.raises(SourceError, match="name another column as PATH#COLUMN"):
        prepare(["news.jsonl"], folder / "other" / "data")
