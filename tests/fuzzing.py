"""Fuzz tests: readers of outside bytes, given what is almost right.

@fuzz(100)                      # so many cases, or as many as FUZZ_CASES says (`make fuzz`)
@given(st.binary())
def test_any_bytes_are_read_or_refused(data):
    with bounded():             # and the reader's cost stays within these bounds
        ...
"""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator

from hypothesis import HealthCheck, settings

SECONDS, MEGABYTES = 20, 600  # for a case: generous, as many run beside it


def fuzz(default: int, cost: int = 1) -> settings:
    """Decorator of a fuzz test: `default` cases, the same ones every time; in the long mode
    FUZZ_CASES of them by chance, divided by `cost` where one takes seconds."""
    wanted = os.environ.get("FUZZ_CASES")
    return settings(
        max_examples=max(1, int(wanted) // cost) if wanted else default,
        derandomize=not wanted,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes long, or raises this process's peak of memory by much."""
    begun, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        assert time.monotonic() - begun < SECONDS
        assert grown / (1e6 if sys.platform == "darwin" else 1e3) < MEGABYTES
