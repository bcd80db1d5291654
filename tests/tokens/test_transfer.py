"""What goes from one process to another arrives as pickle alone would bring it."""

import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest

from pretrain.text.documents import Unit
from pretrain.tokens import transfer
from pretrain.tokens.pipeline import TokenBatch


@pytest.fixture
def pipe():
    reader, writer = multiprocessing.Pipe(duplex=False)
    transfer.widen(writer)
    with reader, writer:
        yield reader, writer


def sent(pipe, value):
    """The value, once it has gone through the pipe, which does not hold a large one."""
    reader, writer = pipe
    sender = threading.Thread(target=transfer.send, args=(writer, value))
    sender.start()
    try:
        return transfer.receive(reader)
    finally:
        sender.join()


def assert_same(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, np.ndarray):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    elif isinstance(mine, TokenBatch):
        assert_same(vars(mine), vars(theirs))
    elif isinstance(mine, dict):
        assert_same(list(mine.items()), list(theirs.items()))
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)
    else:
        assert mine == theirs


EDGE = transfer.LARGE // 2  # uint16


@pytest.mark.parametrize("size", [0, 1, EDGE - 1, EDGE, EDGE + 1, 3_000_001])
def test_arrays_of_any_size_arrive(pipe, size):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 2**16, size, np.uint16)
    rows = np.arange(size)
    unit = Unit(3, 0, 7, 0, 99)
    batch = TokenBatch(unit, tokens, rows, rows[::-1], None, 5, {"empty": rows[:2]}, rows[::2], 9)
    for value in (tokens, [rows, "x", tokens], batch):
        assert_same(sent(pipe, value), pickle.loads(pickle.dumps(value)))


def test_one_value_after_the_other_arrives_whole_and_can_be_written_to(pipe):
    values = [np.full(200_000, i, np.int64) for i in range(5)]
    for value in values:
        found = sent(pipe, value)
        assert_same(found, value)
        found[0] = 7  # as with Connection.recv


def test_an_end_in_the_middle_of_an_array_is_the_end(pipe):
    reader, writer = pipe
    values = np.zeros(10_000_000, np.uint8)

    def send_half():
        writer.send((pickle.dumps(values[:0]), [values.nbytes]))
        os.write(writer.fileno(), values[:1000].data)
        writer.close()

    thread = threading.Thread(target=send_half)
    thread.start()
    with pytest.raises(EOFError):
        transfer.receive(reader)
    thread.join()


def test_nobody_who_reads_is_an_error(pipe):
    reader, writer = pipe
    reader.close()
    with pytest.raises(OSError, match="Broken pipe"):
        transfer.send(writer, np.zeros(10_000_000, np.uint8))
