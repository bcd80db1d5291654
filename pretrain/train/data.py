"""What a run trains on and is measured on: one folder of shards, or a mixture of several.

    data = TrainingData("data/fineweb")
    data = TrainingData(["web=data/fineweb:0.7", "books=data/books:0.3@10000:0.6"])
    loader = data.loader(batch_size=8, block_size=1024, seed=1337)
    x, y = loader.batch(1000)

Position p of a mixture's run is sequence n of source s (see mixture.py), and that is window n in
the order in which a ShardLoader goes through s, epoch after epoch. So a batch of a mixture is a
pure function of the step too, and nothing of it has to be saved.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.tokens.formats import token_files
from pretrain.tokens.shards import (
    Manifest,
    ShardError,
    data_fingerprint,
    find_shards,
    open_shard,
    shard_tokens,
    verify_shard,
)
from pretrain.train.loader import BatchLoader, ShardLoader, TokenWindows
from pretrain.train.mixture import MixtureSchedule, MixtureSource, parse_mixture

COUNTED_TOKENS = 10**8  # takes half a second
VERIFIED_BYTES = 2 * 10**9  # data up to this size is hashed whenever a run starts: a second per GB


class MixtureLoader(BatchLoader):
    """Batches from several folders, each of them shuffled through epochs of its own."""

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        paths: Mapping[str, Sequence[Path]],
        *,
        seed: int = 1337,
        shuffle: bool = True,
        stride: int | None = None,
        vocab_size: int = 2**16,
        **batch: Any,
    ):
        """paths: the shards of each source. batch: the arguments of BatchLoader. Raises ShardError
        like ShardLoader and MixtureError like MixtureSchedule."""
        super().__init__(**batch)
        self.schedule = MixtureSchedule(sources, self.global_batch)
        self.stride = stride or self.block_size
        self._parts = {
            source.name: ShardLoader(
                paths[source.name],
                seed=_seed_of(seed, source.name),
                shuffle=shuffle,
                stride=stride,
                vocab_size=vocab_size,
                **batch,
            )
            for source in sources
        }

    @property
    def parts(self) -> Mapping[str, ShardLoader]:
        return self._parts

    def read(self, positions: np.ndarray) -> np.ndarray:
        sources, numbers = self.schedule.pick(positions)
        tokens = np.empty((len(positions), self.block_size + 1), np.uint16)
        for source, part in enumerate(self._parts.values()):
            here = np.flatnonzero(sources == source)
            if len(here):
                tokens[here] = part.read(numbers[here])
        return tokens

    def read_ahead(self, position: int, pools: int) -> None:
        taken = self.schedule.taken(position).tolist()
        for number, part in zip(taken, self._parts.values(), strict=True):
            part.read_ahead(number, pools)

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        taken = self.schedule.taken(step * self.global_batch).tolist()
        return {
            name: {"tokens": count * self.block_size, "epochs": count / len(part.windows)}
            for (name, part), count in zip(self._parts.items(), taken, strict=True)
        }

    def shares(self, step: int) -> dict[str, float]:
        shares = self.schedule.shares_at(step)
        return dict(zip(self._parts, map(float, shares), strict=True))


def _seed_of(seed: int, name: str) -> int:
    """Of a source's order: by its name, so that two copies of one text are not read in step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


class TrainingData:
    """The folders of a run; mixture: its sources by name, none for a single folder."""

    def __init__(self, data_dir: str | Sequence[str]):
        """data_dir: a folder, or NAME=FOLDER:WEIGHT for each source. The sources are sorted, so
        that the order of batches does not depend on the order in which they are named."""
        sources = [] if isinstance(data_dir, str) else parse_mixture(data_dir)
        self.mixture = sorted(sources, key=lambda source: source.name)
        self.folders = {source.name: source.folder for source in self.mixture}
        if isinstance(data_dir, str):
            self.folders = {"": data_dir}

    def verify(self, wanted: bool | None, rank: int, world_size: int) -> None:
        """verify_data of every folder. Raises ShardError."""
        for folder in self.folders.values():
            verify_data(folder, wanted, rank, world_size)

    def fingerprints(self) -> dict[str, str]:
        """{source: data_fingerprint of its folder}. Raises ShardError."""
        return {name: data_fingerprint(folder) for name, folder in self.folders.items()}

    def refuse_different(self, fingerprints: Sequence[Mapping[str, str]]) -> None:
        """Raise ShardError where a folder is not the same for all ranks, whose fingerprints these
        are."""
        for name, folder in self.folders.items():
            refuse_different_data(folder, [found[name] for found in fingerprints])

    def identity(self) -> dict[str, str]:
        """What no part of a run may change, in words: shards, and of a mixture names and shares."""
        found = {name: digest[:16] for name, digest in self.fingerprints().items()}
        if not self.mixture:
            return {"data": found[""]}
        schedule = MixtureSchedule(self.mixture, 1)
        steps = zip(schedule.steps, schedule.plans, strict=True)
        shares = [(step, [f"{float(share):.12g}" for share in plan.shares]) for step, plan in steps]
        return {
            f"data {name}": f"{found[name]}, share "
            + ", ".join(f"{part[i]} from step {step}" for step, part in shares)
            for i, name in enumerate(found)
        }

    def fingerprint(self) -> str:
        """64 hexadecimal digits over all of identity()."""
        if not self.mixture:
            return self.fingerprints()[""]
        lines = [
            f"{name} {value}" for name, value in (self.fingerprints() | self.identity()).items()
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def loader(self, **arguments: Any) -> ShardLoader | MixtureLoader:
        """The batches to train on; arguments: those of ShardLoader but its paths."""
        paths = {name: find_shards(folder, "train") for name, folder in self.folders.items()}
        if self.mixture:
            return MixtureLoader(self.mixture, paths, **arguments)
        return ShardLoader(paths[""], **arguments)

    def validation(self, **arguments: Any) -> dict[str, TokenWindows]:
        """{source: windows of its val shards}; arguments: those of TokenWindows but its paths."""
        return {
            name: TokenWindows(find_shards(folder, "val"), **arguments)
            for name, folder in self.folders.items()
        }


def describe_data(data: TrainingData, loader: BatchLoader, max_iters: int) -> dict[str, Any]:
    """The data in numbers, for config.json, the log and the console. Of a mixture, "sources" has
    those of each, "epochs" being how often it was used when the run ends, and unigram_entropy is
    the mean over sources by their first shares."""
    parts, shares = loader.parts, loader.shares(0)
    entropies = {name: unigram_entropy(part.windows.paths) for name, part in parts.items()}
    known = [entropy for entropy in entropies.values() if entropy is not None]
    entropy = None
    if len(known) == len(parts):
        entropy = sum(
            shares.get(name, 1.0) * value for name, value in zip(parts, known, strict=True)
        )
    found = {
        "steps_per_epoch": loader.steps_per_epoch,
        "train_shards": sum(len(part.windows.paths) for part in parts.values()),
        "train_tokens": sum(part.windows.num_tokens for part in parts.values()),
        "unigram_entropy": entropy,
    }
    if not data.mixture:
        return found
    at_end = loader.progress(max_iters)
    sources = {
        source.name: {
            "folder": source.folder,
            "share": shares[source.name],
            "shares_later": {
                step: loader.shares(step)[source.name]
                for step in sorted({step for s in data.mixture for step, _ in s.weights} - {0})
            },
            "shards": len(parts[source.name].windows.paths),
            "tokens": parts[source.name].windows.num_tokens,
            "unigram_entropy": entropies[source.name],
            "epochs": at_end[source.name]["epochs"],
        }
        for source in data.mixture
    }
    return found | {"sources": sources}


def unigram_entropy(paths: Sequence[Path]) -> float | None:
    """Entropy in nats of the token frequencies of some shards; None for more than COUNTED_TOKENS
    tokens.

    It is what a model that knows these frequencies and nothing else pays per token there, so a loss
    clearly below it shows that the context is used.
    """
    if sum(map(shard_tokens, paths)) > COUNTED_TOKENS:
        return None
    shards = [open_shard(path) for path in paths]
    counts = np.sum([np.bincount(shard, minlength=2**16) for shard in shards], axis=0)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def verify_data(
    data_dir: str | Path, wanted: bool | None, rank: int = 0, world_size: int = 1
) -> None:
    """Read through this rank's share of a folder's shards. Raises ShardError for the first that is
    damaged.

    wanted: True, False, or None for folders of up to VERIFIED_BYTES. Manifests give the hashes to
    compare; without one only headers and ids are checked.
    """
    manifest = Manifest.load(data_dir)
    expected = {shard.file: shard for shard in manifest.shards} if manifest else {}
    paths = sorted(token_files(Path(data_dir)))
    paths = [path for path in paths if not manifest or path.name in expected]
    if wanted is None:
        wanted = sum(path.stat().st_size for path in paths) <= VERIFIED_BYTES
    for path in paths[rank::world_size] if wanted else ():
        verify_shard(path, expected.get(path.name))


def refuse_different_data(data_dir: str | Path, fingerprints: Sequence[str]) -> None:
    """Raise ShardError where the folder is not the same for all ranks, whose fingerprints of it
    (see data_fingerprint) these are: machines with a disk each may hold different shards."""
    others = [rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]]
    if others:
        raise ShardError(
            f"{data_dir}: on the machine of rank {others[0]} it holds other shards than on that of"
            " rank 0; copy one folder to all machines"
        )
