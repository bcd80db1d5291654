"""The conversions of pretrain.text.arrow against pyarrow's own."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.text import arrow

TEXT_TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]


@settings(deadline=None)
@given(
    st.lists(st.none() | st.text(max_size=5)),
    st.sampled_from(TEXT_TYPES),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_lengths_and_nulls_are_those_pyarrow_tells(texts, kind, start, stop):
    array = pa.array([text if text is None else text.encode() for text in texts], pa.binary()).cast(
        kind
    )
    array = array[start : len(texts) - stop]
    assert arrow.valid(array).tolist() == array.is_valid().to_pylist()
    assert arrow.lengths(array).tolist() == pc.fill_null(pc.binary_length(array), 0).to_pylist()


@settings(deadline=None)
@given(
    st.lists(st.none() | st.integers(0, 100)),
    st.sampled_from([pa.int8(), pa.uint16(), pa.int64()]),
    st.integers(0, 9),
)
def test_integers_are_those_pyarrow_tells(values, kind, start):
    array = pa.array(values, kind)[start:]
    assert arrow.integers(array).tolist() == [value or 0 for value in array.to_pylist()]


@settings(deadline=None)
@given(st.lists(st.text(max_size=5)), st.data())
def test_strings_and_a_selection_of_them_are_those_given(texts, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    array = arrow.strings([text.encode() for text in texts])
    assert array.type == pa.large_string() and array.to_pylist() == texts
    expected = [text for text, kept in zip(texts, keep, strict=True) if kept]
    assert arrow.select(array, np.array(keep, bool)).to_pylist() == expected
    assert (
        arrow.select(array[1:], np.array(keep[1:], bool)).to_pylist()
        == expected[keep[:1] == [True] :]
    )


def test_strings_that_are_not_utf8_are_refused():
    with pytest.raises(pa.ArrowInvalid):
        arrow.strings([b"fine", b"\xff"])
