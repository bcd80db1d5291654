"""Token files of this project and of others: .npy, llm.c's .bin, nanoGPT's .bin.

    token_files(Path("data/fineweb"), "train")   # [data/fineweb/fineweb_train_000001.npy, ...]

    .npy    NumPy's format, version 1.0, 1-D little-endian uint16: ours, and build-nanogpt's
    .bin    llm.c and modded-nanogpt: 256 int32 (magic 20240520, version 1, number of tokens,
            zeros), then uint16
    .bin    nanoGPT: uint16 and nothing else, in files named train.bin and val.bin

A folder holds one of these, or the first of them counts. Their names tell validation from training:
`<name>_<val|train>_<index>.npy` or `.bin`, and `val.bin`, `train.bin`.
"""

import io
import re
from pathlib import Path
from typing import IO

import numpy as np

from pretrain.tokens.manifest import NAME_PATTERN, ShardError

TOKEN = np.dtype("<u2")
BARE_PATTERN = re.compile(r"(?P<split>val|train)\.bin")

BIN_MAGIC, BIN_VERSION = 20240520, 1
# What others' .bin files begin with that hold no GPT-2 tokens (llm.c's llmc/ and dev/data/).
OTHER_MAGICS = {
    20240801: "Llama 3 tokens of llm.c, uint32",
    20240326: "a model of llm.c",
    20240522: "evaluation examples of llm.c",
}


def shard_header(tokens: int, ending: str = "npy") -> bytes:
    """What stands before `tokens` little-endian uint16: for "npy" the header (version 1.0) that
    np.save writes, for "bin" llm.c's."""
    if ending == "bin":
        numbers = np.zeros(256, "<i4")
        numbers[:3] = BIN_MAGIC, BIN_VERSION, tokens
        return numbers.tobytes()
    file = io.BytesIO()
    description = {"descr": TOKEN.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def shard_bytes(name: str, tokens: int) -> int:
    """The size of a shard with so many tokens."""
    return len(shard_header(tokens, name.rpartition(".")[2])) + TOKEN.itemsize * tokens


def read_bin_header(path: Path, file: IO[bytes], size: int) -> tuple[int, int]:
    """(byte at which the tokens begin, number of tokens) of an open .bin file of `size` bytes.

    Raises ShardError for what is cut short or of another kind, OSError.
    """
    start = np.frombuffer(file.read(1024), np.uint8)
    numbers = start[: len(start) // 4 * 4].view("<i4")
    magic = int(numbers[0]) if len(numbers) else 0
    if magic in OTHER_MAGICS:
        raise ShardError(
            f"{path}: {OTHER_MAGICS[magic]}; tokens are shards of .npy, llm.c's GPT-2 .bin or "
            "nanoGPT's train.bin"
        )
    if magic != BIN_MAGIC:
        return _read_bare(path, size)
    if len(numbers) < 256 or numbers[1] != BIN_VERSION:
        found = f"version {numbers[1]}" if len(numbers) > 1 else "a header that is cut short"
        raise ShardError(f"{path}: {found}; version {BIN_VERSION} of llm.c's .bin is read here")
    count = int(numbers[2])
    if size != 1024 + 2 * count:
        raise ShardError(
            f"{path}: its header says {count:,} tokens, its size {(size - 1024) / 2:,.1f}: cut "
            "short, or still being written; get it again"
        )
    return 1024, count


def _read_bare(path: Path, size: int) -> tuple[int, int]:
    if not BARE_PATTERN.fullmatch(path.name):
        raise ShardError(
            f"{path}: does not begin as a .bin shard of llm.c does; files without a header are "
            "read under nanoGPT's names, train.bin and val.bin"
        )
    if size % 2:
        raise ShardError(f"{path}: an odd number of bytes, {size:,}, is no row of uint16")
    return 0, size // 2


def token_files(folder: Path, split: str | None = None) -> list[Path]:
    """The token files of a folder, of one split or of both, by name and index: the .npy ones; where
    there is none llm.c's .bin, and then nanoGPT's. Raises OSError as listing a folder does."""
    found: dict[str, list] = {"npy": [], "bin": [], "bare": []}
    for path in folder.iterdir() if folder.is_dir() else ():
        if parts := NAME_PATTERN.fullmatch(path.name):
            place = (parts["name"], int(parts["index"]), path.name, parts["split"], path)
            found[parts["ending"]].append(place)
        elif BARE_PATTERN.fullmatch(path.name):
            found["bare"].append(("", 0, path.name, path.stem, path))
    first = next((files for files in found.values() if files), [])
    return [path for *_, here, path in sorted(first) if split in (None, here)]
