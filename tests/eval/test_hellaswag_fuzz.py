"""HellaSwag files that nobody published: examples, or a HellaSwagError that names the line."""

import gzip
import json

import pytest
from fuzzing import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from pretrain.eval.hellaswag import STYLES, Example, HellaSwagError, load_examples, prompt

GOOD = {
    "ind": 1,
    "activity_label": "Baking",
    "ctx": "A baker bakes",
    "ctx_a": "A baker",
    "ctx_b": "bakes",
    "endings": ["a", "b", "c", "d"],
    "label": 2,
}
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([10**400, "\ud800", "\x00", "9", -1, 2.0]),
    lambda v: st.lists(v, max_size=5) | st.dictionaries(st.text(max_size=5), v, max_size=3),
)


def check(path):
    """Examples that can be asked in every style, or the error."""
    try:
        with bounded():
            examples = load_examples(path)
    except HellaSwagError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for example in examples:
        assert isinstance(example, Example) and isinstance(example.ind, int)
        for style in STYLES:
            context, endings = prompt(example, style)
            assert len(endings) == 4
            for text in (context, *endings):
                text.encode("utf-8")


@fuzz(200)
@given(st.dictionaries(st.sampled_from([*GOOD, "source_id"]), ODD, max_size=4))
def test_any_field_is_an_example_or_an_error_with_its_line(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fields.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | changes) + "\n")
    check(path)


@fuzz(200)
@given(st.binary(max_size=100), st.booleans(), st.integers(0, 200))
def test_any_bytes_whole_cut_or_zipped_are_examples_or_an_error(
    tmp_path_factory, data, zipped, cut
):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    whole = json.dumps(GOOD).encode() + b"\n" + data
    path.write_bytes((gzip.compress(whole) if zipped else whole)[:cut])
    check(path)


def test_a_line_nested_beyond_pythons_depth_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(HellaSwagError, match="line 2"):
        load_examples(path)


def test_a_small_file_that_inflates_to_gigabytes_is_refused_at_once(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 2**20, compresslevel=9) * 3000)
    with pytest.raises(HellaSwagError, match=r"bomb.jsonl.gz: .* GB"):
        load_examples(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(HellaSwagError, match="not a file"):
        load_examples(tmp_path / "pipe.jsonl")
