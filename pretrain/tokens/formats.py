"""Token files of this project and of others, as arrays: .npy, llm.c's .bin, nanoGPT's .bin.

    tokens = open_tokens("data/fineweb_train_000001.bin")   # (tokens,) uint16, mapped, not read

    .npy    NumPy's format, version 1.0, 1-D little-endian uint16: ours, and build-nanogpt's
    .bin    llm.c and modded-nanogpt: 256 int32 (magic 20240520, version 1, number of tokens,
            zeros), then uint16
    .bin    nanoGPT: uint16 and nothing else, in files named train.bin and val.bin

A folder holds one of these. Their names tell validation from training:
`<name>_<val|train>_<index>.npy` or `.bin`, and `val.bin`, `train.bin`.
"""

import io
import os
import re
from pathlib import Path

import numpy as np

from pretrain.errors import UserError, first_line

TOKEN = np.dtype("<u2")
NAME_PATTERN = re.compile(r"(?P<name>.+)_(?P<split>val|train)_(?P<index>\d+)\.(?P<ending>npy|bin)")
BARE_PATTERN = re.compile(r"(?P<split>val|train)\.bin")
FORMATS = ("npy", "bin")  # that fineweb.py writes

BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, np.dtype(("<i4", 256))
# What others' .bin files begin with that hold no GPT-2 tokens (llm.c's llmc/ and dev/data/).
OTHER_MAGICS = {
    20240801: "Llama 3 tokens of llm.c, uint32",
    20240326: "a model of llm.c",
    20240522: "evaluation examples of llm.c",
}


class TokenFileError(UserError, ValueError):
    """A file that holds no tokens that can be read here; one line for the user."""


def header(ending: str, tokens: int) -> bytes:
    """What stands before `tokens` uint16 in a shard, for `ending` "npy" or "bin"."""
    if ending == "bin":
        numbers = np.zeros(256, "<i4")
        numbers[:3] = BIN_MAGIC, BIN_VERSION, tokens
        return numbers.tobytes()
    file = io.BytesIO()
    description = {"descr": TOKEN.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def open_tokens(path: str | Path) -> np.ndarray:
    """Map a token file read-only: (tokens,) uint16.

    Raises TokenFileError for what is cut short, empty or of another kind, and OSError, such as
    FileNotFoundError or PermissionError, where the system does not let it be read.
    """
    path = Path(path)
    tokens = _open_bin(path) if path.suffix == ".bin" else _open_npy(path)
    if len(tokens) == 0:
        raise TokenFileError(f"{path}: no tokens in it; build it again with fineweb.py")
    return tokens


def _open_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _not_npy(path, error) from None
    except Exception as error:  # numpy evaluates the header: a damaged one raises anything
        raise _not_npy(path, error) from None
    if not isinstance(tokens, np.memmap):
        raise _not_npy(path, "an archive of arrays")
    spare = os.path.getsize(path) - (tokens.offset + tokens.nbytes)
    if tokens.dtype != TOKEN or tokens.ndim != 1 or spare:
        raise TokenFileError(
            f"{path}: expected 1-D uint16 and nothing behind it, got {tokens.dtype} "
            f"{tokens.shape} and {spare} further bytes; build it again with fineweb.py"
        )
    return tokens.view(np.ndarray)


def _not_npy(path: Path, error: Exception | str) -> TokenFileError:
    reason = error if isinstance(error, str) else first_line(error)
    return TokenFileError(
        f"{path}: not a whole .npy file ({reason}); build it again with fineweb.py"
    )


def _open_bin(path: Path) -> np.ndarray:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = np.frombuffer(file.read(1024), np.uint8)
    numbers = start[: len(start) // 4 * 4].view("<i4")
    magic = int(numbers[0]) if len(numbers) else 0
    if magic in OTHER_MAGICS:
        raise TokenFileError(
            f"{path}: {OTHER_MAGICS[magic]}; tokens are shards of .npy, llm.c's GPT-2 .bin or "
            "nanoGPT's train.bin"
        )
    if magic != BIN_MAGIC:
        return _open_bare(path, size)
    if len(numbers) < 256 or numbers[1] != BIN_VERSION:
        found = f"version {numbers[1]}" if len(numbers) > 1 else "a header that is cut short"
        raise TokenFileError(f"{path}: {found}; version {BIN_VERSION} of llm.c's .bin is read here")
    count = int(numbers[2])
    if size != 1024 + 2 * count:
        raise TokenFileError(
            f"{path}: its header says {count:,} tokens, its size {(size - 1024) / 2:,.1f}: cut "
            "short, or still being written; get it again"
        )
    return np.memmap(path, TOKEN, "r", 1024, (count,)).view(np.ndarray) if count else _nothing()


def _open_bare(path: Path, size: int) -> np.ndarray:
    if not BARE_PATTERN.fullmatch(path.name):
        raise TokenFileError(
            f"{path}: does not begin as a .bin shard of llm.c does; files without a header are "
            "read under nanoGPT's names, train.bin and val.bin"
        )
    if size % 2:
        raise TokenFileError(f"{path}: an odd number of bytes, {size:,}, is no row of uint16")
    return np.memmap(path, TOKEN, "r").view(np.ndarray) if size else _nothing()


def _nothing() -> np.ndarray:
    return np.zeros(0, TOKEN)  # an empty file cannot be mapped


def token_files(folder: Path, split: str | None = None) -> list[Path]:
    """The token files of a folder, of one split or of both, in the order of their index (nanoGPT's
    have none) and name. Raises TokenFileError where formats are mixed, OSError as listing does."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        parts = NAME_PATTERN.fullmatch(path.name)
        bare = None if parts else BARE_PATTERN.fullmatch(path.name)
        if parts or bare:
            name, index = (parts["name"], int(parts["index"])) if parts else ("", 0)
            found.append((name, index, path.name, (parts or bare)["split"], path))
    kinds = {"nanoGPT's" if not name else path.suffix for name, _, _, _, path in found}
    if len(kinds) > 1:
        raise TokenFileError(
            f"{folder}: token files of different kinds ({', '.join(sorted(kinds))}); keep one kind "
            "in a folder"
        )
    return [path for *_, here, path in sorted(found) if split in (None, here)]
