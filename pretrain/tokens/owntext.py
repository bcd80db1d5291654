"""Training on one's own text: files become shards, once.

    data_dir = prepare(["input.txt"], Path("checkpoints/data"))  # built, or found there from before

The shards are those of `fineweb.py --source input.txt --val_fraction 0.1`: the first tenth of the
tokens is for validation, the rest for training, both contiguous, so that no window of one holds a
token of the other.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.text.documents import local_source
from pretrain.tokens.build import Settings, Work, build_shards
from pretrain.tokens.estimate import estimate
from pretrain.tokens.progress import ConsoleProgress
from pretrain.tokens.shards import MANIFEST, NAME_PATTERN, Manifest, open_shard
from pretrain.tokens.tokenizer import Tokenizer

VAL_FRACTION = 0.1
POLL_SECONDS = 0.2
COUNTED_TOKENS = 10**8  # takes half a second


def is_shard_folder(path: str | Path) -> bool:
    """Whether a folder holds shards, so that there is nothing to prepare."""
    path = Path(path)
    return path.is_dir() and (
        (path / MANIFEST).exists()
        or any(NAME_PATTERN.fullmatch(file.name) for file in path.glob("*.npy"))
    )


def prepare(paths: Sequence[str | Path], folder: Path, *, builder: bool = True) -> Path:
    """The folder with the shards of some text: `folder`, or `paths` itself where that is a folder
    of shards.

    One process of each machine is the builder; the others wait for its manifest to be complete,
    however long that takes (a collective would time out), so a builder that fails has to end them,
    as torchrun does. Text that has changed since is refused. Raises SourceError, BuildRefused,
    ShardError, TokenizerUnavailable, OSError.
    """
    if len(paths) == 1 and is_shard_folder(paths[0]):
        return Path(paths[0])
    if not builder:
        while not ((manifest := Manifest.load(folder)) and manifest.complete):
            time.sleep(POLL_SECONDS)
        return folder
    source, work = local_source(paths), Work(Tokenizer())
    before = Manifest.load(folder)
    expected = estimate(source, work.count_tokens)
    work.progress = ConsoleProgress(expected, None)
    try:
        settings = Settings(val_fraction=VAL_FRACTION)
        manifest = build_shards(source, folder, settings, work, expected_tokens=expected.tokens)
    finally:
        work.progress.close()
    kept = "kept from before" if before and before.complete else "made"
    val = sum(shard.tokens for shard in manifest.shards if shard.split == "val")
    print(
        f"{folder}: shards {kept}: {manifest.tokens - val:,} tokens for training, {val:,} for validation"
    )
    return folder


def unigram_entropy(paths: Sequence[Path]) -> float | None:
    """Entropy in nats of the token frequencies of some shards; None for more than COUNTED_TOKENS
    tokens.

    It is what a model that knows these frequencies and nothing else pays per token there, so a loss
    clearly below it shows that the context is used.
    """
    shards = [open_shard(path) for path in paths]
    if sum(map(len, shards)) > COUNTED_TOKENS:
        return None
    counts = sum(np.bincount(shard, minlength=2**16) for shard in shards)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
