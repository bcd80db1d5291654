"""The folders that --data_dir names: whether they hold what a run needs, and those on this machine
that stand for folders of a store.

    check_folders("data/fineweb", is_evaluated=True)    # [] or one line for each problem
    local_folders("s3://bucket/fineweb", Path("data/.cache"), 100 * 10**9, block_size=1024)

With a store the loader reads as ever, and which tokens a step trains on does not change.
"""

from collections.abc import Sequence
from pathlib import Path

from pretrain.text.addresses import is_address
from pretrain.tokens.shards import Manifest, ShardError, find_shards
from pretrain.train.mixture import is_mixture, parse_mixture, read_mixture


def find_all(folder: str, is_evaluated: bool) -> None:
    """Raises ShardError where a folder lacks shards that the run needs. A store is not asked: its
    turn comes with local_folders, once."""
    if is_address(folder):
        return
    for split in ("train", "val") if is_evaluated else ("train",):
        find_shards(folder, split)


def check_mixture(words: Sequence[str], is_evaluated: bool) -> list[str]:
    """What is wrong with a mixture and its folders, one line each."""
    sources, problems = read_mixture(words)
    for source in sources:
        try:
            find_all(source.folder, is_evaluated)
        except ShardError as error:
            problems.append(f"{source.name}: {error}")
    return [f"--data_dir {problem}" for problem in problems]


def local_folders(
    data_dir: str | Sequence[str], root: Path, max_bytes: int, block_size: int
) -> str | list[str]:
    """--data_dir with folders of this machine in the place of addresses. Raises ShardError where
    max_bytes cannot hold what the loader mixes at a time, and like open_cache."""
    from pretrain.tokens.shard_cache import open_cache
    from pretrain.train.loader import POOL_CHUNKS

    words = [data_dir] if isinstance(data_dir, str) else list(data_dir)
    needed = 0
    for i, word in enumerate(words):
        address = parse_mixture([word])[0].folder if is_mixture([word]) else word
        if is_address(address):
            folder = open_cache(address, root, max_bytes)
            words[i] = word.replace(address, str(folder))
            needed += _needed(folder, block_size)
    if needed > max_bytes:
        raise ShardError(
            f"--data_cache_gb {max_bytes / 1e9:g}: a batch is mixed from {POOL_CHUNKS} places of "
            f"the shards, which takes {needed / 1e9:.3g}; give that, or make smaller shards"
        )
    return words[0] if isinstance(data_dir, str) else words


def _needed(folder: Path, block_size: int) -> int:
    """Bytes of the shards that hold the pool in use and the next one. A chunk of c bytes in shards
    of s bytes touches 1 + c / s of them, on average."""
    from pretrain.train.loader import CHUNK_WINDOWS, POOL_CHUNKS

    manifest = Manifest.load(folder)
    sizes = [2 * shard.tokens for shard in manifest.shards] if manifest else []
    chunk = 2 * CHUNK_WINDOWS * block_size
    return min(sum(sizes), 2 * POOL_CHUNKS * (chunk + max(sizes, default=0)))
