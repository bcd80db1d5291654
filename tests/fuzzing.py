"""How many cases the fuzz tests try: some hundreds, or as many as FUZZ_CASES says (`make fuzz`)."""

import os

from hypothesis import HealthCheck, settings


def cases(default: int) -> int:
    """Number of cases of a fuzz test."""
    return int(os.environ.get("FUZZ_CASES", default))


def fuzz_settings(default: int) -> settings:
    """Settings of a fuzz test with so many cases: its readers bound their own time."""
    return settings(
        max_examples=cases(default),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
