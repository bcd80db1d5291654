"""Verify a folder of shards: every file against the manifest, samples against the documents they
came from.

    findings = verify_folder(Path("data/input"))
    findings.problems       # [] or one line for each shard that is damaged

Documents are compared where the source is at hand and unchanged; otherwise a note says why they
were not.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import first_line
from pretrain.text.addresses import is_address
from pretrain.text.documents import (
    Patience,
    Position,
    Source,
    SourceError,
    hub_source,
    local_source,
    plan_units,
    read_unit,
)
from pretrain.text.stores import Missing
from pretrain.tokens.destination import StoreDestination
from pretrain.tokens.folder import changes_of_source
from pretrain.tokens.formats import token_files
from pretrain.tokens.manifest import SPLITS
from pretrain.tokens.shards import (
    MANIFEST,
    Manifest,
    Shard,
    ShardError,
    open_shard,
    shard_name,
    verify_shard,
)
from pretrain.tokens.tokenizer import END_OF_TEXT, Tokenizer

SAMPLED_SHARDS = 20  # are compared with the source, at their beginnings
SAMPLED_BYTES = 100_000  # of text at each of these places, or one document
UNIT_BYTES = 1 << 20  # read of a plain text file for that
AT_ONCE = 4  # shards of a store that are downloaded side by side
COUNTED_TOKENS = 1 << 20  # looked at together when documents are counted
# Without the Hub most can be verified.
PATIENCE = Patience(give_up_seconds=20, rate_limit_seconds=20)


# As the built-in map, of one iterable: results in order, wherever the function is called.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass
class Findings:
    """problems: a line for each damaged shard or contradiction. notes: what was not looked at, and
    why."""

    shards: int = 0
    tokens: int = 0
    compared: int = 0  # documents, with what their shard has
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_folder(
    folder: Path, store: StoreDestination | None = None, mapped: Map | None = None
) -> Findings:
    """Read all shards of a folder through, or those of a store whose manifest the folder has.
    mapped: who looks at shards side by side, by default threads of this process.

    Raises ShardError when it has none, or an unreadable manifest, SourceError for a store that is
    away.
    """
    manifest = Manifest.load(folder)
    findings = Findings()
    files = sorted(store.sizes() if store else (path.name for path in token_files(folder)))
    listed: list[tuple[str, Shard | None]] = [(name, None) for name in files]
    if manifest:
        listed = [(shard.file, shard) for shard in manifest.shards]
        _check_manifest(manifest, files, findings)
    else:
        findings.notes.append(f"no {MANIFEST}: hashes, counts and documents could not be checked")
    if not listed:
        raise ShardError(f"{folder}: no shards here to verify")
    findings.shards = len(listed)
    # Hashing runs without the interpreter's lock; of a store so many shards lie on the disk.
    with ThreadPoolExecutor(AT_ONCE if store else os.cpu_count()) as pool:
        mapped = mapped or pool.map
        results = list(mapped(functools.partial(_verify, folder, store), listed))
        findings.problems += [result for result in results if isinstance(result, str)]
        findings.tokens = sum(result for result in results if isinstance(result, int))
        if manifest and not findings.problems:
            _compare_with_source(folder, store, manifest, findings, mapped)
    return findings


def _verify(
    folder: Path, store: StoreDestination | None, entry: tuple[str, Shard | None]
) -> int | str:
    """The shard's tokens, or what is wrong with it."""
    name, shard = entry
    if store is None:
        return _verify_file(folder / name, shard)
    try:
        path = store.download(name, folder)
    except Missing:
        return f"{folder / name}: no such shard; build it again with fineweb.py"
    try:
        return _verify_file(path, shard)
    finally:
        path.unlink()


def _verify_file(path: Path, shard: Shard | None) -> int | str:
    try:
        verify_shard(path, shard)
    except ShardError as error:
        return str(error)
    tokens = open_shard(path)
    blocks = (tokens[at : at + COUNTED_TOKENS] for at in range(0, len(tokens), COUNTED_TOKENS))
    documents = sum(np.count_nonzero(block == END_OF_TEXT) for block in blocks)  # one begins each
    if shard and documents != shard.documents:
        return f"{path}: {documents:,} documents begin in it, {MANIFEST} has {shard.documents:,}"
    return len(tokens)


def _check_manifest(manifest: Manifest, files: list[str], findings: Findings) -> None:
    for index, shard in enumerate(manifest.shards):
        last = index + 1 == len(manifest.shards)
        size = manifest.settings.get("shard_size", shard.tokens) if index else manifest.val_tokens
        if shard.file != shard_name(manifest.name, SPLITS[min(index, 1)], index, manifest.ending):
            findings.problems.append(f"{MANIFEST}: {shard.file} stands in place {index}")
        if shard.tokens > size or (shard.tokens < size and not (last and manifest.complete)):
            findings.problems.append(
                f"{MANIFEST}: {shard.file} has {shard.tokens:,} tokens, not {size:,}"
            )
    if not manifest.complete:
        findings.notes.append("the folder is not finished: the command that began it continues")
    if others := sorted(set(files) - {shard.file for shard in manifest.shards}):
        findings.notes.append(f"not in {MANIFEST}, so not used: {', '.join(others)}")


# ---- the documents


def _compare_with_source(
    folder: Path,
    store: StoreDestination | None,
    manifest: Manifest,
    findings: Findings,
    mapped: Map,
) -> None:
    try:
        source = reopen_source(manifest, PATIENCE)
        if changes := changes_of_source(manifest, source):
            findings.notes.append(
                f"the shards hold documents as they were before: {'; '.join(changes[:5])}; "
                "not compared with them"
            )
            return
        count = min(SAMPLED_SHARDS, len(manifest.shards))
        places = sorted({round(i) for i in np.linspace(0, len(manifest.shards) - 1, count)})
        shards = [manifest.shards[index] for index in places]
        compare = functools.partial(_compare_beginning, folder, store, source)
        for shard, (compared, difference) in zip(shards, mapped(compare, shards), strict=True):
            findings.compared += compared
            if difference:
                findings.problems.append(f"{folder / shard.file}: {difference}")
    except (SourceError, OSError) as error:
        findings.notes.append(f"not compared with the documents: {first_line(error)}")


def reopen_source(manifest: Manifest, patience: Patience | None = None) -> Source:
    """The source that the manifest describes. Raises SourceError where it is not at hand."""
    there = manifest.source
    if missing := {"kind", "text_column", "files"} - {key for key in there if there[key]}:
        raise SourceError(f"{MANIFEST} does not record {', '.join(sorted(missing))} of its source")
    if there["kind"] in ("local", "stored"):
        paths = [file["path"] for file in there["files"]]
        # A folder in the place of a file could be any large one.
        gone = [path for path in paths if not is_address(path) and not os.path.isfile(path)]
        if gone:
            raise SourceError(f"{gone[0]}: no such file")
        columns = [file.get("text_column") for file in there["files"]]
        return local_source(
            paths, text_column=there["text_column"], columns=columns, patience=patience
        )
    return hub_source(
        there["dataset"],
        name=there["config"],
        split=there["split"],
        revision=there["commit"],
        text_column=there["text_column"],
        patience=patience,
    )


def _compare_beginning(
    folder: Path, store: StoreDestination | None, source: Source, shard: Shard
) -> tuple[int, str | None]:
    """Encode the documents with which a shard begins anew: (how many, what differs)."""
    if not shard.first:
        raise SourceError(f"{MANIFEST} does not say where {shard.file} begins")
    tokens = store.beginning(shard) if store else open_shard(folder / shard.file)
    start = Position.from_json(shard.first)
    tokenizer = Tokenizer("tiktoken")
    drop, at, count, read = start.token, 0, 0, 0
    for i, unit in enumerate(plan_units(source, unit_bytes=UNIT_BYTES, resume=start)):
        skip_rows = start.row - (unit.first_row or 0) if i == 0 and unit.file == start.file else 0
        for batch in read_unit(source, unit, skip_rows=skip_rows, on_bad_document="skip"):
            for text in batch.texts:
                text = text.as_py()
                ids = np.array([END_OF_TEXT, *tokenizer.encode(text)], np.uint16)[drop:]
                ids = ids[: len(tokens) - at]
                if not np.array_equal(ids, tokens[at : at + len(ids)]):
                    return (
                        count,
                        f"tokens {at:,} to {at + len(ids):,} are not those of their document",
                    )
                drop, at, count, read = 0, at + len(ids), count + 1, read + len(text)
                if at == len(tokens) or read >= SAMPLED_BYTES:
                    return count, None
    return count, None if at == len(
        tokens
    ) else "has more tokens than the documents from its position on"
