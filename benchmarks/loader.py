"""How fast the loader hands out batches, and whether any of them comes late.

    $ python benchmarks/loader.py
    shuffled      2.10 GB/s of tokens ...

Counts the bytes of tokens as the shards hold them (2 per token) that arrive as int64 batches, ready
for the model: ten shards of 40 MB, read from page cache, at GPT-2's shape (8 sequences x 1,024
tokens x 5 micro-steps). Beside it the loop that many training scripts use: a random offset per
sequence, each sliced out of the memory map, converted to int64 and stacked, twice; the same
shards as llm.c's .bin; and a mixture of both kinds, 0.7 and 0.3 of each batch. A shard boundary
must not be felt: in file order, the slowest step within ten of a boundary is compared with the
slowest of the others.
"""

import argparse
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pretrain.tokens.formats import shard_header
from pretrain.train.data import MixtureLoader
from pretrain.train.loader import ShardLoader
from pretrain.train.mixture import parse_mixture

BATCH: dict[str, Any] = {"batch_size": 8, "block_size": 1024, "accumulation_steps": 5}
STEP_TOKENS = 8 * 1024 * 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each of the measurements (5)"
    )
    parser.add_argument("--shards", type=int, default=10, help="of 40 MB each (10)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), args.shards, tokens=20_000_000)
        plain = measure("plain loop", plain_batches(paths), args.seconds)
        for name, shuffle in (("file order", False), ("shuffled", True)):
            with closing(ShardLoader(paths, shuffle=shuffle, **BATCH).prefetch()) as batches:
                rate = measure(name, batches, args.seconds)
        print(f"shuffled / plain loop: {rate / plain:.1f}")
        bins = as_bin(paths, Path(folder) / "bin")
        with closing(ShardLoader(bins, **BATCH).prefetch()) as batches:
            other = measure("shuffled bin", batches, args.seconds)
        print(f".bin / .npy: {other / rate:.2f}")
        sources = parse_mixture([f"npy={folder}:0.7", f"bin={bins[0].parent}:0.3"])
        mixed = MixtureLoader(sources, {"npy": paths, "bin": bins}, **BATCH)
        with closing(mixed.prefetch()) as batches:
            other = measure("mixture", batches, args.seconds)
        print(f"mixture / one source: {other / rate:.2f}")
        report_boundaries(paths)
    return 0


def write_shards(folder: Path, count: int, tokens: int) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [folder / f"random_train_{index:06d}.npy" for index in range(1, count + 1)]
    for path in paths:
        np.save(
            path, random.integers(0, 50257, tokens, dtype=np.uint16)
        )  # leaves it in the page cache
    return paths


def as_bin(paths: list[Path], folder: Path) -> list[Path]:
    """The same shards in llm.c's format."""
    folder.mkdir()
    found = []
    for path in paths:
        tokens = np.load(path)
        found.append(folder / f"{path.stem}.bin")
        found[-1].write_bytes(shard_header(len(tokens), "bin") + tokens.tobytes())
    return found


def plain_batches(paths: list[Path]):
    """Random windows of one shard after another, as a short training script would read them."""
    random = np.random.default_rng(0)
    shards = [np.load(path, mmap_mode="r") for path in paths]
    while True:
        for shard in shards:
            starts = random.integers(0, len(shard) - 1025, 40)
            x = torch.stack(
                [torch.from_numpy(shard[i : i + 1024].astype(np.int64)) for i in starts]
            )
            y = torch.stack(
                [torch.from_numpy(shard[i + 1 : i + 1025].astype(np.int64)) for i in starts]
            )
            yield x, y


def measure(name: str, batches, seconds: float) -> float:
    """GB/s of tokens, after a first batch that is not counted."""
    next(batches)
    steps, t0 = 0, time.perf_counter()
    while (dt := time.perf_counter() - t0) < seconds:
        next(batches)
        steps += 1
    rate = steps * STEP_TOKENS / dt
    per_step = f"{dt / steps * 1e6:6.0f} us/step"
    print(
        f"{name:12s} {2 * rate / 1e9:5.2f} GB/s of tokens {rate / 1e6:7,.0f} M tokens/s {per_step}"
    )
    return rate


def report_boundaries(paths: list[Path]) -> None:
    """Time single steps without read-ahead, so that nothing hides a pause."""
    loader = ShardLoader(paths, shuffle=False, **BATCH)
    near: list[float] = []
    far: list[float] = []
    for step in range(int(loader.steps_per_epoch)):
        t0 = time.perf_counter()
        loader.batch(step)
        dt = time.perf_counter() - t0
        first, last = step * STEP_TOKENS // 20_000_000, (step + 10) * STEP_TOKENS // 20_000_000
        (near if first != last else far).append(dt)
    for name, seconds in (("steps near a shard boundary", near), ("all other steps", far)):
        median, slowest = np.median(seconds) * 1e6, max(seconds) * 1e6
        print(
            f"{name:27s} {len(seconds):6,} steps, median {median:4.0f} us,"
            f" slowest {slowest:5.0f} us"
        )


if __name__ == "__main__":
    sys.exit(main())
