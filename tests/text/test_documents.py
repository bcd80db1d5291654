"""Documents of local files against plain loops: json.loads, a regular expression, pyarrow's
to_pylist."""

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.text.documents import Position, SourceError, local_source, plan_units, read_unit
from pretrain.text.readers import blocks, jsonl, parquet, txt
from pretrain.tokens.estimate import estimate

ROOT = Path(__file__).parents[2]
ENDLESS = 1 << 40
quick = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rows_of(source, *, unit_bytes=ENDLESS, resume=None, **options):
    """[(file, row in the file, offset or None, text)] of all documents, as a packer counts rows."""
    found, next_row = [], {}
    for i, unit in enumerate(plan_units(source, unit_bytes=unit_bytes, resume=resume)):
        first = next_row.get(unit.file, 0) if unit.first_row is None else unit.first_row
        skip = resume.row - first if resume and i == 0 and unit.file == resume.file else 0
        row = skip
        for batch in read_unit(source, unit, skip_rows=skip, **options):
            batch.texts.validate(full=True)
            offsets = [None] * len(batch.texts) if batch.offsets is None else batch.offsets.tolist()
            for r, offset, text in zip(
                batch.rows.tolist(), offsets, batch.texts.to_pylist(), strict=True
            ):
                found.append((unit.file, first + r, offset, text))
            row += batch.num_rows
        next_row[unit.file] = first + row
    return found


def texts_of(source, **options):
    return [text for *_, text in rows_of(source, **options)]


def skipped_by(source, **options):
    """{"empty": rows, "bad": rows}, counted from each unit's first row."""
    skipped = {"empty": [], "bad": []}
    for unit in plan_units(source, unit_bytes=ENDLESS):
        for batch in read_unit(source, unit, **options):
            for reason, rows in batch.skipped.items():
                skipped[reason] += rows.tolist()
    return skipped


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_parquet(path, texts, *, type=None, row_group_size=3, **columns):
    texts = texts if isinstance(texts, pa.Array) else pa.array(texts, type)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Files are read a few bytes at a time, so that every boundary falls everywhere."""
    monkeypatch.setattr(blocks, "BLOCK", 5)
    monkeypatch.setattr(blocks, "OVERRUN", 2)
    monkeypatch.setattr(txt, "BATCH_BYTES", 20)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 20)


# ---- text files

PIECES = [
    "<|endoftext|>",
    "\n",
    "\r\n",
    "\r",
    "a",
    "é",
    " ",
    "\ufeff",
    "x<|endoftext|>\n",
    "\n<|endoftext|>\n",
]
txt_files = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def parts_of_txt(text):
    """The documented rule as a regular expression: [(byte offset, text)] of all parts."""
    body = text.removeprefix("\ufeff")
    parts, begin = [], 0
    for match in re.finditer(r"(?:(?<=\n)|\A)<\|endoftext\|>(?:\r?\n|\r?\Z)", body):
        parts.append((begin, body[begin : match.start()]))
        begin = match.end()
    if begin < len(body):
        parts.append((begin, body[begin:]))
    bom = len(text) - len(body)
    return [(len(text[: at + bom].encode()) if at else 0, part) for at, part in parts]


@given(txt_files, st.integers(1, 40))
@quick
def test_text_documents_do_not_depend_on_where_units_and_reads_end(
    tmp_path, tiny_blocks, text, unit_bytes
):
    source = local_source([write(tmp_path / "a.txt", text)])
    expected = [
        (0, row, offset, part)
        for row, (offset, part) in enumerate(parts_of_txt(text))
        if part.strip(" \t\r\n\v\f")
    ]
    assert rows_of(source, unit_bytes=unit_bytes) == expected


@given(txt_files, st.integers(1, 40), st.data())
@quick
def test_text_documents_resume_at_any_of_them(tmp_path, tiny_blocks, text, unit_bytes, data):
    source = local_source(
        [write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", text + "\nlast")]
    )
    rows = rows_of(source)
    at = data.draw(st.integers(0, len(rows) - 1))
    file, row, offset, _ = rows[at]
    resumed = rows_of(source, unit_bytes=unit_bytes, resume=Position(file, row, offset=offset))
    assert resumed == rows[at:]


def test_a_text_without_separators_is_one_document_to_the_last_byte(tmp_path):
    text = "one\r\n\n<|endoftext|> in a line\n two <|endoftext|>\n"
    assert texts_of(local_source([write(tmp_path / "a.txt", text)]), unit_bytes=7) == [text]


def test_a_large_text_file_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(txt, "BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 20)
    document = "word " * 400 + "\n<|endoftext|>\n"
    source = local_source([write(tmp_path / "a.txt", document * 15_000)])  # 30 MB
    (unit,) = plan_units(source, unit_bytes=ENDLESS)
    tracemalloc.start()
    count = sum(len(batch.texts) for batch in read_unit(source, unit))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 15_000
    assert peak < 8 << 20


# ---- JSON lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "\ud800", "\udc00x", "\u2028", "\0", "😀", '"}{"text":"x"}']
)


@st.composite
def json_lines(draw, value=TEXTS):
    """Lines of JSON that can be right, wrong, odd and empty, as bytes."""
    lines = []
    for _ in range(draw(st.integers(0, 6))):
        line = json.dumps(
            {"id": draw(VALUES), "text": draw(value), "meta": draw(VALUES)},
            ensure_ascii=draw(st.booleans()),
        )
        lines.append(line.encode("utf-8", "surrogatepass"))
    odd = [
        b"",
        b"  \t",
        b'{"text": null}',
        b'{"text":"a","text":"b"}',
        b'{"text":"\\ud83d\\ude00\\/"}',
    ]
    for _ in range(draw(st.integers(0, 2))):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(odd)))
    feed = draw(st.sampled_from([b"\n", b"\r\n"]))
    return (
        draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
        + feed.join(lines)
        + draw(st.sampled_from([b"", feed]))
    )


def loads_every_line(data):
    """The plain loop: [(row, offset, text)], with ("empty",), ("bad",), ("blank",) for no
    document."""
    found, offset = [], 0
    for row, line in enumerate(data.split(b"\n")):
        at, offset = offset, offset + len(line) + 1
        line = line.removeprefix(b"\xef\xbb\xbf") if row == 0 else line
        if not line.strip():
            text = ("blank",)
        else:
            try:
                text = json.loads(line.decode())["text"]
                text = ("bad",) if not isinstance(text, str | None) else text or ("empty",)
                assert isinstance(text, tuple) or text.encode() is not None
            except (ValueError, KeyError, TypeError):
                text = ("bad",)
        found.append((row, at, text))
    return found


@given(json_lines(), st.integers(1, 60))
@quick
def test_json_lines_are_what_json_loads_gives(tmp_path, tiny_blocks, data, unit_bytes):
    source = local_source([write(tmp_path / "a.jsonl", data)])
    expected = [
        (0, row, at, text) for row, at, text in loads_every_line(data) if isinstance(text, str)
    ]
    assert rows_of(source, unit_bytes=unit_bytes, on_bad_document="skip") == expected
    skipped = skipped_by(source, on_bad_document="skip")
    for reason in ("empty", "bad"):
        assert skipped[reason] == [
            row for row, _, text in loads_every_line(data) if text == (reason,)
        ]


@given(json_lines(value=st.text(min_size=1, max_size=8)), st.integers(1, 60), st.data())
@quick
def test_json_lines_resume_at_any_of_them(tmp_path, tiny_blocks, data, unit_bytes, draw):
    source = local_source(
        [write(tmp_path / "a.jsonl", data), write(tmp_path / "b.jsonl", b'{"text":"last"}')]
    )
    rows = rows_of(source, on_bad_document="skip")
    at = draw.draw(st.integers(0, len(rows) - 1))
    file, row, offset, _ = rows[at]
    resume = Position(file, row, offset=offset)
    assert (
        rows_of(source, unit_bytes=unit_bytes, resume=resume, on_bad_document="skip") == rows[at:]
    )


FRAGMENTS = [
    b'{"text":"',
    b'{"text": ',
    b'"}',
    b"}",
    b"{",
    b"\n",
    b'"',
    b",",
    b":",
    b"[",
    b"]",
    b"a",
    b"\\",
    b"\xff",
    b"\\u00e9",
    b"\\ud800",
    b"\xc3\xa9",
    b" ",
    b"\r",
    b"\0",
    b"\t",
    b"null",
    b"1",
    b"01",
    b"1e999",
    b"NaN",
    b'"b":',
    b'{"text":"a"}',
    b'"text":"b"',
    b'\n{"text":"c"',
    b"/**/",
    b"'",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join))
@settings(quick, max_examples=1500)
def test_the_fast_json_parser_answers_only_what_json_loads_would(block):
    lines = block.split(b"\n")
    texts = jsonl.parse_lines_fast(block, lines, "text")
    if texts is not None:
        assert texts.to_pylist() == [json.loads(line.decode())["text"] for line in lines]


def test_the_fast_json_parser_is_used_for_ordinary_lines():
    """Otherwise the test above would hold for a parser that never answers."""
    lines = [
        json.dumps({"text": f"déjà {i}\n", "id": [i, "x", None, {}][i % 4]}).encode()
        for i in range(9)
    ]
    texts = jsonl.parse_lines_fast(b"\n".join(lines), lines, "text")
    assert texts.to_pylist() == [f"déjà {i}\n" for i in range(9)]


def test_a_number_with_thousands_of_digits_beside_the_text_is_no_problem(tmp_path):
    line = b'{"n": %s, "text": "a"}\n' % (b"9" * 5000)
    assert texts_of(local_source([write(tmp_path / "a.jsonl", line * 2 + b"\n")])) == ["a", "a"]


# ---- compressed text


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_compressed_files_hold_the_same_documents(tmp_path, tiny_blocks, kind, ending):
    documents = [f"document {i} é" * (i % 5 + 1) for i in range(40)]
    data = (
        "".join(json.dumps({"text": d}) + "\n" for d in documents)
        if kind == "jsonl"
        else "\n<|endoftext|>\n".join(documents)
    ).encode()
    pack = gzip.compress if ending == "gz" else lambda b: pa.compress(b, "zstd", asbytes=True)
    plain = local_source([write(tmp_path / f"a.{kind}", data)])
    half = len(data) // 2  # in two frames, as tools write them that append
    packed = local_source(
        [write(tmp_path / f"a.{kind}.{ending}", pack(data[:half]) + pack(data[half:]))]
    )
    expected = [(file, row, None, text) for file, row, _, text in rows_of(plain)]
    assert rows_of(packed, unit_bytes=1) == expected
    assert rows_of(packed, resume=Position(0, 17)) == expected[17:]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_that_ends_early_is_an_error_and_not_a_short_corpus(tmp_path, ending):
    data = b"".join(b'{"text": "%d"}\n' % i for i in range(1000))
    packed = gzip.compress(data) if ending == "gz" else pa.compress(data, "zstd", asbytes=True)
    for size in (len(packed) // 2, len(packed) - 2, 0):
        source = local_source([write(tmp_path / f"a.jsonl.{ending}", packed[:size])])
        with pytest.raises(
            SourceError, match=rf"a\.jsonl\.{ending}, after row \d+: damaged or cut short"
        ):
            texts_of(source, on_bad_document="skip")


# ---- parquet


@given(
    st.lists(st.none() | st.text(max_size=8), max_size=30),
    st.integers(1, 12),
    st.tuples(st.integers(1, 300), st.integers(0, 29)),
)
@quick
def test_parquet_documents_do_not_depend_on_row_groups_and_units(
    tmp_path, tiny_blocks, texts, group, plan
):
    unit_bytes, at = plan
    first = (
        tmp_path / f"{uuid.uuid4()}.parquet"
    )  # footers are kept, and a file system's clock is coarse
    write_parquet(first, texts, type=pa.string(), row_group_size=group)
    source = local_source([first, write_parquet(tmp_path / "b.parquet", ["last"])])
    expected = [(0, row, None, t) for row, t in enumerate(texts) if t] + [(1, 0, None, "last")]
    assert rows_of(source, unit_bytes=unit_bytes) == expected
    resumed = rows_of(source, unit_bytes=unit_bytes, resume=Position(0, at))
    assert resumed == [row for row in expected if row[0] == 1 or row[1] >= at]
    assert skipped_by(source)["empty"] == [row for row, t in enumerate(texts) if not t]


@pytest.mark.parametrize(
    "type",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_every_text_type_of_arrow_is_read(tmp_path, type):
    texts = ["a", "déjà", None, "", "a", "x" * 50]
    values = pa.array(texts).cast(pa.binary() if "binary" in str(type) else pa.string())
    values = values.dictionary_encode() if "dictionary" in str(type) else values
    try:
        values = values.cast(type)
    except pa.ArrowNotImplementedError:
        pytest.skip("this pyarrow cannot make such an array")
    source = local_source([write_parquet(tmp_path / "a.parquet", values)])
    assert rows_of(source) == [
        (0, 0, None, "a"),
        (0, 1, None, "déjà"),
        (0, 4, None, "a"),
        (0, 5, None, "x" * 50),
    ]


def test_token_counts_come_with_the_documents_they_count(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", ["a", None, "b", "", "c"], token_count=[1, 2, None, 8, 16]
    )
    batches = [
        b
        for u in plan_units(local_source([path]), unit_bytes=1)
        for b in read_unit(local_source([path]), u)
    ]
    counts = np.concatenate([b.token_counts for b in batches])
    assert counts.dtype == np.int64
    assert counts.tolist() == [1, 0, 16]
    without = local_source([write_parquet(tmp_path / "b.parquet", ["a"], token_count=["many"])])
    (batch,) = read_unit(without, next(plan_units(without, unit_bytes=1)))
    assert batch.token_counts is None


def test_a_row_group_larger_than_a_batch_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_BYTES", 10_000)
    texts = [f"{i} " * 100 for i in range(1000)]
    source = local_source([write_parquet(tmp_path / "a.parquet", texts, row_group_size=1000)])
    (unit,) = plan_units(source, unit_bytes=1)
    batches = list(read_unit(source, unit))
    assert [t for b in batches for t in b.texts.to_pylist()] == texts
    assert max(b.texts.nbytes for b in batches) < 40_000
    resumed = [b.texts.to_pylist() for b in read_unit(source, unit, skip_rows=777)]
    assert [t for batch in resumed for t in batch] == texts[777:]


def test_a_plan_reads_no_footer_before_its_turn(tmp_path):
    first = write_parquet(tmp_path / "a.parquet", ["a"])
    second = write_parquet(tmp_path / "b.parquet", ["b", "c"])
    plan = plan_units(local_source([first, second]), unit_bytes=1)
    assert next(plan).file == 0
    second.unlink()
    with pytest.raises(OSError, match=r"b\.parquet"):
        next(plan)


# ---- bad documents and bad files

BAD = {
    "a.jsonl": [
        (b'{"text": "a"}\n\n{"text": "b"', "line 3", "not JSON"),
        (b'\n\n{"text": 5}', "line 3", "'text' is not a string"),
        (
            b'{"text": "a"}\n{"txt": "b", "id": 1}',
            "line 2",
            "no key 'text'; choose --text_column from txt, id",
        ),
        (b'{"text": "\\ud800"}', "line 1", "surrogate"),
        (
            b'{"text": "a"}\n{"text": "\xff"}',
            "line 2",
            "invalid UTF-8 at byte 10 of the line (0xff)",
        ),
        (b'{"text": "a"}\n"text"', "line 2", "not a JSON object"),
        (b'[{"text": "a"},\n', "line 1", "one object a line"),
        (b"[" * 100_000, "line 1", "JSON"),
    ],
    "a.txt": [
        (
            b"good\n<|endoftext|>\nb\n\xe9 caf\xe9\n<|endoftext|>\nc",
            "line 3",
            "invalid UTF-8 at byte 2",
        )
    ],
}


@pytest.mark.parametrize(
    "case",
    [(name, *case) for name, cases in BAD.items() for case in cases],
    ids=lambda case: case[3][:20],
)
@pytest.mark.parametrize("unit_bytes", [3, ENDLESS])
def test_a_bad_document_is_named_or_left_out(tmp_path, case, unit_bytes):
    name, data, place, what = case
    source = local_source([write(tmp_path / name, data)])
    unit_bytes = max(unit_bytes, len(data) // 100)  # a long line needs no more than others
    with pytest.raises(SourceError) as error:
        texts_of(source, unit_bytes=unit_bytes)
    message = str(error.value)
    assert message.startswith(f"{(tmp_path / name).as_posix()}, {place}: ")
    assert what in message
    assert "--on_bad_document skip" in message
    assert "\n" not in message
    good = {"a.jsonl": ["a"] * data.startswith(b'{"text": "a"}'), "a.txt": ["good\n", "c"]}[name]
    assert texts_of(source, unit_bytes=unit_bytes, on_bad_document="skip") == good


@pytest.mark.parametrize("type", [pa.binary(), pa.string(), pa.large_string()], ids=str)
def test_invalid_utf8_in_parquet_is_named_or_left_out(tmp_path, type):
    values = pa.array([b"a", None, b"\xff\xfe", b"", b"\xed\xa0\x80", b"b"], pa.binary())
    values = (
        values.cast(pa.large_binary()).view(type) if "large" in str(type) else values.view(type)
    )
    path = write_parquet(tmp_path / "a.parquet", values, token_count=[1, 2, 4, 8, 16, 32])
    source = local_source([path])
    with pytest.raises(SourceError, match=r"a\.parquet, row 2: invalid UTF-8 at byte 0"):
        texts_of(source)
    assert rows_of(source, on_bad_document="skip") == [(0, 0, None, "a"), (0, 5, None, "b")]
    assert skipped_by(source, on_bad_document="skip") == {"empty": [1, 3], "bad": [2, 4]}


def test_a_missing_or_wrong_column_is_an_error_for_the_whole_file(tmp_path):
    source = local_source(
        [write_parquet(tmp_path / "a.parquet", ["a"], id=[1])], text_column="content"
    )
    with pytest.raises(
        SourceError, match=r"a\.parquet: no column 'content'; choose --text_column from text, id"
    ):
        texts_of(source)
    with pytest.raises(SourceError, match=r"a\.parquet: column 'id' holds int64, not text"):
        texts_of(dataclasses.replace(source, text_column="id"))


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [f"{i} " * 30 for i in range(100)], row_group_size=10
    )
    whole = path.read_bytes()
    for data in (whole[:-100], whole[: len(whole) // 2], b""):
        with pytest.raises(SourceError, match=r"a\.parquet: not a whole parquet file"):
            texts_of(local_source([write(tmp_path / "cut" / "a.parquet", data)]))


def test_parquet_files_that_cannot_be_read_are_left_out_and_counted_if_told_so(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    write_parquet(tmp_path / "b.parquet", ["c"], token_count=[1]).rename(tmp_path / "d.parquet")
    write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-9])
    pq.write_table(pa.table({"content": ["x", "y"]}), tmp_path / "c.parquet")
    source = local_source([tmp_path])
    for unit_bytes in (1, ENDLESS):
        options = {"unit_bytes": unit_bytes, "on_bad_document": "skip"}
        assert texts_of(source, **options) == ["a", "b", "c"]
        batches = [
            batch
            for unit in plan_units(source, unit_bytes=unit_bytes)
            for batch in read_unit(source, unit, on_bad_document="skip")
        ]
        assert [len(batch.skipped.get("unreadable file", [])) for batch in batches] == [0, 1, 1, 0]
    with pytest.raises(
        SourceError, match=r"b\.parquet: not a whole .* \(--on_bad_document skip leaves such"
    ):
        texts_of(source)
    with pytest.raises(SourceError, match=r"b\.parquet: not a whole"):
        estimate(source, len)
    found = estimate(source, len, on_bad_document="skip")
    assert found.rows == 3 and found.tokens > 0
    with pytest.raises(SourceError, match=r"c\.parquet: no column"):
        estimate(local_source([tmp_path / "c.parquet"]), len, on_bad_document="skip")


def test_damage_inside_a_parquet_file_is_an_error_in_any_case(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [f"{i} " * 30 for i in range(100)], row_group_size=10
    )
    hole = bytearray(path.read_bytes())
    hole[1000:1400] = bytes(400)
    source = local_source([write(tmp_path / "hole" / "a.parquet", bytes(hole))])
    with pytest.raises(SourceError, match=r"a\.parquet, after row \d+: damaged or cut short"):
        texts_of(source, on_bad_document="skip")


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_file_that_changes_its_size_is_an_error(tmp_path, when):
    path = write(tmp_path / "a.txt", "a\n<|endoftext|>\nb")
    source = local_source([path])
    (unit,) = plan_units(source, unit_bytes=ENDLESS)
    documents = read_unit(source, unit)
    if when == "while it is read":
        next(documents)
    path.write_bytes(b"something else")
    with pytest.raises(
        SourceError, match=r"a\.txt: .*(had 17 when the run began|changed its size)"
    ):
        list(documents)


def test_a_file_that_has_gone_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    source = local_source([path])
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.txt: No such file"):
        texts_of(source)


# ---- which files


def test_folders_and_patterns_are_read_in_order_and_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/10.txt", "b/c/1.JSONL", "a.txt.gz", "d.json"):
        write(Path(name), gzip.compress(b"x") if name.endswith("gz") else b'{"text":"x"}')
    for name in ("b/.hidden/x.txt", "b/_tmp/x.txt", "b/notes.md", "b/m.json"):  # left out
        write(Path(name), b"x")
    paths = [
        f.path for f in local_source(["d.json", "b/2.txt", "b", "*.gz", "./b/../b/*.txt"]).files
    ]
    assert paths == ["d.json", "b/2.txt", "b/10.txt", "b/c/1.JSONL", "a.txt.gz"]
    kinds = [
        (f.kind, f.compression, f.size) for f in local_source(["b/c/1.JSONL", "a.txt.gz"]).files
    ]
    assert kinds == [("jsonl", None, 12), ("txt", "gzip", os.path.getsize("a.txt.gz"))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing.txt", "nothing.txt: no such file or folder"),
        ("*.parquet", "no file matches it"),
        ("notes.md", "notes.md: cannot be read; a source is .parquet, .jsonl or .txt"),
        ("empty", "empty: no file in it can be read"),
    ],
)
def test_a_source_that_names_nothing_readable_is_refused(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    write(Path("notes.md"), "x")
    Path("empty").mkdir()
    with pytest.raises(SourceError, match=re.escape(message)):
        local_source([given])


def test_a_source_is_named_after_what_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("my corpus/part.1.txt"), "x")
    names = {
        p: local_source([p]).name for p in ("my corpus/part.1.txt", "my corpus", "my corpus/*.txt")
    }
    assert names == {
        "my corpus/part.1.txt": "part",
        "my corpus": "my-corpus",
        "my corpus/*.txt": "my-corpus",
    }


def test_the_description_tells_another_content_from_the_same(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 300_000)
    first = local_source([path]).description
    assert json.loads(json.dumps(first)) == first == local_source([path]).description
    write(path, "x" * 299_999 + "y")
    assert local_source([path]).description != first


# ---- around it


def test_a_position_goes_through_json():
    position = Position(3, 1_000_000, token=17, offset=123)
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_an_estimate_knows_rows_and_scales_tokens(tmp_path):
    texts = [f"{i:06d} {os.urandom(500).hex()}" for i in range(4000)]  # 1007 bytes each
    source = local_source([write_parquet(tmp_path / "a.parquet", texts, row_group_size=100)])
    found = estimate(source, lambda texts: sum(map(len, texts.to_pylist())) // 4)
    assert (found.rows, found.rows_exact) == (4000, True)
    assert found.text_bytes < source.files[0].size
    assert found.tokens == pytest.approx(sum(map(len, texts)) / 4, rel=0.02)
    data = "".join(json.dumps({"text": t, "id": 7}) + "\n" for t in texts).encode()
    for name, content in (("a.jsonl", data), ("b.jsonl.gz", gzip.compress(data))):
        source = local_source([write(tmp_path / name, content)])
        found = estimate(source, lambda texts: sum(map(len, texts.to_pylist())) // 4)
        assert found.rows is None
        assert found.tokens == pytest.approx(sum(map(len, texts)) / 4, rel=0.05)


def test_importing_documents_is_light():
    code = (
        "import sys, pretrain.text.documents, pretrain.text.hub, pretrain.text.remote\n"
        "print({'numpy', 'pyarrow', 'datasets', 'requests', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
