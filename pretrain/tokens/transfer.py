"""Values with large arrays from one process to another, at a sixth of the cost of Connection.send.

    reader, writer = context.Pipe(duplex=False)
    widen(writer)
    send(writer, batch)         # in one process
    batch = receive(reader)     # in another

Connection.send copies an array into a pickle, and Connection.recv reads it in pieces that it joins
and copies twice: 3.5 s of the processor for a GB of tokens. Here large arrays are written as they
are behind the pickle (protocol 5, PEP 574) and read to where they stay: 0.5 s.
"""

import os
import pickle
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

LARGE = 1 << 16  # bytes of an array from which it is not in the pickle
PIPE_BYTES = 1 << 20  # that a pipe holds: Linux's default of 64 KiB wakes the reader often


def widen(writer: Connection) -> None:
    """Let a pipe hold more, where a system offers that and its limit allows it."""
    try:
        import fcntl

        fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        return


def send(writer: Connection, value: Any) -> None:
    """Send what can be pickled. Raises OSError where nobody reads, and what pickle raises."""
    large: list[memoryview] = []

    def is_in_pickle(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes >= LARGE:
            large.append(view)
        return view.nbytes < LARGE

    pickled = pickle.dumps(value, protocol=5, buffer_callback=is_in_pickle)
    writer.send((pickled, [view.nbytes for view in large]))
    for view in large:
        if not hasattr(os, "readv"):  # Windows: there a pipe has messages
            writer.send_bytes(view)
            continue
        while view:
            view = view[os.write(writer.fileno(), view) :]


def receive(reader: Connection) -> Any:
    """What was sent. Raises EOFError where the other side has ended, OSError."""
    pickled, sizes = reader.recv()
    buffers = [np.empty(size, np.uint8) for size in sizes]
    for buffer in buffers:
        view = buffer.data
        if not hasattr(os, "readv"):
            reader.recv_bytes_into(view)
            continue
        while view:
            count = os.readv(reader.fileno(), [view])
            if count == 0:
                raise EOFError
            view = view[count:]
    return pickle.loads(pickled, buffers=buffers)
