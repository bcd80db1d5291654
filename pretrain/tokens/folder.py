"""A folder that shards are built in: its lock, what is there already, what does not fit to it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError
from pretrain.files import lock, temporary_name
from pretrain.text.documents import Source, changed_files
from pretrain.tokens.formats import token_files
from pretrain.tokens.shards import (
    MANIFEST,
    NAME_PATTERN,
    Manifest,
    Shard,
    ShardError,
    has_size,
)

if TYPE_CHECKING:
    from pretrain.tokens.build import Settings

LOCK = ".lock"
SHOWN = 5  # changes that are named


class BuildRefused(UserError, ValueError):
    """The folder and what is asked do not fit together; the message is one line that says why."""


@contextlib.contextmanager
def prepare_folder(
    source: Source, folder: Path, settings: "Settings", name: str
) -> Iterator[Manifest | None]:
    """Hold the folder's lock, clear away what a killed build left, and give its manifest, None
    where there is none. Raises BuildRefused where it was made from something else, ShardError for a
    manifest that cannot be continued, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    problem = f"{folder}: another process is writing here; wait for it, or choose another folder"
    with lock(folder / LOCK, f"{problem} with --out_dir"):
        manifest = Manifest.load(folder)
        if manifest:
            for path in leftovers(folder, manifest):
                path.unlink()
        else:
            _refuse_foreign_shards(folder)
        if manifest and manifest.shards:
            refuse_differences(folder, manifest, name, settings)
            refuse_changes(folder, manifest, source)
        yield manifest


def refuse_differences(folder: Path, manifest: Manifest, name: str, settings: "Settings") -> None:
    """BuildRefused, naming each, if the folder was made with other settings."""
    there = {"shard_name": manifest.name, **manifest.settings}
    here = {"shard_name": name, **settings.given()}
    differences = [
        f"--{key} was {there.get(key, 'not given')}, now {here.get(key, 'not given')}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise BuildRefused(
            f"{folder}: holds shards made with other settings: {'; '.join(differences)}. Use "
            "the same, choose another folder with --out_dir, or remove this one"
        )


def refuse_changes(folder: Path, manifest: Manifest, source: Source) -> None:
    """BuildRefused, naming them, if the source's files are not those that the folder was made from.

    Where local files lie may change; what is in them, and their order, may not.
    """
    if changes := changes_of_source(manifest, source):
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise BuildRefused(
            f"{folder}: holds shards of other documents: {'; '.join(changes[:SHOWN])}{more}. Give "
            "the same, choose another folder with --out_dir, or remove this one"
        )


def changes_of_source(manifest: Manifest, source: Source) -> list[str]:
    """A line for each way in which a source is not the one that the manifest describes."""
    there, here = dict(manifest.source), dict(source.description)
    files_there, _ = there.pop("files", []), here.pop("files")
    changes = [
        f"{key} was {there.get(key)}, now {here.get(key)}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    return changes or changed_files(files_there, source)


def _refuse_foreign_shards(folder: Path) -> None:
    shards = sorted(path.name for path in token_files(folder))
    if shards:
        others = " and others" if len(shards) > 1 else ""
        raise BuildRefused(
            f"{folder}: holds {shards[0]}{others} but no {MANIFEST}: not made here, so not to be "
            "continued; choose another folder with --out_dir"
        )


def leftovers(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of a build that was killed: unfinished shards, and one that never came into the
    manifest."""
    listed, found = {shard.file for shard in manifest.shards}, []
    temporary = temporary_name(folder / MANIFEST).name
    for path in folder.iterdir():
        # .NAME.tmp is how files begin; NAME.tmp was, until version 0.1
        shard = path.name.removesuffix(".tmp")
        shard = shard.removeprefix(".") if shard != path.name else shard
        parts = NAME_PATTERN.fullmatch(shard)
        ours = parts and parts["name"] == manifest.name and path.name not in listed
        if (ours or path.name == temporary) and not path.is_dir():
            found.append(path)
    return found


def damaged_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    """Listed shards that are not there, or not of the size that the manifest records. Their content
    is looked at by `--verify` alone."""
    try:
        damaged = [
            each for each in manifest.shards if not has_size(folder / each.file, each.tokens)
        ]
    except OSError as error:
        raise ShardError(f"{error.filename}: {error.strerror}") from None
    for shard in damaged:
        path = folder / shard.file
        if path.exists() and not path.is_file():
            raise ShardError(f"{path}: not a regular file; move it away")
    return damaged
