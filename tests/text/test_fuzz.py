"""Fuzz tests of what is read from outside: documents of any bytes end in documents or in one line.

Each mutates something valid, so that the mutations get past the first check.
"""

import gzip
import json
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import fuzz_settings
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.flags import load_yaml
from pretrain.text.documents import local_source, plan_units, read_unit
from pretrain.text.hub import _plain_card

SECONDS = 20  # for a case: generous, as many run beside it


def read_all(path, **options):
    """The documents, or None where a line says why there are none."""
    begun = time.monotonic()
    try:
        source = local_source([path])
        texts = [
            text
            for unit in plan_units(source, unit_bytes=50)
            for batch in read_unit(source, unit, **options)
            for text in batch.texts.to_pylist()
        ]
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)
        texts = None
    assert time.monotonic() - begun < SECONDS
    return texts


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


@given(mutated(LINES), st.sampled_from(["stop", "skip"]))
@fuzz_settings(120)
def test_fuzz_json_lines(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".jsonl", data), on_bad_document=on_bad)


@given(mutated(gzip.compress(LINES, mtime=0)), st.sampled_from(["stop", "skip"]))
@fuzz_settings(80)
def test_fuzz_compressed_json_lines(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".jsonl.gz", data), on_bad_document=on_bad)


ZSTD = pa.compress(LINES, "zstd", asbytes=True)


@given(mutated(ZSTD), st.sampled_from(["stop", "skip"]))
@fuzz_settings(80)
def test_fuzz_zstd(tmp_path, data, on_bad):
    read_all(write(tmp_path, ".jsonl.zst", data), on_bad_document=on_bad)


TEXT = "one\n<|endoftext|>\r\ntwo \u00e9\n<|endoftext|>\n\n<|endoftext|>\nthree".encode()


@given(mutated(TEXT) | st.binary(max_size=100), st.sampled_from(["stop", "skip"]))
@fuzz_settings(120)
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


@given(st.data(), st.sampled_from(["stop", "skip"]))
@fuzz_settings(120)
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


@given(mutated(CARD))
@fuzz_settings(120)
def test_fuzz_dataset_cards(data):
    text = "---\n" + data.decode("utf-8", "replace") + "\n---\n"
    begun = time.monotonic()
    try:
        json.loads(_plain_card(text).strip().strip("-") or "{}")
    except UserError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - begun < SECONDS


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


@given(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join))
@fuzz_settings(200)
def test_fuzz_yaml(text):
    try:
        load_yaml(text, "x.yaml")
    except UserError as error:
        assert str(error).startswith("x.yaml: ")
