"""What the tests of the adapters share."""

import functools
import gc
import importlib
import shutil

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


@pytest.fixture(autouse=True, scope="session")
def _one_tokenizer_for_all(_what_the_frameworks_bring_is_no_garbage, tmp_path_factory):
    """Exports and runs have GPT-2's tokenizer, the same each time: it is made once for a length,
    and its files are copied."""
    from adapters import hf_tokenizer, hf_trainer, huggingface, lightning_module

    build, save = functools.cache(hf_tokenizer.build_tokenizer), hf_tokenizer.save_tokenizer

    @functools.cache
    def saved(block_size):
        folder = tmp_path_factory.mktemp("tokenizer")
        save(folder, block_size)
        return folder

    def copied(folder, block_size):
        shutil.copytree(saved(block_size), folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_trainer, "build_tokenizer", build)
        for module in (huggingface, lightning_module):
            patch.setattr(module, "save_tokenizer", copied)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder of small shards."""
    return write_shards(tmp_path_factory.mktemp("data"))
