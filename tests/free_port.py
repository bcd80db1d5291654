"""A port for processes that a test starts and that have to be told it beforehand."""

import contextlib
import random
import socket


def free_port():
    """One that nothing listens on, below those that systems give out by themselves (from 32768 on):
    other tests open connections all the time, and one of them could be given it in between."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port among a hundred")
