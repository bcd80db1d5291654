"""The files that paths, folders and patterns of a source stand for.

    for found in find(["corpus/", "more/**/*.jsonl.gz"]):
        found.path, found.problem       # what could not be looked at is there too, with the reason

Links are followed, and no folder is entered twice on the way, so that loops of links end.
"""

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.files import is_utf8
from pretrain.text import addresses
from pretrain.text.readers import NAMED_ONLY, READABLE, format_of
from pretrain.text.source import SourceError

FILE, FOLDER = "file", "folder"


@dataclass(frozen=True)
class Found:
    path: Path
    problem: str | None = None  # why what is here cannot be read, None for a file


def find(given: str) -> list[Found]:
    """What one argument stands for, in the order of the paths. Raises SourceError for what does
    not exist, is neither file nor folder, or has no file in it that can be read."""
    path = Path(given)
    what = _look(path)
    if what == FILE:
        if format_of(path.name) is None:
            raise SourceError(f"{given}: cannot be read; a source is {READABLE}")
        return [Found(path)]
    if what == FOLDER:
        found = [
            entry
            for entry in _files_below(path)
            if not entry.path.name.lower().endswith(NAMED_ONLY)
            and not any(part[0] in "._" for part in entry.path.relative_to(path).parts)
        ]
    elif os.path.lexists(path):
        raise SourceError(f"{given}: {what}")
    else:
        parts, anchor = path.parts, path.anchor
        found = list(_matches(Path(anchor), parts[bool(anchor) :]))
        if not found:
            what = "no such file or folder, and no file matches it as a pattern"
            raise SourceError(f"{given}: {what}")
    found = [entry for entry in found if entry.problem or format_of(entry.path.name)]
    if not found:
        raise SourceError(f"{given}: no file in it can be read; a source is {READABLE}")
    unique = {entry.path.as_posix(): entry for entry in found}
    return [unique[name] for name in sorted(unique)]


def _look(path: Path) -> str:
    """FILE, FOLDER, or why it is neither."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return f"a link to {os.readlink(path)}, which does not exist"
        return "no such file or folder"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISDIR(mode):
        return FOLDER
    return FILE if stat.S_ISREG(mode) else "neither a file nor a folder"


def _entry(path: Path) -> Iterator[Found]:
    """A file, or what is in its place. Nothing for a folder, and for a name of no format."""
    what = _look(path)
    if what == FOLDER:
        return
    # what cannot be looked at and has no ending could be a folder of documents
    if format_of(path.name) or (what != FILE and not path.suffix and not _is_special(path)):
        problem = None if what == FILE else what
        if not is_utf8(str(path)):
            problem = "its name is not UTF-8, and the manifest could not record it; rename it"
        yield Found(path, problem)


def _is_special(path: Path) -> bool:
    """Whether this is a pipe, a socket or a device, which nobody takes for a folder."""
    return os.path.exists(path)


def _scan(folder: Path) -> Iterator[Found | os.DirEntry]:
    """What is in a folder, by name, or that it cannot be opened."""
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield Found(folder, error.strerror or str(error))


def _folders_below(top: Path) -> Iterator[tuple[Path, list[Found], list[str]]]:
    """(folder, problems with it, names in it) of `top` and all folders below it, each once.

    Where links lead to a folder that can be reached without, it goes by that name.
    """
    seen: set[str] = set()
    waiting: list[Path] = [top]
    links: list[Path] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        problems, names = [], []
        for entry in _scan(folder):
            if isinstance(entry, Found):
                problems.append(entry)
                continue
            names.append(entry.name)
            path = folder / entry.name
            if _look(path) == FOLDER:
                (links if path.is_symlink() else waiting).append(path)
        yield folder, problems, names


def _files_below(top: Path) -> Iterator[Found]:
    for folder, problems, names in _folders_below(top):
        yield from problems
        for name in names:
            yield from _entry(folder / name)


def _matches(base: Path, parts: tuple[str, ...]) -> Iterator[Found]:
    """Files below `base` that a pattern's parts match, as glob.glob(recursive=True) has them: `**`
    is any number of folders, and a name that begins with a dot needs a pattern that does.

    A part that is the name of something is not taken for a pattern: `data[v2]`.
    """
    if not parts:
        yield from _entry(base)
        return
    if (what := _look(base)) != FOLDER:
        if what != FILE:
            yield from _entry(base)
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for folder, problems, names in _folders_below(base):
            if any(name.startswith(".") for name in folder.relative_to(base).parts):
                continue
            yield from problems
            if rest:
                yield from _matches(folder, rest)
            else:
                for name in names:
                    if not name.startswith("."):
                        yield from _entry(folder / name)
    elif os.path.lexists(base / part) or not glob.has_magic(part):
        if os.path.lexists(base / part):
            yield from _matches(base / part, rest)
    else:
        matching = re.compile(fnmatch.translate(os.path.normcase(part))).match
        for entry in _scan(base):
            if isinstance(entry, Found):
                yield entry
            elif matching(os.path.normcase(entry.name)) and (
                part.startswith(".") or not entry.name.startswith(".")
            ):
                yield from _matches(base / entry.name, rest)


def name_of(paths: Iterable[str | os.PathLike]) -> str:
    """What a source is called: the one file's or folder's name, the folder's of a pattern; of
    several, the first."""
    first = os.fspath(next(iter(paths)))
    path = Path(first)
    while glob.has_magic(path.name) and not os.path.lexists(path):
        path = path.parent
    if addresses.is_address(first):
        name = addresses.name_of(first)
    else:
        name = path.name.split(".")[0] if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip("-._") or "documents"
