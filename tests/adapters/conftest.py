"""What the tests of the adapters share."""

import gc
import importlib

import pytest
from tiny_runs import write_shards

# All that the adapters import, before a test changes a constant that one of them copies.
FRAMEWORKS = ("adapters.accelerate_loop", "adapters.hf_trainer", "adapters.lightning_module")


@pytest.fixture(autouse=True, scope="session")
def _what_the_frameworks_bring_is_no_garbage():
    """Trainer collects garbage at each start, which takes half a second among the million objects
    of these modules."""
    for name in FRAMEWORKS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder of small shards."""
    return write_shards(tmp_path_factory.mktemp("data"))
