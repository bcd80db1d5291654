"""What all tests share: one thread each, long ones first, and libraries that are quiet."""

import os
import signal

import pytest

# Tests are small: several threads would wait for each other, which keeps all cores busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has its background jobs ignore Ctrl-C, and with them all processes that tests begin.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers():
    """Two more than cores: many tests wait for a process to start, to end or to give up."""
    return (os.cpu_count() or 1) + 2


def pytest_configure(config):
    """Workers read the test files, each from another one on: what one has compiled is there for
    the others."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw")[2:]
    if number and config.args_source == config.ArgsSource.TESTPATHS:
        files = sorted(str(path) for path in config.rootpath.glob("tests/**/test_*.py"))
        begin = len(files) * int(number) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        config.args = files[begin:] + files[:begin]


def pytest_collection_modifyitems(items):
    """Long tests come first: one that came last would run alone while other cores are idle. All
    workers have one order."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path))


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


@pytest.fixture
def no_fsync(monkeypatch):
    """For files whose tests build hundreds of shards: nothing cuts this process off. Programs
    started apart have theirs."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def _s3_server():
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from loopback_s3 import LoopbackS3

    with LoopbackS3() as server:
        yield server


@pytest.fixture
def s3(_s3_server, monkeypatch):
    """An empty S3 on loopback, which this test's process finds in its environment."""
    _s3_server.reset()
    _s3_server.use(monkeypatch)
    return _s3_server
