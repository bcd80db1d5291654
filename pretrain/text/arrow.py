"""Arrow arrays to and from numpy, through their buffers.

pyarrow's own conversions (to_numpy, pa.array, pa.scalar) import pandas where it is installed, as it
is with `datasets`: a quarter of a second in every process.
"""

import numpy as np
import pyarrow as pa


def lengths(texts: pa.Array) -> np.ndarray:
    """Bytes of each text, (n,) int64; 0 for null. texts: string, large_string, binary or
    large_binary."""
    large = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    offsets = _values(
        texts.buffers()[1], np.int64 if large else np.int32, texts.offset, len(texts) + 1
    )
    return np.diff(offsets.astype(np.int64)) * valid(texts)


def valid(array: pa.Array) -> np.ndarray:
    """Which elements are not null, (n,) bool."""
    bitmap = array.buffers()[0]
    if bitmap is None:
        return np.ones(len(array), bool)
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    return bits[array.offset : array.offset + len(array)].astype(bool)


def integers(array: pa.Array) -> np.ndarray:
    """Values of an array of any type that casts to int64, (n,) int64; 0 for null."""
    array = array.cast(pa.int64())
    return _values(array.buffers()[1], np.int64, array.offset, len(array)) * valid(array)


def select(array: pa.Array, keep: np.ndarray) -> pa.Array:
    """The elements where `keep`, (n,) bool, is true."""
    bits = np.packbits(keep, bitorder="little").tobytes()
    return array.filter(pa.Array.from_buffers(pa.bool_(), len(keep), [None, pa.py_buffer(bits)]))


def strings(texts: list[bytes]) -> pa.Array:
    """A large_string array of texts. Raises ArrowInvalid where one is not UTF-8."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(texts))]
    array = pa.Array.from_buffers(pa.large_string(), len(texts), buffers)
    array.validate(full=True)
    return array


def _values(buffer: pa.Buffer | None, dtype: type, start: int, count: int) -> np.ndarray:
    if count == 0 or buffer is None or buffer.size == 0:  # an empty array need not have offsets
        return np.zeros(count, dtype)
    return np.frombuffer(buffer, dtype, count, start * np.dtype(dtype).itemsize)


def utf8_problem(data: bytes) -> str | None:
    """Why these bytes are not UTF-8, None if they are."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start} of the text (0x{data[error.start]:02x})"
    return None
