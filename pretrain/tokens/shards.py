"""Shards: the token files that the three stages share.

    paths = find_shards("data/input", "train")     # [data/input/input_train_000001.npy, ...]
    tokens = open_shard(paths[0])                  # (tokens,) uint16, mapped, not read

A shard is a `.npy` file (version 1.0 header, 1-D little-endian uint16),
`<name>_<split>_<index:06d>.npy`. Folders that others' scripts wrote in this layout, and others'
`.bin` files, open too (see formats.py): a manifest is needed only to resume and to verify.
"""

import contextlib
import hashlib
import math
import os
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from pretrain.errors import first_line, reason
from pretrain.files import atomic_write, temporary_name
from pretrain.tokens.formats import (
    TOKEN,
    read_bin_header,
    shard_bytes,
    shard_header,
    token_files,
)
from pretrain.tokens.manifest import (
    MANIFEST,
    NAME_PATTERN,
    SPLITS,
    Manifest,
    Shard,
    ShardError,
    open_regular,
)
from pretrain.tokens.shard_cache import bring, bring_ahead, cached_tokens, is_cache

__all__ = [
    "DEFAULT_DATA_DIR",
    "MANIFEST",
    "NAME_PATTERN",
    "Manifest",
    "Shard",
    "ShardError",
    "bring_ahead",
    "data_fingerprint",
    "find_shards",
    "open_shard",
    "verify_shard",
]

# What `python fineweb.py` writes and train_gpt2.py reads.
DEFAULT_DATA_DIR = "data/fineweb-edu-sample-10BT"
TOKEN_LIMIT = 50257  # GPT-2's vocabulary: ids are below it
BLOCK_BYTES = 4 << 20  # read at a time while hashing


def shard_name(name: str, split: str, index: int, ending: str = "npy") -> str:
    return f"{name}_{split}_{index:06d}.{ending}"


class ShardWriter:
    """Writes one shard under a temporary name; `close` makes it durable and gives it its own.

    `tokens` is the expected number of tokens. Fewer may be written: `close` then corrects the
    header. Raises OSError, and then nothing of the shard remains.
    """

    def __init__(self, path: Path, tokens: int):
        self.path, self.expected, self.tokens = path, tokens, 0
        self.ending = path.suffix.removeprefix(".")
        self.sha256, self.hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        self._ending = contextlib.ExitStack()
        self._ending.callback(self.hasher.shutdown)
        with self._cleaned_up():
            self.file = self._ending.enter_context(atomic_write(path))
            self._write(shard_header(tokens, self.ending))

    @contextlib.contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Whatever is raised here takes the unfinished file with it."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(type(error)):  # atomic_write raises it again
                self._ending.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, OSError) and not error.filename:  # one of a handle names no file
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            raise

    def _write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        hashing = self.hasher.submit(self.sha256.update, view)  # beside the writing: both take long
        try:
            self.file.write(view)
        finally:
            hashing.result()

    def write(self, tokens: np.ndarray) -> None:
        """Append `tokens`, (n,) uint16."""
        with self._cleaned_up():
            self._write(np.ascontiguousarray(tokens, dtype=TOKEN))
        self.tokens += len(tokens)

    def close(self, expected_sha256: str | None = None) -> str:
        """Finish the file, fsync it, rename it; returns the SHA-256 of its bytes in hexadecimal.

        With another SHA-256 than the expected one ShardError is raised, and nothing remains.
        """
        with self._cleaned_up():
            if self.tokens != self.expected:
                self.file.seek(0)
                self.file.write(shard_header(self.tokens, self.ending))
                self.file.flush()
                with open(temporary_name(self.path), "rb") as written:
                    self.sha256 = hashlib.file_digest(written, "sha256")  # type: ignore[assignment]
            digest = self.sha256.hexdigest()
            if expected_sha256 and digest != expected_sha256:
                raise ShardError(
                    f"{self.path}: made again from its documents, it is not what {MANIFEST} "
                    "records; were they changed? Restore them or the shard, or remove the folder "
                    "and build it again"
                )
            self._ending.close()
        return digest

    def abort(self) -> None:
        """Give up: nothing of this shard remains."""
        with contextlib.suppress(_Abandoned), self._cleaned_up():
            raise _Abandoned


class _Abandoned(Exception):
    """Ends the writing of a shard that is not wanted."""


def read_blocks(file: Any) -> Iterator[memoryview]:
    """The rest of an open file in blocks that share one buffer: use each before taking the next."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(buffer):
        yield buffer[:count]


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A shard's file. What the system refuses is said as it is: it tells nothing of the shard."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise ShardError(f"{path}: no such shard; build it again with fineweb.py") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {reason(error)}") from None


def open_shard(path: str | Path) -> np.ndarray:
    """Map a shard read-only: (tokens,) uint16. ShardError if it is missing, torn, empty, something
    else, or cannot be read."""
    bring(Path(path))
    with _opened(path) as file:
        if Path(path).suffix == ".bin":
            at, count = read_bin_header(Path(path), file, os.fstat(file.fileno()).st_size)
            if count < 1:
                raise ShardError(f"{path}: no tokens in it; build it again with fineweb.py")
            return np.memmap(file, TOKEN, "r", at, (count,)).view(np.ndarray)
        shape, dtype = _read_header(path, file)
        at = file.tell()
        spare = os.fstat(file.fileno()).st_size - at - dtype.itemsize * math.prod(shape)
        if dtype != TOKEN or len(shape) != 1 or shape[0] < 1 or spare:
            raise ShardError(
                f"{path}: expected 1-D uint16 and nothing behind it, got {dtype} "
                f"{shape} and {spare} further bytes; build it again with fineweb.py"
            )
        return np.memmap(file, TOKEN, "r", at, shape).view(np.ndarray)


def shard_tokens(path: str | Path) -> int:
    """How many tokens a shard has, which is not brought here for that. Raises like open_shard."""
    known = cached_tokens(Path(path))
    return len(open_shard(path)) if known is None else known


def _read_header(path: str | Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an open .npy file, read up to its data. Raises ShardError, OSError."""
    formats = np.lib.format
    read = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
    try:
        version = formats.read_magic(file)
        if version not in read:
            raise ValueError(f"format version {version}")
        shape, _, dtype = read[version](file)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header, and a damaged one raises anything
        raise ShardError(
            f"{path}: not a whole .npy file ({first_line(error)[:200]}); build it again with "
            "fineweb.py"
        ) from None
    return shape, dtype


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of `split` ("train" or "val") in order: those of the manifest, or by file name
    without one.

    ShardError when the folder holds none, or when one that the manifest lists is missing.
    """
    assert split in SPLITS, split
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if manifest:
        paths = [folder / shard.file for shard in manifest.shards if shard.split == split]
        missing = [path.name for path in paths if not path.exists()]
        if missing and not is_cache(folder):
            raise ShardError(
                f"{folder}: {', '.join(missing)} listed in {MANIFEST} but missing; restore, or "
                "run the command that made the folder again: it makes them anew"
            )
    else:
        paths = token_files(folder, split)
    if not paths:
        state = "no such folder" if not folder.is_dir() else f"no {split} shards here"
        command = "python fineweb.py" + (
            "" if folder == Path(DEFAULT_DATA_DIR) else f" --out_dir {shlex.quote(str(folder))}"
        )
        raise ShardError(
            f"{folder}: {state}; make them with: {command} (its --help tells from what)"
        )
    return paths


def data_fingerprint(folder: str | Path) -> str:
    """A hash (64 hexadecimal digits) that changes when the folder's shards do.

    Over names, tokens and content hashes where there is a manifest; without one over names, sizes
    and the first and last 64 KiB of each shard, which is quick at any size.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if manifest and manifest.shards:
        lines = [f"{shard.file} {shard.tokens} {shard.sha256}" for shard in manifest.shards]
    else:
        lines = [_sample_line(path) for path in sorted(token_files(folder))]
        if not lines:
            find_shards(folder, "train")  # says what is wrong with the folder
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sample_line(path: Path, sample_bytes: int = 64 << 10) -> str:
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(sample_bytes)
        file.seek(max(0, size - sample_bytes))
        tail = file.read(sample_bytes)
    return f"{path.name} {size} {hashlib.sha256(head + tail).hexdigest()}"


def has_size(path: Path, tokens: int) -> bool:
    """Whether a file is there and has the size of a shard with so many tokens. Raises OSError."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return False
    return path.is_file() and size == shard_bytes(path.name, tokens)


def verify_shard(path: str | Path, expected: Shard | None = None) -> None:
    """Read a shard through: header, size, ids below 50257, what `expected` records. ShardError if
    damaged."""
    tokens = open_shard(path)
    digest, largest = hashlib.sha256(), 0
    with _opened(path) as file:
        digest.update(file.read(os.fstat(file.fileno()).st_size - tokens.nbytes))
        for block in read_blocks(file):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, TOKEN, len(block) // 2).max(initial=0)))
    if largest >= TOKEN_LIMIT:
        raise ShardError(f"{path}: holds id {largest}; GPT-2's are below {TOKEN_LIMIT}")
    if expected and len(tokens) != expected.tokens:
        raise ShardError(f"{path}: {len(tokens):,} tokens where {MANIFEST} has {expected.tokens:,}")
    if expected and digest.hexdigest() != expected.sha256:
        raise ShardError(
            f"{path}: its SHA-256 is not the one in {MANIFEST}: its content has changed"
        )
