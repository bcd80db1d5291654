"""How many cases the fuzz tests try: some hundreds, or what the environment says.

$ FUZZ_CASES=10000 python -m pytest tests -k fuzz
"""

import os

from hypothesis import HealthCheck, settings


def cases(default: int) -> settings:
    """Settings of a fuzz test: its number of cases is FUZZ_CASES where that is set."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_CASES", default)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
