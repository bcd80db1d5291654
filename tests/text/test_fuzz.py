"""Fuzz tests of what is read from outside: documents of any bytes end in documents or in one line.

Each mutates something valid, so that the mutations get past the first check.
"""

import gzip
import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.flags import load_yaml
from pretrain.text.documents import local_source, plan_units, read_unit
from pretrain.text.hub import _plain_card


def read_all(path, **options):
    """The documents, or None where a line says why there are none."""
    try:
        with bounded():
            source = local_source([path])
            return [
                text
                for unit in plan_units(source, unit_bytes=50)
                for batch in read_unit(source, unit, **options)
                for text in batch.texts.to_pylist()
            ]
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return None


@st.composite
def mutated(draw, whole: bytes, tail: int | None = None):
    """Some bytes changed, cut out, doubled or put in; `tail`: in so many last bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        low = max(0, len(data) - tail) if tail else 0
        at = draw(st.integers(low, max(low, len(data))))
        stop = min(len(data), at + draw(st.integers(0, 8)))
        kind = draw(st.sampled_from(["change", "cut", "double", "insert", "end"]))
        if kind == "change":
            data[at:stop] = draw(st.binary(min_size=stop - at, max_size=stop - at))
        elif kind == "cut":
            del data[at:stop]
        elif kind == "double":
            data[at:at] = data[at:stop]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=6))
        elif not tail:
            del data[at:]
    return bytes(data)


def write(folder, name, data):
    path = folder / f"{uuid.uuid4().hex}{name}"
    path.write_bytes(data)
    return path


LINES = b"".join(
    json.dumps({"text": f"t{i} \u00e9\n", "n": [i, 1.5, None, {"a": "\ud83d\ude00"}]}).encode()
    + b"\n"
    for i in range(6)
)


@fuzz(120)
@given(mutated(LINES), st.sampled_from(["stop", "skip"]))
def test_fuzz_json_lines(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".jsonl", data), on_bad_document=on_bad)


@fuzz(80)
@given(mutated(gzip.compress(LINES, mtime=0)), st.sampled_from(["stop", "skip"]))
def test_fuzz_compressed_json_lines(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".jsonl.gz", data), on_bad_document=on_bad)


ZSTD = pa.compress(LINES, "zstd", asbytes=True)


@fuzz(80)
@given(mutated(ZSTD), st.sampled_from(["stop", "skip"]))
def test_fuzz_zstd(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".jsonl.zst", data), on_bad_document=on_bad)


TEXT = "one\n<|endoftext|>\r\ntwo \u00e9\n<|endoftext|>\n\n<|endoftext|>\nthree".encode()


@fuzz(120)
@given(mutated(TEXT) | st.binary(max_size=100), st.sampled_from(["stop", "skip"]))
def test_fuzz_text(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".txt", data), on_bad_document=on_bad)


@pytest.fixture(scope="module")
def parquet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    texts = [f"{i} \u00e9" * (i % 5) for i in range(40)]
    pq.write_table(
        pa.table({"text": texts, "token_count": list(range(40)), "id": texts}),
        path,
        row_group_size=9,
    )
    return path.read_bytes()


@fuzz(120)
@given(st.data(), st.sampled_from(["stop", "skip"]))
def test_fuzz_parquet_footer(tmp_path, parquet_file, data, on_bad):
    footer_bytes = int.from_bytes(parquet_file[-8:-4], "little") + 8
    changed = data.draw(mutated(parquet_file, tail=footer_bytes))
    read_all(write(tmp_path, ".parquet", changed), on_bad_document=on_bad)


CARD = b"""configs:
- config_name: a
  data_files: &files [{split: train, path: "x/*"}]
- {config_name: no, data_files: *files, default: true}
dataset_info: {features: [{name: text, dtype: string}], when: 2024-02-03, size: 1_000}
"""


@fuzz(120)
@given(mutated(CARD))
def test_fuzz_dataset_cards(data):
    text = "---\n" + data.decode("utf-8", "replace") + "\n---\n"
    try:
        with bounded():
            json.loads(_plain_card(text).strip().strip("-") or "{}")
    except UserError as error:
        assert "\n" not in str(error)


TOKENS = [
    "&a ",
    "*a",
    "[",
    "]",
    "{",
    "}",
    "- ",
    "? ",
    ": ",
    ", ",
    "\n",
    "  ",
    "<<: ",
    "x",
    "!!int ",
    "1e9",
    "0x",
    "'",
    '"',
    "|",
    ">",
    "2024-13-45",
    "!!binary ",
    "!!set ",
    "1:1",
    "---\n",
    "%",
    "@",
    "\t",
    "~",
    "\x00",
    "!!timestamp ",
]


@fuzz(200)
@given(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join))
def test_fuzz_yaml(text):
    try:
        with bounded():
            load_yaml(text, "x.yaml")
    except UserError as error:
        assert str(error).startswith("x.yaml: ")
