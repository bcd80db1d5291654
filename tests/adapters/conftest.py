"""What the tests of the adapters share."""

import gc

import pytest
from tiny_runs import write_shards


@pytest.fixture(autouse=True, scope="session")
def _what_the_frameworks_brought_is_no_garbage():
    """Trainer collects garbage at each start, which takes half a second among the million objects
    of these modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder of small shards."""
    return write_shards(tmp_path_factory.mktemp("data"))
