import threading
from contextlib import closing

import numpy as np
import pytest
import torch

from pretrain.tokens.shards import Manifest, Shard, ShardError
from pretrain.train import data as data_module
from pretrain.train import loader as loader_module
from pretrain.train.data import refuse_different_data, verify_data
from pretrain.train.loader import ShardLoader, TokenWindows


def write_shards(folder, lengths, seed=0, split="train", highest=50257):
    """Shards of random tokens; returns their paths and all tokens end to end."""
    random, paths = np.random.default_rng(seed), []
    for index, length in enumerate(lengths, start=split == "train"):
        paths.append(folder / f"t_{split}_{index:06d}.npy")
        np.save(paths[-1], random.integers(0, highest, length).astype(np.uint16))
    return paths, np.concatenate([np.load(path) for path in paths])


def numbered_shards(folder, num_windows, block_size=4, shards=3):
    """Shards in which window i begins with token i % 60000: the tokens say which window a row
    is."""
    tokens = np.repeat(np.arange(num_windows) % 60000, block_size).astype(np.uint16)
    tokens = np.append(tokens, 0).astype(np.uint16)
    paths = []
    for index, part in enumerate(np.array_split(tokens, shards), start=1):
        paths.append(folder / f"n_train_{index:06d}.npy")
        np.save(paths[-1], part)
    return paths


def rows(batch):
    x, y = batch
    return torch.cat([x, y[..., -1:]], dim=-1).flatten(0, -2).tolist()


@pytest.fixture
def small_pools(monkeypatch):
    """Chunks of 4 windows and pools of 3 chunks, so that small data has many of both."""
    monkeypatch.setattr(loader_module, "CHUNK_WINDOWS", 4)
    monkeypatch.setattr(loader_module, "POOL_CHUNKS", 3)


@pytest.mark.parametrize("stride", [None, 3, 7])
def test_in_file_order_batches_are_what_a_plain_loop_over_all_tokens_gives(tmp_path, stride):
    paths, tokens = write_shards(tmp_path, [50, 3, 1, 2, 40, 31])  # some are shorter than a window
    block, hop = 7, stride or 7
    windows = [tokens[i : i + block + 1].tolist() for i in range(0, len(tokens) - block, hop)]
    for world_size in (1, 2):
        loaders = [
            ShardLoader(
                paths,
                batch_size=2,
                block_size=block,
                accumulation_steps=3,
                rank=rank,
                stride=stride,
                world_size=world_size,
                shuffle=False,
            )
            for rank in range(world_size)
        ]
        assert loaders[0].windows_per_epoch == len(windows)
        for step in range(4):
            batches = [loader.batch(step) for loader in loaders]
            x, y = batches[0]
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (3, 2, block)
            assert torch.equal(x[..., 1:], y[..., :-1])
            size = 6 * world_size
            expected = [windows[p % len(windows)] for p in range(step * size, (step + 1) * size)]
            assert sorted(row for batch in batches for row in rows(batch)) == sorted(expected)


@pytest.mark.parametrize("num_windows", [5, 12, 13, 97])
def test_every_window_of_an_epoch_is_used_once_and_each_epoch_has_its_own_order(
    tmp_path, small_pools, num_windows
):
    paths = numbered_shards(tmp_path, num_windows)
    world = [
        ShardLoader(
            paths, batch_size=2, block_size=4, accumulation_steps=2, rank=rank, world_size=2
        )
        for rank in range(2)
    ]
    used = []
    for step in range(3 * num_windows // 8 + 1):  # epochs end inside batches
        for micro_step in range(2):
            for loader in world:
                used += loader.batch(step)[0][micro_step, :, 0].tolist()
    epochs = [used[i * num_windows : (i + 1) * num_windows] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_windows))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]


def test_the_global_batch_is_the_same_for_every_world_size_that_divides_it(tmp_path, small_pools):
    paths, _ = write_shards(tmp_path, [600, 500])
    seen = []
    for world_size, accumulation, batch_size in (
        (1, 4, 2),
        (2, 2, 2),
        (4, 1, 2),
        (4, 2, 1),
        (8, 1, 1),
        (1, 1, 8),
    ):
        batches = [
            ShardLoader(
                paths,
                batch_size=batch_size,
                block_size=8,
                accumulation_steps=accumulation,
                rank=rank,
                world_size=world_size,
            ).batch(step)
            for step in (0, 7, 50)
            for rank in range(world_size)
        ]
        per_step = np.array_split(np.array([row for batch in batches for row in rows(batch)]), 3)
        seen.append([sorted(part.tolist()) for part in per_step])
    assert all(steps == seen[0] for steps in seen)


def test_a_batch_depends_on_the_step_and_not_on_what_was_asked_before(tmp_path, small_pools):
    paths, _ = write_shards(tmp_path, [900])
    settings = {"batch_size": 3, "block_size": 8, "accumulation_steps": 2}
    loader = ShardLoader(paths, **settings)
    forward = [rows(loader.batch(step)) for step in range(30)]
    backward = [rows(loader.batch(step)) for step in reversed(range(30))][::-1]
    fresh = [rows(ShardLoader(paths, **settings).batch(step)) for step in range(30)]
    assert forward == backward == fresh
    assert len(rows(loader.batch(10**12))) == 6, "any step is reached at once"
    other_seed = ShardLoader(paths, seed=1, **settings)
    assert rows(other_seed.batch(0)) != forward[0]


def test_windows_do_not_depend_on_where_shards_were_cut(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    batches = []
    for name, cuts in (("whole", []), ("halves", [500]), ("odd", [1, 2, 333, 340, 999])):
        folder = tmp_path / name
        folder.mkdir()
        paths = [folder / f"t_train_{i:06d}.npy" for i in range(len(cuts) + 1)]
        for path, part in zip(paths, np.split(tokens, cuts), strict=True):
            np.save(path, part)
        batches.append(rows(ShardLoader(paths, batch_size=20, block_size=16).batch(1)))
    assert batches[0] == batches[1] == batches[2]


def test_an_order_lasts_as_long_as_its_checkpoints(tmp_path):
    """These numbers were produced once. If they change, every run continues on other data than
    before."""
    loader = ShardLoader(numbered_shards(tmp_path, 200), batch_size=1, block_size=4, seed=1337)
    assert loader.order(np.arange(8)).tolist() == [163, 141, 133, 126, 46, 170, 41, 172]
    assert loader.order(np.arange(200, 208)).tolist() == [192, 116, 161, 51, 55, 145, 142, 61]


def test_a_batch_mixes_the_data_set_while_a_disk_reads_long_stretches(tmp_path):
    num_windows = 300_000
    loader = ShardLoader(
        numbered_shards(tmp_path, num_windows, block_size=1), batch_size=512, block_size=1
    )
    order = loader.order(np.arange(num_windows))
    pool = np.sort(order[: 2048 * 32])
    stretches = np.split(pool, np.flatnonzero(np.diff(pool) != 1) + 1)
    assert len(stretches) <= 34 and min(len(s) for s in stretches[1:-1]) >= 2048
    assert pool.mean() == pytest.approx(num_windows / 2, rel=0.25)
    for batch in order[:5120].reshape(10, 512):
        assert len(np.unique(batch // 2048)) > 25, (
            "a batch comes from nearly all chunks of its pool"
        )
    neighbours = np.abs(np.diff(order)) == 1
    assert neighbours.mean() < 0.001
    # Shuffled evenly within the pool: where a window lies says nothing of when it is used.
    rank_in_pool = np.argsort(np.argsort(order[: 2048 * 32]))
    assert abs(np.corrcoef(rank_in_pool, np.arange(2048 * 32))[0, 1]) < 0.02


def test_reading_ahead_asks_for_exactly_the_bytes_of_the_windows(tmp_path, monkeypatch):
    paths, _ = write_shards(tmp_path, [100, 5, 100])
    asked = []

    def advise(descriptor, offset, length, advice):
        asked.append((offset, length))

    monkeypatch.setattr("os.posix_fadvise", advise, raising=False)
    windows = TokenWindows(paths, block_size=10)
    # Tokens 80..120 of 205: the end of the first shard, the second, the beginning of the third.
    windows.read_ahead(8, 11)
    header = 128
    assert asked == [(header + 160, 40), (header, 10), (header, 32)]


def test_a_hint_to_the_system_that_fails_ends_no_run(tmp_path, monkeypatch):
    paths, _ = write_shards(tmp_path, [100])

    def refuse(*arguments):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.posix_fadvise", refuse, raising=False)
    TokenWindows(paths, block_size=10).read_ahead(0, 3)


def test_machines_with_other_shards_than_rank_0_are_named():
    refuse_different_data("data", ["a", "a"])
    with pytest.raises(ShardError, match="data: on the machine of rank 2 it holds other shards"):
        refuse_different_data("data", ["a", "a", "b", "b"])


def test_prefetching_gives_the_batches_of_the_steps_in_order(tmp_path, monkeypatch):
    paths, _ = write_shards(tmp_path, [2000])
    loader = ShardLoader(paths, batch_size=2, block_size=8, accumulation_steps=2)
    for tokens_at_a_time in (1, 100, 10**6):
        monkeypatch.setattr(loader_module, "READ_AHEAD_TOKENS", tokens_at_a_time)
        with closing(loader.prefetch(5)) as batches:
            for step in range(5, 12):
                assert rows(next(batches)) == rows(loader.batch(step))


def test_the_thread_makes_no_more_than_an_epoch_at_a_time(tmp_path, monkeypatch):
    paths, _ = write_shards(tmp_path, [2000])
    loader = ShardLoader(paths, batch_size=2, block_size=8, accumulation_steps=2)
    made, tokens = [], loader._tokens
    monkeypatch.setattr(loader, "_tokens", lambda step, n: made.append(n) or tokens(step, n))
    with closing(loader.prefetch()) as batches:
        next(batches)
    assert set(made) == {len(loader.windows) // 4}


def test_token_ids_survive_the_way_to_a_gpu_in_16_bits(tmp_path, monkeypatch):
    """The same way with memory that is not page-locked, which needs a GPU."""

    def unlocked(tokens):
        return torch.from_numpy(tokens.view(np.int16).copy())

    monkeypatch.setattr(loader_module, "page_locked", unlocked)
    paths, tokens = write_shards(tmp_path, [2000])
    assert tokens.max() > 2**15
    loader = ShardLoader(paths, batch_size=20, block_size=8)
    expected = [rows(loader.batch(step)) for step in range(5)]
    loader.pin_memory = True
    with closing(loader.prefetch()) as batches:
        assert [rows(next(batches)) for _ in range(5)] == expected


def test_the_prefetching_thread_ends_with_its_iterator_and_hands_its_errors_over(tmp_path):
    paths, _ = write_shards(tmp_path, [2000])
    before = threading.active_count()
    with closing(ShardLoader(paths, batch_size=2, block_size=8).prefetch()) as batches:
        next(batches)
    assert threading.active_count() == before
    broken = ShardLoader(paths, batch_size=2, block_size=8, vocab_size=10)
    with pytest.raises(ShardError, match="token"), closing(broken.prefetch()) as batches:
        next(batches)
    assert threading.active_count() == before


def test_a_token_id_past_the_vocabulary_is_reported_with_its_shard_and_place(tmp_path):
    paths, _ = write_shards(tmp_path, [100, 100], highest=50257)
    shard = np.load(paths[1])
    shard[42] = 60000
    np.save(paths[1], shard)
    loader = ShardLoader(paths, batch_size=30, block_size=8, vocab_size=50257)
    with pytest.raises(ShardError, match=r"t_train_000002\.npy: token 42 is 60000.*below 50257"):
        loader.batch(0)


def test_a_damaged_header_and_too_few_tokens_are_refused_by_name(tmp_path):
    paths, _ = write_shards(tmp_path, [100, 100])
    with open(paths[1], "r+b") as file:
        file.truncate(150)
    with pytest.raises(ShardError, match=r"t_train_000002\.npy"):
        ShardLoader(paths, batch_size=1, block_size=8)
    with pytest.raises(ShardError, match="100 tokens; a window takes 100 and one more"):
        ShardLoader(paths[:1], batch_size=1, block_size=100)
    assert ShardLoader(paths[:1], batch_size=1, block_size=99).windows_per_epoch == 1


def test_no_shard_is_copied(tmp_path):
    import tracemalloc

    paths, _ = write_shards(tmp_path, [2_000_000])
    loader = ShardLoader(paths, batch_size=4, block_size=64)
    loader.batch(0)
    tracemalloc.start()
    loader.batch(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000, "bytes; the shard has 4,000,000, a pool's order some hundred thousand"


def make_folder(folder):
    """A folder with a manifest, as fineweb.py leaves it."""
    import hashlib

    shards = []
    for split, lengths in (("val", [300]), ("train", [500, 400])):
        for path in write_shards(folder, lengths, split=split)[0]:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shards.append(Shard(path.name, split, len(np.load(path)), 1, digest, {}))
    Manifest("t", {}, {}, {}, 300, shards, None, True).save(folder)


def test_a_changed_byte_is_found_before_training_by_the_rank_that_reads_the_shard(tmp_path):
    make_folder(tmp_path)
    verify_data(tmp_path, None)
    path = tmp_path / "t_train_000002.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"t_train_000002\.npy"):
        verify_data(tmp_path, None)
    with pytest.raises(ShardError, match=r"t_train_000002\.npy"):
        verify_data(tmp_path, True, rank=1, world_size=2)
    verify_data(tmp_path, True, rank=0, world_size=2)
    verify_data(tmp_path, False)


def test_large_data_sets_are_verified_only_when_asked(tmp_path, monkeypatch):
    make_folder(tmp_path)
    path = tmp_path / "t_val_000000.npy"
    np.save(path, np.load(path) // 2)
    monkeypatch.setattr(data_module, "VERIFIED_BYTES", 100)
    verify_data(tmp_path, None)
    with pytest.raises(ShardError, match="t_val"):
        verify_data(tmp_path, True)
