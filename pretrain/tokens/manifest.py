"""The manifest of a folder of shards: what it was made from, and which shards it has.

    manifest = Manifest.load("data/input")          # None where there is none
    [shard.file for shard in manifest.shards]       # ["input_val_000000.npy", ...]

A file from outside is not trusted: its size, shape, types, ranges, names and sums are checked
before anything is done with it, and whatever is wrong raises ShardError.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from pretrain.errors import UserError, first_line
from pretrain.files import write_text
from pretrain.text.source import Position

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
LARGEST_BYTES = 128 << 20  # of a manifest: all of FineWeb in shards of 100 million takes 60 MB
LARGEST = 2**63 - 1
SPLITS = ("val", "train")
ENDINGS = ("npy", "bin")  # NumPy's format and llm.c's: see formats.py
NAME_PATTERN = re.compile(
    rf"(?P<name>.+)_(?P<split>val|train)_(?P<index>\d+)\.(?P<ending>{'|'.join(ENDINGS)})"
)


class ShardError(UserError, ValueError):
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
    def ending(self) -> str:
        """Of the shards' names: "npy" or "bin"."""
        return self.settings.get("format", "npy")

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest in one step: a reader finds the old one or the new one,
        whole. Raises OSError."""
        write_text(folder / MANIFEST, self.text())

    def text(self) -> str:
        """As it is written."""
        record = {
            "format": FORMAT,
            "tokens": self.tokens,
            "documents": self.documents,
            **vars(self),
        }
        return _readable_json(record | {"shards": [vars(shard) for shard in self.shards]}) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """The folder's manifest, or None where there is none; ShardError for one that cannot be
        read or trusted."""
        path = Path(folder) / MANIFEST
        try:
            with open_regular(path) as file:
                text = file.read(LARGEST_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = error.strerror or str(error)
            raise ShardError(f"{path}: {problem}; make it readable or use another folder") from None
        try:
            if len(text) > LARGEST_BYTES:
                raise ValueError(f"larger than {LARGEST_BYTES >> 20} MiB")
            record = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
            if b"\\ud" in text.lower():  # half a pair of surrogates is no text: UnicodeEncodeError
                json.dumps(record, ensure_ascii=False).encode()
            _check_record(record)
        except _OtherVersion:
            raise ShardError(
                f"{path}: written by another version of this program; use that version, or another "
                "folder"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"{path}: cannot be read as a manifest ({first_line(error)[:200]}); restore it, or "
                "remove the folder and build it again with fineweb.py"
            ) from None
        kept = {key: record[key] for key in cls.__dataclass_fields__ if key in record}
        return cls(**kept | {"shards": [Shard(**shard) for shard in record["shards"]]})


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file to read its bytes, unbuffered. What is no regular file (a pipe, which would be
    waited for, a folder, a device) raises ShardError. Raises OSError."""
    # O_NONBLOCK: opening a pipe without a writer returns at once; regular files ignore it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ShardError(f"{path}: not a regular file; move it away")
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def _readable_json(value: Any, level: int = 0) -> str:
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


# ---- the schema


Check = Callable[[Any], bool]  # of one value


class _OtherVersion(ValueError):
    """A manifest of a later format."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in it")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_name(value: Any) -> bool:
    """Whether a file can be called so, in the folder itself."""
    return _is_text(value) and 0 < len(value) < 256 and not re.search(r"[/\\:\x00-\x1f]", value)


def _whole(least: int) -> Check:
    # bool is an int to Python, and not to JSON
    return lambda value: type(value) is int and least <= value <= LARGEST


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_whole(0), value.values()))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


AMOUNT, COUNT = _whole(0), _whole(1)
POSITION: dict[str, Check] = {
    "file": AMOUNT,
    "row": AMOUNT,
    "token": AMOUNT,
    "offset": _or_none(AMOUNT),
}
SHARD: dict[str, Check] = {
    "file": _is_name,
    "split": lambda value: value in SPLITS,
    "tokens": COUNT,
    "documents": AMOUNT,
    "sha256": _is_sha256,
    "first": _is_dict,
    "skipped": _counts,
    "token_count": _or_none(lambda value: _counts(value) and set(value) == {"source", "written"}),
}
SETTINGS: dict[str, Check] = {
    "shard_size": COUNT,
    "val_tokens": COUNT,
    "val_fraction": _is_share,
    "max_tokens": COUNT,
    "format": lambda value: value in ENDINGS,
    **dict.fromkeys(("text_column", "dataset", "name", "split", "revision"), _is_text),
}
TOKENIZER: dict[str, Check] = {
    "name": _is_text,
    "vocabulary_sha256": _is_sha256,
    "end_of_text": AMOUNT,
}
SOURCES: dict[str, dict[str, Check]] = {
    "local": {"text_column": _is_text, "files": _is_list},
    "stored": {"text_column": _is_text, "files": _is_list},
    "hub": {
        **dict.fromkeys(("dataset", "config", "split", "commit", "text_column"), _is_text),
        "files": _is_list,
    },
}
FILE: dict[str, Check] = {"path": _is_text, "size": AMOUNT}
RECORD: dict[str, Check] = {
    "format": COUNT,
    "tokens": AMOUNT,
    "documents": AMOUNT,
    "name": _is_name,
    "source": _is_dict,
    "settings": _is_dict,
    "tokenizer": _is_dict,
    "val_tokens": AMOUNT,
    "shards": _is_list,
    "next": _or_none(_is_dict),
    "complete": lambda value: isinstance(value, bool),
}
LATER = {"next", "complete", "skipped", "token_count", "offset"}  # may be missing: see defaults


def _check_fields(value: Any, fields: dict[str, Check], where: str, *, optional: bool) -> None:
    """ValueError for a value that is no dict, has a wrong field, lacks one, or (unless these may
    be missing) has one that is unknown."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}")
    for key, check in fields.items():
        if key not in value:
            if not optional and key not in LATER:
                raise ValueError(f"{where} has no {key}")
        elif not check(value[key]):
            raise ValueError(f"{key} of {where} is {_shown(value[key])}")
    if more := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{where} has an unknown field {_shown(more[0])}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_record(record: Any) -> None:
    """ValueError, saying what, unless the record is one that Manifest.save can have written."""
    if isinstance(record, dict) and record.get("format", FORMAT) != FORMAT:
        raise _OtherVersion
    _check_fields(record, RECORD, "the manifest", optional=False)
    _check_source(record["source"])
    _check_fields(record["settings"], SETTINGS, "settings", optional=True)
    _check_fields(record["tokenizer"], TOKENIZER, "tokenizer", optional=True)
    for index, shard in enumerate(record["shards"]):
        _check_shard(shard, index)
    for total in ("tokens", "documents"):
        found = sum(shard[total] for shard in record["shards"])
        if record[total] != found:
            raise ValueError(f"{record[total]} {total} in all, but {found} in its shards")
    names = [shard["file"] for shard in record["shards"]]
    if len(set(names)) < len(names):
        raise ValueError("a shard is listed twice")
    _check_positions(record)


def _check_source(source: dict) -> None:
    """An empty one is a folder whose origin nobody recorded: it can be read and not continued."""
    if not source:
        return
    if source.get("kind") not in tuple(SOURCES):  # a list has no hash to look up
        raise ValueError(f"kind of source is {_shown(source.get('kind'))}")
    fields = SOURCES[source["kind"]] | {"kind": _is_text}
    _check_fields(source, fields, "source", optional=True)
    for file in source.get("files", []):
        if not isinstance(file, dict):
            raise ValueError(f"a file of the source is {_shown(file)}")
        known = {key: value for key, value in file.items() if key in FILE}
        _check_fields(known, FILE, "a file of the source", optional=False)
        if not all(value is None or type(value) in (str, int) for value in file.values()):
            raise ValueError(f"a file of the source is {_shown(file)}")


def _check_shard(shard: Any, index: int) -> None:
    _check_fields(shard, SHARD, f"shard {index}", optional=False)
    parts = NAME_PATTERN.fullmatch(shard["file"])
    if not parts or parts["split"] != shard["split"]:
        raise ValueError(f"{shard['file']!r} is not the name of a {shard['split']} shard")
    if shard["documents"] > shard["tokens"]:
        raise ValueError(f"{shard['file']} has more documents than tokens")


def _check_positions(record: dict) -> None:
    """Positions lie in the source's files, and none before the one of the shard before it."""
    positions = [shard["first"] for shard in record["shards"]]
    if record.get("next") is not None:
        positions.append(record["next"])
    elif record["shards"] and not record["complete"]:
        raise ValueError("it is not complete, and has no next position")
    files, last = record["source"].get("files"), Position(0, 0)
    for value in filter(None, positions):  # {}: nobody recorded it
        _check_fields(value, POSITION, "a position", optional=False)
        here = Position(**value)
        if (here.file, here.row, here.token) < (last.file, last.row, last.token):
            raise ValueError(f"position {asdict(here)} lies before the one of the shard before it")
        if files and here.file >= len(files):
            raise ValueError(f"position {asdict(here)}: the source has {len(files)} files")
        if files and (here.offset or 0) > files[here.file]["size"]:
            raise ValueError(f"position {asdict(here)} lies behind the end of its file")
        if here.offset is not None and here.row > here.offset:  # each row takes a byte at least
            raise ValueError(f"position {asdict(here)}: no {here.row} rows lie before that offset")
        last = here
