"""What all tests share: how many cases a fuzz test draws, and a network that is not there."""

import os

import pytest
from hypothesis import settings

if cases := os.environ.get("FUZZ_CASES"):  # make fuzz
    settings.register_profile("fuzz", max_examples=int(cases), deadline=None)
    settings.load_profile("fuzz")


@pytest.fixture(autouse=True, scope="session")
def _quiet_libraries():
    """Libraries that count their users are told not to, in subprocesses too."""
    before = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    yield
    if before is None:
        del os.environ["HF_HUB_DISABLE_TELEMETRY"]
    else:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = before
