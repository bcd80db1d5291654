"""Training from a store: the batches of a folder, through a bounded cache and a store's faults."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import flags, logged

import train_gpt2
from pretrain.text import ranges
from pretrain.text.documents import local_source
from pretrain.text.source import SourceError
from pretrain.tokens import shard_cache
from pretrain.tokens.build import Settings, Work, build_shards
from pretrain.tokens.shard_cache import bring_ahead, open_cache
from pretrain.tokens.shards import ShardError, data_fingerprint, find_shards, open_shard
from pretrain.tokens.tokenizer import Tokenizer
from pretrain.train import loader as loader_module
from pretrain.train.data import TrainingData
from pretrain.train.folders import local_folders

ROOT = Path(__file__).parents[2]
ADDRESS = "s3://acme/tokens/web"
SHARD = 2 * 1000 + 128  # bytes
ROOMY = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 1,000 tokens: one for validation, five or so to train on."""
    here = tmp_path_factory.mktemp("folder")
    text = " ".join(random.Random(3).choices(["mill", "river", "the", "a"], k=6500))
    (here / "web.txt").write_text(text)
    work = Work(Tokenizer("tiktoken"))
    source, settings = local_source([here / "web.txt"]), Settings(shard_size=1000)
    build_shards(source, here / "web", settings, work, expected_tokens=10**6)
    return here / "web"


@pytest.fixture
def store(s3, folder):
    for path in folder.iterdir():
        if not path.name.startswith("."):
            s3.put(f"{ADDRESS}/{path.name}", path.read_bytes())
    return s3


def here(cache):
    return sorted(path.name for path in cache.glob("*/*.npy"))


def batches(data_dir, steps=40, **options):
    loader = TrainingData(str(data_dir)).loader(batch_size=4, block_size=16, seed=7, **options)
    return [loader.batch(step)[0].tolist() for step in range(steps)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_from_a_store_are_those_of_the_folder(store, folder, tmp_path, shuffle):
    data = local_folders(ADDRESS, tmp_path, ROOMY, 16)
    assert here(tmp_path) == []  # nothing is brought before it is needed
    assert batches(data, shuffle=shuffle) == batches(folder, shuffle=shuffle)
    assert data_fingerprint(data) == data_fingerprint(folder)
    brought = [what for what in store.requests if ".npy" in what and what.startswith("GET")]
    assert len(brought) == len(set(brought)) <= len(find_shards(folder, "train"))
    words = local_folders([f"web={ADDRESS}:0.7@9:1", f"b={folder}:1"], tmp_path, ROOMY, 16)
    assert words == [f"web={data}:0.7@9:1", f"b={folder}:1"]


def test_a_small_cache_stays_small_and_changes_no_batch(store, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "CHUNK_WINDOWS", 8)
    monkeypatch.setattr(loader_module, "POOL_CHUNKS", 1)
    bound, held = 4 * SHARD + 600, []
    download = shard_cache.stores.download

    def watched(*args, **options):
        download(*args, **options)
        held.append(sum(path.stat().st_size for path in tmp_path.glob("*/*.npy")))

    monkeypatch.setattr(shard_cache.stores, "download", watched)
    data = local_folders(ADDRESS, tmp_path, bound, 16)
    assert batches(data, steps=200) == batches(folder, steps=200)
    assert max(held) <= bound and len(held) > len(find_shards(folder, "train"))


def test_a_cache_that_cannot_hold_what_a_batch_is_mixed_from_is_refused(store, tmp_path):
    with pytest.raises(ShardError, match=r"--data_cache_gb 3e-06: .* 32 places .* takes .*; give"):
        local_folders(ADDRESS, tmp_path, 3000, 16)


def test_shards_are_brought_ahead_of_need_and_used_ones_make_room_last(store, folder, tmp_path):
    data = open_cache(ADDRESS, tmp_path, 3 * SHARD)
    first, second, third, fourth, *_ = find_shards(data, "train")
    bring_ahead(first)
    deadline = time.monotonic() + 30
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    store.faults(fail_every=1)
    assert len(open_shard(first)) == 1000  # without the store
    store.faults()
    for path in (second, third, first, fourth):
        open_shard(path)
        time.sleep(0.01)
    assert here(tmp_path) == sorted(path.name for path in (first, third, fourth))


def test_ranks_of_a_machine_share_one_download(store, tmp_path):
    data = open_cache(ADDRESS, tmp_path, ROOMY)
    path = find_shards(data, "train")[0]
    store.faults()
    store.before = lambda what: time.sleep(1)  # long enough for both to want it
    code = f"from pretrain.tokens.shards import open_shard; print(len(open_shard({str(path)!r})))"
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    assert [rank.communicate()[0] for rank in ranks] == [b"1000\n", b"1000\n"]
    assert len([what for what in store.requests if what.startswith("GET")]) == 1


def test_a_shard_that_is_not_what_the_manifest_says_is_named_and_not_kept(store, folder, tmp_path):
    name = find_shards(folder, "train")[1].name
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    store.put(f"{ADDRESS}/{name}", bytes(data))
    cache = open_cache(ADDRESS, tmp_path, ROOMY)
    with pytest.raises(ShardError, match=rf"{ADDRESS}/{name}: its SHA-256 is not the one"):
        open_shard(cache / name)
    store.delete(f"{ADDRESS}/{name}")
    with pytest.raises(ShardError, match=rf"{ADDRESS}/{name}: listed in manifest.json but missing"):
        open_shard(cache / name)
    assert here(tmp_path) == []
    store.put(f"{ADDRESS}/{name}", (folder / name).read_bytes())
    assert len(open_shard(cache / name)) == 1000


def test_shards_of_another_manifest_leave_the_cache(store, folder, tmp_path):
    cache = open_cache(ADDRESS, tmp_path, ROOMY)
    first, second, *_ = find_shards(cache, "train")
    open_shard(first), open_shard(second)
    text = (folder / "manifest.json").read_text()
    digest = next(
        s.sha256 for s in shard_cache.Manifest.load(folder).shards if s.file == first.name
    )
    store.put(f"{ADDRESS}/manifest.json", text.replace(digest, "0" * 64).encode())
    open_cache(ADDRESS, tmp_path, ROOMY)
    assert here(tmp_path) == [second.name]


def test_a_store_that_stays_away_is_one_error(store, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges.random, "uniform", lambda *_: 0.01)  # of the usual waits
    cache = open_cache(ADDRESS, tmp_path, ROOMY)
    store.faults(match="npy", fail_every=2)
    assert len(open_shard(find_shards(cache, "train")[0])) == 1000 and store.faulty
    impatient = shard_cache.stores.Patience(give_up_seconds=0.5)
    monkeypatch.setattr(shard_cache.stores, "Patience", lambda: impatient)
    store.faults(match="npy", fail_every=1)
    with pytest.raises(SourceError, match=r"train_000002.npy: HTTP 503 .* attempts? in .*; rerun"):
        open_shard(find_shards(cache, "train")[1])


def test_a_run_from_a_store_has_the_losses_of_a_run_from_the_folder(
    store, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main(flags(folder, tmp_path / "a")) == 0
    assert train_gpt2.main(flags(ADDRESS, tmp_path / "b")) == 0
    for event, name in (("train", "loss"), ("eval", "val_loss")):
        assert logged(tmp_path / "b", event, name) == logged(tmp_path / "a", event, name)
    assert here(tmp_path / "data/.cache")
    capsys.readouterr()
    assert train_gpt2.main(flags("s3://acme/nothing", tmp_path / "d")) == 1
    assert "s3://acme/nothing: no manifest.json, which has the hashes" in capsys.readouterr().err
