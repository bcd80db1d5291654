"""Shards: the token files that the three stages share, and the manifest that says which of them
exist.

    paths = find_shards("data/input", "train")     # [data/input/input_train_000001.npy, ...]
    tokens = open_shard(paths[0])                  # (tokens,) uint16, mapped, not read

A shard is a `.npy` file (version 1.0 header, 1-D little-endian uint16),
`<name>_<split>_<index:06d>.npy`. Folders that others' scripts wrote in this layout open too: a
manifest is needed only to resume and to verify.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DEFAULT_DATA_DIR = (
    "data/fineweb-edu-sample-10BT"  # what `python fineweb.py` writes, what train_gpt2.py reads
)
MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
TOKEN = np.dtype("<u2")
TOKEN_LIMIT = 50257  # GPT-2's vocabulary: ids are below it
SPLITS = ("val", "train")
NAME_PATTERN = re.compile(r"(?P<name>.+)_(?P<split>val|train)_(?P<index>\d+)\.npy")
BLOCK_BYTES = 4 << 20  # read at a time while hashing


class ShardError(ValueError):
    """A shard, a folder of shards or a manifest that cannot be used; the message is one line for
    the user."""


@dataclass
class Shard:
    """One finished shard, as the manifest records it.

    `documents` counts those that begin in the shard. `first` is where its first token comes from:
    file, row, token within the document. `skipped` counts rows left out before its last document,
    by reason. `token_count` compares the source's own column of that name with the tokens written,
    without end-of-text, for the documents that end in the shard: {"source": 812, "written": 812};
    None where there is no column.
    """

    file: str
    split: str
    tokens: int
    documents: int
    sha256: str  # of the whole file, header included, as `sha256sum` prints it
    first: dict
    skipped: dict = field(default_factory=dict)
    token_count: dict | None = None


@dataclass
class Manifest:
    """What a folder of shards was made from and which it holds; a shard that is not listed does not
    exist."""

    name: str  # prefix of the shards' file names
    source: dict  # where the documents came from, as pretrain.text.documents describes it
    settings: dict  # everything else that decides the shards' bytes
    tokenizer: dict
    val_tokens: int  # size of shard 0; the settings say how it was chosen
    shards: list[Shard] = field(default_factory=list)
    next: dict | None = None  # position at which the next shard begins
    complete: bool = False

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest in one step: a reader finds the old one or the new one,
        whole."""
        record = {
            "format": FORMAT,
            "tokens": self.tokens,
            "documents": self.documents,
            **vars(self),
        }
        text = _readable_json(record | {"shards": [vars(shard) for shard in self.shards]})
        temporary = folder / f"{MANIFEST}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)  # of a save that failed or was interrupted
        sync_folder(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest | None":
        """The folder's manifest, or None where there is none; ShardError for one that cannot be
        trusted."""
        path = Path(folder) / MANIFEST
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("format") != FORMAT:
                raise ShardError(
                    f"{path}: written by another version of this program; use that version, or another folder"
                )
            totals = record.pop("tokens"), record.pop("documents")
            manifest = cls(**{**record, "shards": [Shard(**shard) for shard in record["shards"]]})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ShardError(
                f"{path}: {error.strerror}; make it readable or use another folder"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(
                f"{path}: cannot be read as a manifest ({error!r}); restore it, or remove the "
                "folder and build it again with fineweb.py"
            ) from None
        if totals != (manifest.tokens, manifest.documents):
            raise ShardError(
                f"{path}: its totals {totals} are not the sums over its shards "
                f"{manifest.tokens, manifest.documents}; restore it, or build the folder again"
            )
        for shard in manifest.shards:
            parts = NAME_PATTERN.fullmatch(shard.file)
            if (
                not parts
                or os.path.basename(shard.file) != shard.file
                or parts["split"] != shard.split
            ):
                raise ShardError(f"{path}: {shard.file!r} is not the name of a {shard.split} shard")
        return manifest


def _readable_json(value, level: int = 0) -> str:
    """JSON with a line for each shard and each file: `indent` would take ten, and seconds for
    thousands."""
    inner, outer = "\n" + " " * (level + 1), "\n" + " " * level
    if isinstance(value, dict) and value and level < 2:
        items = (
            f"{json.dumps(key)}: {_readable_json(item, level + 1)}" for key, item in value.items()
        )
        return "{" + inner + f",{inner}".join(items) + outer + "}"
    if isinstance(value, list) and value and level < 3:
        return "[" + inner + f",{inner}".join(json.dumps(item) for item in value) + outer + "]"
    return json.dumps(value)


def shard_name(name: str, split: str, index: int) -> str:
    return f"{name}_{split}_{index:06d}.npy"


def shard_header(tokens: int) -> bytes:
    """The header (version 1.0) of a .npy file with `tokens` little-endian uint16, as np.save writes
    it."""
    file = io.BytesIO()
    description = {"descr": TOKEN.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system lets a folder be opened (Windows does
    not)."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ShardWriter:
    """Writes one shard under a temporary name; `close` makes it durable and gives it its own.

    `tokens` is the expected number of tokens. Fewer may be written: `close` then corrects the
    header.
    """

    def __init__(self, path: Path, tokens: int):
        self.path, self.expected, self.tokens = path, tokens, 0
        self.temporary = path.with_name(f"{path.name}.tmp")
        self.file = open(self.temporary, "w+b", buffering=0)  # noqa: SIM115  closed by close or abort
        self.sha256, self.hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        try:
            self._write(shard_header(tokens))
        except BaseException:
            self.abort()
            raise

    def _write(self, data) -> None:
        view = memoryview(data).cast("B")
        hashing = self.hasher.submit(
            self.sha256.update, view
        )  # beside the writing: both take a while
        try:
            while view:  # unbuffered: a large write may be taken in parts
                view = view[self.file.write(view) :]
        except OSError as error:  # one of a handle names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        finally:
            hashing.result()

    def write(self, tokens: np.ndarray) -> None:
        """Append `tokens`, (n,) uint16."""
        self._write(np.ascontiguousarray(tokens, dtype=TOKEN))
        self.tokens += len(tokens)

    def close(self) -> str:
        """Finish the file, fsync it, rename it; returns the SHA-256 of its bytes in hexadecimal."""
        if self.tokens != self.expected:
            self.file.seek(0)
            self.file.write(shard_header(self.tokens))
            self.file.seek(0)
            self.sha256 = hashlib.sha256()
            for block in read_blocks(self.file):
                self.sha256.update(block)
        os.fsync(self.file.fileno())
        self.file.close()
        self.hasher.shutdown()
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)
        return self.sha256.hexdigest()

    def abort(self) -> None:
        """Give up: nothing of this shard remains."""
        self.file.close()
        self.hasher.shutdown()
        self.temporary.unlink(missing_ok=True)


def read_blocks(file) -> Iterator[memoryview]:
    """The rest of an open file in blocks that share one buffer: use each before taking the next."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(buffer):
        yield buffer[:count]


def open_shard(path: str | Path) -> np.ndarray:
    """Map a shard read-only: (tokens,) uint16. ShardError if it is missing, torn, empty or
    something else."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        spare = os.path.getsize(path) - (tokens.offset + tokens.nbytes)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such shard; build it again with fineweb.py") from None
    except (
        Exception
    ) as error:  # numpy evaluates the header: what a damaged one raises is anybody's guess
        raise ShardError(
            f"{path}: not a whole .npy file ({error}); build it again with fineweb.py"
        ) from None
    if tokens.dtype != TOKEN or tokens.ndim != 1 or len(tokens) == 0 or spare:
        raise ShardError(
            f"{path}: expected 1-D uint16 and nothing behind it, got {tokens.dtype} "
            f"{tokens.shape} and {spare} further bytes; build it again with fineweb.py"
        )
    return tokens.view(np.ndarray)


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
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ShardError(
                f"{folder}: {', '.join(missing)} listed in {MANIFEST} but missing; restore, or "
                "remove the folder and build it again with fineweb.py"
            )
    else:
        found = [(NAME_PATTERN.fullmatch(path.name), path) for path in folder.glob("*.npy")]
        named = [
            (parts["name"], int(parts["index"]), path)
            for parts, path in found
            if parts and parts["split"] == split
        ]
        paths = [path for _, _, path in sorted(named)]
    if not paths:
        state = "no such folder" if not folder.is_dir() else f"no {split} shards here"
        command = "python fineweb.py" + (
            "" if folder == Path(DEFAULT_DATA_DIR) else f" --out_dir {folder}"
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
        paths = [path for path in sorted(folder.glob("*.npy")) if NAME_PATTERN.fullmatch(path.name)]
        lines = [_sample_line(path) for path in paths]
        if not lines:
            find_shards(folder, "train")  # says what is wrong with the folder
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sample_line(path: Path, sample_bytes: int = 64 << 10) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(sample_bytes)
        file.seek(max(0, size - sample_bytes))
        tail = file.read(sample_bytes)
    return f"{path.name} {size} {hashlib.sha256(head + tail).hexdigest()}"


def verify_shard(path: str | Path, expected: Shard | None = None) -> None:
    """Read a shard through: header, size, ids below 50257, what `expected` records. ShardError if
    damaged."""
    tokens = open_shard(path)
    digest, largest = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        digest.update(file.read(os.path.getsize(path) - tokens.nbytes))
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
