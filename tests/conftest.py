"""What all tests share: libraries that count their users are told not to."""

import os

import pytest


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
