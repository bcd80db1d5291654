"""What a line of JSON means depends on the line alone: not on its neighbours, nor on where reads,
blocks and units end."""

import gzip
import json
import uuid

import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from pretrain.text.documents import SourceError, local_source, plan_units, read_unit
from pretrain.text.readers import blocks, jsonl


def nested(depth):
    return b'{"text":"deep","x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


ODD = [
    *(
        b'{"text":"%s","score":%s}' % (value, value)
        for value in (
            b"Inf",
            b"-Inf",
            b"+Inf",
            b"inf",
            b"Infinity",
            b"-Infinity",
            b"NaN",
            b"-NaN",
            b"nan",
            b"-nan",
            b"1",
            b"-0",
            b"01",
            b"-01",
            b"1.",
            b".5",
            b"+1",
            b"1e5",
            b"1E+5",
            b"1e",
            b"0x1",
            b"1e999",
            b"-1e-999",
            b"9" * 400,
            b"1_0",
            b"--1",
            b"tru",
            b"True",
            b"None",
            b"nul",
            b"undefined",
            b"Nan",
            b"INF",
            b"Infinit",
            b"-",
            b"/**/1",
            b"1//x",
            b"{}",
            b"[]",
            b"[,]",
            b"[1,]",
            b"{,}",
            b"[Inf]",
            b"[1,-Inf]",
        )
    ),
    b'{"text":"a","text":"b"}',
    b'{"text":"a","text":null}',
    b'{"text":null,"text":"b"}',
    b'{"x":1,"x":2,"text":"c"}',
    b'{"x":{"y":1,"y":2},"text":"c"}',
    b'{"text":5,"text":"b"}',
    b'{"text":"\\ud800"}',
    b'{"text":"\\udc00"}',
    b'{"text":"\\ud83d\\ude00"}',
    b'{"x":"\\ud800","text":"d"}',
    b'{"x":"\\udc00","text":"d"}',
    b'{"\\ud800":1,"text":"d"}',
    b'{"text":"\\ude00\\ud83d"}',
    b'{"text":"\\x41"}',
    b'{"text":"\\u00g0"}',
    b'{"text":"\\u12"}',
    b'{"x":"\\q","text":"e"}',
    b'{"text":"\\/"}',
    b'{"text":"\\u0000"}',
    b'{"text":"\x00"}',
    b'{"text":"\x01"}',
    b'{"text":"\x7f"}',
    b'{"text":"\t"}',
    b'{"x":\x00,"text":"f"}',
    b'{"text":"f"}\x00',
    b'\x00{"text":"f"}',
    b'{"text":"\xff"}',
    b'{"x":"\xff","text":"g"}',
    b'{"x":"\xed\xa0\x80","text":"g"}',
    b'\xef\xbb\xbf{"text":"bom"}',
    b'{"text":"h"}\x0c',
    b'{"text":"h"}\xc2\xa0',
    b' {"text":"h"}',
    b'{"text":"h"} ',
    b'\t{"text":"h"}\r',
    b"",
    b" ",
    b"\r",
    b"\x0c",
    b'{"text":"i"}{"text":"j"}',
    b'{"text":"i"},',
    b'[{"text":"i"}]',
    b'{"text":"i"',
    b'"text":"i"}',
    b"{}",
    b"null",
    b'{"text":null}',
    b'{"text":""}',
    b'{"text":["k"]}',
    b'{"text":{"text":"k"}}',
    b'{"x":{"text":"k"}}',
    b'{"Text":"k"}',
    b'{"tex\\u0074":"l"}',
    b"{'text':'m'}",
    b'{text:"m"}',
    b'{"text":"m",}',
    b'{"text" : "n"}',
    b'{"text":"[[[[{{{{"}',
    b'{"text":"Inf, NaN]"}',
    nested(jsonl.DEEPEST),
    nested(jsonl.DEEPEST + 1),
    nested(3000),
    b'{"text":"' + b"[" * 700 + b'"}',
    b'{"x":"' + b'\\"[' * 700 + b'","text":"o"}',
    b'{"x":' + b"[]," * 0 + b"[" + b",".join([b"[]"] * 700) + b'],"text":"p"}',
]
GOOD = [json.dumps({"text": f"good {i}", "n": i}).encode() for i in range(3)]


def verdicts(path, unit_bytes):
    """[(byte offset or row, text)] of the documents, and what is said of each bad line."""
    source = local_source([path])
    documents, problems = [], {}
    for unit in plan_units(source, unit_bytes=unit_bytes):
        for batch in read_unit(source, unit, on_bad_document="skip"):
            documents += zip(batch.offsets.tolist(), batch.texts.to_pylist(), strict=True)
            for reason, rows in batch.skipped.items():
                problems[reason] = problems.get(reason, 0) + len(rows)
    return documents, {reason: count for reason, count in problems.items() if count}


def alone(line):
    """The verdict of a line that is a file of its own: its text, "empty", "bad" or nothing."""
    try:
        text = jsonl.parse_line(line, "text")
    except ValueError:
        return "bad", None
    return ("blank", None) if text is None else ("text", text) if text else ("empty", None)


lines = st.lists(st.sampled_from(ODD) | st.sampled_from(GOOD), min_size=1, max_size=8)


@fuzz(400)
@given(lines, st.sampled_from([7, 64, 1 << 22]), st.sampled_from([5, 100, 1 << 40]))
def test_fuzz_a_line_means_what_it_means_alone(
    tmp_path_factory, monkeypatch_blocks, lines, block, unit
):
    monkeypatch_blocks(block)
    path = tmp_path_factory.getbasetemp() / f"{uuid.uuid4().hex}.jsonl"
    path.write_bytes(b"\n".join([b"", *lines]))  # the mark of a byte order is one in line 1 only
    documents, problems = verdicts(path, unit)
    path.unlink()
    expected, offset, counts = [], 1, {}
    for line in lines:
        verdict, text = alone(line)
        if verdict == "text":
            expected.append((offset, text))
        elif verdict != "blank":
            counts[verdict] = counts.get(verdict, 0) + 1
        offset += len(line) + 1
    assert documents == expected
    assert problems == counts


@pytest.fixture
def monkeypatch_blocks(monkeypatch):
    def set_to(block):
        monkeypatch.setattr(blocks, "BLOCK", block)
        monkeypatch.setattr(blocks, "OVERRUN", max(2, block // 3))

    return set_to


@pytest.mark.parametrize("line", ODD, ids=lambda line: repr(line[:24])[2:-1])
def test_the_fast_parser_gives_the_verdict_of_a_line_or_none(line):
    for block_lines in ([line], [GOOD[0], line], [line, *GOOD], [GOOD[1], line, line, GOOD[2]]):
        if b"\n".join(block_lines).count(b"\n") != len(block_lines) - 1:
            continue
        texts = jsonl.parse_lines_fast(b"\n".join(block_lines), block_lines, "text")
        if texts is not None:
            found = [("text", text) if text else ("empty", None) for text in texts.to_pylist()]
            assert found == [alone(each) for each in block_lines]


def test_a_line_is_valid_where_json_itself_takes_it():
    """parse_line against json.loads, for all odd lines within the stated limit of depth."""
    for line in ODD:
        try:
            value = json.loads(line.decode())["text"]
            expected = ("text", value) if value else ("empty", None)
            assert value is None or value.encode() is not None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            expected = ("blank", None) if not line.strip() else ("bad", None)
        if not jsonl.is_too_deep(line):
            assert alone(line) == expected, line


def test_depth_is_counted_outside_of_strings_and_ends_where_it_is_said():
    assert not jsonl.is_too_deep(nested(jsonl.DEEPEST))
    assert jsonl.is_too_deep(nested(jsonl.DEEPEST + 1))
    assert not jsonl.is_too_deep(b'{"text":"' + b'\\\\\\"[{' * 2000 + b'"}')


def call_from_depth(depth, function):
    return function() if depth == 0 else call_from_depth(depth - 1, function)


def test_how_deep_a_line_may_go_does_not_depend_on_who_reads_it():
    line = nested(jsonl.DEEPEST)
    assert call_from_depth(250, lambda: jsonl.parse_line(line, "text")) == "deep"
    with pytest.raises(ValueError, match="nested more than 500 deep"):
        jsonl.parse_line(nested(jsonl.DEEPEST + 1), "text")


# ---- long lines


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unit_bytes", [40, 1 << 40])
def test_a_line_beyond_the_limit_is_named_or_left_out_and_its_neighbours_stay(
    tmp_path, monkeypatch, unit_bytes, packed
):
    monkeypatch.setattr(jsonl, "LARGEST_LINE", 100)
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "OVERRUN", 4)
    fits = json.dumps({"text": "x" * 88}).encode()
    assert len(fits) == 100
    lines = [GOOD[0], fits, fits + b" ", fits, b"\xef\xbb\xbf" * 90, GOOD[1], b"[" * 5000, GOOD[2]]
    data = b"\n".join(lines)
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    source = local_source([path])
    units = list(plan_units(source, unit_bytes=unit_bytes))
    batches = [b for unit in units for b in read_unit(source, unit, on_bad_document="skip")]
    texts = [text for batch in batches for text in batch.texts.to_pylist()]
    assert texts == ["good 0", "x" * 88, "x" * 88, "good 1", "good 2"]
    assert sum(len(batch.skipped["bad"]) for batch in batches) == 3
    assert sum(batch.num_rows for batch in batches) == len(lines)
    with pytest.raises(SourceError, match="line 3: a line of more than 100 bytes"):
        [b for unit in units for b in read_unit(source, unit)]
