"""Weights from files: the only place where a saved or foreign file is opened, safely.

    saved = read("checkpoints/best_val_loss.pt")        # a dict of tensors and plain values

Nothing from a file is executed, and no file costs more than its size says: what it declares is
compared with what it holds before anything is made of it. Damaged is raised for what a file holds;
its message lacks the file's name, which the caller knows. What the system says about a file
(OSError) is passed on as it is: a file that cannot be read is not damaged.
"""

import errno
import io
import json
import os
import pickle
import pickletools
import re
import stat
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pretrain.errors import UserError, first_line

BEST, FINAL = "best_val_loss.pt", "final_model.pt"  # in the folder of a run
SAFETENSORS, SHARDS, PICKLE, PICKLES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_PICKLE_BYTES = 8 << 20  # beside the tensors; that of GPT-2 XL with its optimizer has 0.2 MB
MAX_JSON_BYTES = 4 << 20
# What torch.save writes for tensors and plain values. torch would admit more, for instance
# bytearray, of which 30 bytes in a file make 3 GB in memory.
PLAIN = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)"
    r"|torch\.((?!Untyped|Typed)[A-Z]\w*Storage|b?float\d+|u?int\d+|bool|Size|device)"
    r"|(builtins|__builtin__)\.(set|complex)"
)
NUMPY = re.compile(r"numpy\.(_?core\.multiarray\.scalar|dtype)|_codecs\.encode")
NUMPY_FORMATS = {"f8": "d", "f4": "f", "f2": "e", "b1": "?", "i8": "q", "i4": "i", "i2": "h"} | {
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
}
CONFIG = re.compile(r"[\w.]+\.GPTConfig")  # build-nanogpt pickles its configuration


class Damaged(UserError, ValueError):
    """What a file holds is no good; the message lacks its name."""


def model_file(path: str | Path) -> Path:
    """The file to read when somebody names this path: itself, or in the folder of a run its best
    checkpoint, else its last. Raises Damaged when neither is there."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in (BEST, FINAL) if (path / name).is_file()), None)
    if found is None:
        raise Damaged(f"no such file in this folder: {BEST}, or {FINAL}")
    return found


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds weights as Hugging Face's libraries save them."""
    names = (SAFETENSORS, SHARDS, PICKLE, PICKLES)
    return any((folder / name).is_file() for name in names)


# ---- torch.save's files


def read(path: str | Path, *, verify: bool = True, allowed: Collection[Any] = ()) -> Any:
    """What torch.save wrote: tensors on the CPU, mapped from the file.

    verify: compare the checksums that torch.save stored, at 1 to 2 GB/s; torch.load alone does not
    notice a flipped bit. allowed: types and functions that the pickle may name besides, and that
    are loaded as themselves: those of arrays, say. Otherwise NumPy's scalars become Python's, and a
    GPTConfig at the top level a dict. Raises Damaged, OSError.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4)
        file.seek(0)
        try:
            is_zip = head == b"PK\x03\x04"  # torch.save's format since 1.6
            if is_zip:
                names = _globals(io.BytesIO(_pickle_in_zip(file, size, verify)), allowed)
            elif head[:1] == pickle.PROTO:
                names = _globals_of_old_format(file, allowed)
            else:
                raise Damaged("damaged at its beginning, or not a file of torch.save")
            if allowed:
                with torch.serialization.safe_globals(list(allowed)):
                    return _load(path, set(), is_zip)
            return _plain(_load(path, names, is_zip))
        except (Damaged, MemoryError):
            raise
        except OSError as error:
            # Offsets in a damaged archive lead before its beginning.
            if error.errno not in (None, errno.EINVAL):
                raise
            raise Damaged(f"damaged or cut short ({first_line(error)})") from None
        except pickle.UnpicklingError as error:
            raise Damaged(
                f"damaged, or it holds more than tensors and plain values ({first_line(error)})"
            ) from None
        except Exception as error:  # zipfile and torch raise all kinds on damaged files
            _refuse_blame(path, error)
            raise Damaged(f"damaged or cut short ({first_line(error)})") from None


def opened(path: str | Path) -> IO[bytes]:
    """A file open for reading. Raises Damaged for a pipe, a device and the like, which are not even
    opened: that could wait for ever. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Damaged("a folder" if os.path.isdir(path) else "not a regular file")
    return open(path, "rb")


def _refuse_blame(path: str | Path, error: Exception) -> None:
    """Raise what the system has to say, where torch hides it in a RuntimeError of its own."""
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO, errno.ESTALE):
        if os.strerror(number) in str(error):
            raise OSError(number, os.strerror(number), str(path)) from None
    if "can't allocate memory" in str(error):  # torch's own allocator
        raise MemoryError(first_line(error)) from None


def _load(path: str | Path, names: set[str], is_zip: bool) -> Any:
    """torch.load, the only one, of a file whose pickle names nothing but PLAIN, NUMPY, CONFIG."""
    stand_ins: list[Any] = [(_Config, name) for name in names if CONFIG.fullmatch(name)]
    for name in names:
        if name.endswith("multiarray.scalar"):
            stand_ins.append((_numpy_scalar, name))
        if name == "numpy.dtype":
            stand_ins.append((_NumpyType, name))
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _pickle_in_zip(file: IO[bytes], size: int, verify: bool) -> bytes:
    """The pickle of torch.save's archive, in which everything is stored as it is."""
    file.seek(max(0, size - (1 << 16) - 64))
    file.read()  # zipfile would take what the system says here for damage
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Damaged("a zip archive, but none of torch.save: it has not one data.pkl")
        if any(part.flag_bits & 1 for part in parts):
            raise Damaged("an encrypted archive, which torch.save never writes")
        if any(part.compress_type or part.file_size != part.compress_size for part in parts):
            raise Damaged("a compressed archive, which torch.save never writes; save it again")
        if sum(part.file_size for part in parts) > size:
            raise Damaged("its parts claim to be larger than the file")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise Damaged(_too_much(pickles[0].file_size))
        if verify and (damaged := archive.testzip()):
            raise Damaged(f"damaged: {damaged} fails its checksum")
        return archive.read(pickles[0])


def _globals_of_old_format(file: IO[bytes], allowed: Collection[Any]) -> set[str]:
    """torch.save before 1.6: magic number, version, machine, the object, keys of its tensors."""
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    return set().union(*(_globals(head, allowed) for _ in range(5)))


def _globals(file: IO[bytes], allowed: Collection[Any]) -> set[str]:
    """Dotted names that a pickle refers to, read without executing it. Raises Damaged for one that
    tensors and plain values have no use for."""
    names, strings = set(), set()
    known = {_name(each) for each in allowed}
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            names.add(str(argument).replace(" ", "."))
        elif isinstance(argument, str):
            strings.add(argument.lower()[:64])
    for name in sorted(names):
        if name not in known and not any(kind.fullmatch(name) for kind in (PLAIN, NUMPY, CONFIG)):
            raise Damaged(
                f"it holds {name[:80]}, more than tensors and plain values, which is refused"
                " because loading it could run code; save its weights alone, as a dict"
            )
    # The codecs whose time grows with the square of a text's length.
    if "_codecs.encode" in names and any("punycode" in s or "idna" in s for s in strings):
        raise Damaged("it holds text in an encoding that tensors and numbers have no use for")
    return names


def _name(allowed: Any) -> str:
    """As a pickle names it: torch's safe_globals take (what, name) where that is another name."""
    if isinstance(allowed, tuple):
        return str(allowed[1])
    return f"{allowed.__module__}.{allowed.__qualname__}"


def _too_much(size: int) -> str:
    return (
        f"{size / 1e6:.0f} MB beside its tensors, more than a checkpoint has"
        f" ({MAX_PICKLE_BYTES / 1e6:.0f} MB at most)"
    )


class _Config:
    """Stands in for a GPTConfig of any module: its attributes, and none of its code."""


class _NumpyType:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str = "", *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_scalar(dtype: _NumpyType, data: bytes) -> float | int | bool:
    """Stands in for numpy.core.multiarray.scalar, by which NumPy pickles its numbers."""
    return struct.unpack(dtype.order + NUMPY_FORMATS[dtype.code], data)[0]


def _plain(saved: Any) -> Any:
    if not isinstance(saved, dict):
        return saved
    return {k: dict(vars(v)) if isinstance(v, _Config) else v for k, v in saved.items()}


# ---- JSON and safetensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size. Raises Damaged, OSError."""
    with opened(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise Damaged(f"its {path.name} has more than {MAX_JSON_BYTES / 1e6:.0f} MB")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its {path.name} is no JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise Damaged(f"its {path.name} holds a {type(value).__name__}, not an object")
    return value


def read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    opened(file).close()  # the system's own words, where it does not hand it out
    try:
        return load_file(file)
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise Damaged(f"{file} is damaged or cut short ({first_line(error)})") from None


def shown(value: Any) -> str:
    """A value from a file, for a message: never long, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more than 4300 digits, deep nesting
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
