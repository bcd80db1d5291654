"""What the tests of the adapters share."""

import pytest
from tiny_runs import write_shards


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder of small shards."""
    return write_shards(tmp_path_factory.mktemp("data"))
