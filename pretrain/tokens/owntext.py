"""Training on one's own text: files become shards, once.

    data_dir = prepare(["input.txt"], Path("checkpoints/data"))  # built, or found there from before

The shards are those of `fineweb.py --source input.txt --val_fraction 0.1`: the first tenth of the
tokens is for validation, the rest for training, both contiguous, so that no window of one holds a
token of the other.
"""

import contextlib
import dataclasses
import glob
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.text.columns import split
from pretrain.text.documents import Source, SourceError, local_source
from pretrain.tokens.build import Settings, Work, build_shards
from pretrain.tokens.estimate import estimate
from pretrain.tokens.folder import BuildRefused
from pretrain.tokens.formats import token_files
from pretrain.tokens.progress import ConsoleProgress
from pretrain.tokens.shards import MANIFEST, Manifest
from pretrain.tokens.tokenizer import Tokenizer

VAL_FRACTION = 0.1
POLL_SECONDS = 0.2
RUN_LOG, DATA = "metrics.jsonl", "data"  # what a run writes that could be taken for documents


def is_shard_folder(path: str | Path) -> bool:
    """Whether a folder holds shards, so that there is nothing to prepare."""
    path = Path(path)
    return path.is_dir() and ((path / MANIFEST).exists() or bool(token_files(path)))


def prepare(
    paths: Sequence[str | Path],
    folder: Path,
    *,
    builder: bool = True,
    exclude: Path | None = None,
) -> Path:
    """The folder with the shards of some text: `folder`, or `paths` itself where that is a folder
    of shards.

    One process of each machine is the builder; the others wait for its manifest to be complete,
    however long that takes (a collective would time out), so a builder that fails has to end them,
    as torchrun does. Text that has changed since is refused. What lies below `exclude`, the run's
    output (default: the parent of `folder`), is no text. Raises SourceError, BuildRefused,
    ShardError, TokenizerUnavailable, OSError.
    """
    if len(paths) == 1 and is_shard_folder(paths[0]):
        return Path(paths[0])
    if not builder:
        while not ((manifest := Manifest.load(folder)) and manifest.complete):
            time.sleep(POLL_SECONDS)
        return folder
    with advice_for_training():
        source, work = open_text(paths, exclude or folder.parent), Work(Tokenizer())
        for note in source.notes:
            print(f"note: {note}")
        before = Manifest.load(folder)
        expected = estimate(source, work.count_tokens)
        work.progress = ConsoleProgress(expected, None)
        with contextlib.closing(work.progress):
            settings = Settings(val_fraction=VAL_FRACTION)
            manifest = build_shards(source, folder, settings, work, expected_tokens=expected.tokens)
    kept = "kept from before" if before and before.complete else "made"
    val = sum(shard.tokens for shard in manifest.shards if shard.split == "val")
    train = f"{manifest.tokens - val:,} tokens for training"
    print(f"{folder}: shards {kept}: {train}, {val:,} for validation")
    return folder


def open_text(paths: Sequence[str | Path], out_dir: Path) -> Source:
    """The files of some text, without what a run in `out_dir` writes. Raises SourceError, with
    advice for train_gpt2.py."""
    with advice_for_training():
        return without_files_below(out_dir, local_source(paths), paths)


def without_files_below(folder: Path, source: Source, paths: Sequence[str | Path]) -> Source:
    """A source without the files in an output folder, so that a rerun has the documents of the
    first run. `paths`: those that the source was made from.

    What is named itself, as a path in that folder, stays. Where the folder itself is named, what a
    run writes is left out by its name. Raises SourceError when nothing remains.
    """
    below = _real(folder)
    named = [_real(_without_pattern(path)) for path in paths]
    inside = [path for path in named if below in path.parents]
    own = [below / RUN_LOG, below / DATA] if below in named else [below]

    def stays(path: str) -> bool:
        lineage = {(real := _real(path)), *real.parents}
        return not lineage & {*own} or bool(lineage & {*inside})

    staying = [file.url is not None or stays(file.path) for file in source.files]
    if all(staying):
        return source
    if not any(staying):
        raise SourceError(f"{paths[0]}: all files in it are output of this run, in {folder}")
    described = source.description["files"]
    files = [each for each, stay in zip(described, staying, strict=True) if stay]
    return dataclasses.replace(
        source,
        files=tuple(each for each, stay in zip(source.files, staying, strict=True) if stay),
        description=source.description | {"files": files},
    )


def _real(path: str | Path) -> Path:
    return Path(os.path.normcase(os.path.realpath(path)))


def _without_pattern(path: str | Path) -> Path:
    """The path, or of a pattern the folder that it searches."""
    path = Path(split(path)[0])
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def advice_for_training() -> Iterator[None]:
    """Messages of stage 1 advise flags of fineweb.py: here they say that it has them."""
    try:
        yield
    except BuildRefused as error:
        what = re.sub(r"--(?=\w+ was )", "", str(error)).rpartition(". ")[0]
        raise type(error)(
            f"{what}. Take another --out_dir or the text of before, or give that folder as --data"
        ) from None
    except SourceError as error:
        message = without_flags(str(error))
        if message == str(error):
            raise
        raise type(error)(
            f"{message}; name another column as PATH#COLUMN, or make shards with fineweb.py, which"
            " can leave documents out, and give --data their folder"
        ) from None


def without_flags(message: str) -> str:
    """A message without its advice of flags.

    >>> without_flags("a.jsonl: no key 'text'; choose --text_column from 'body', 'title'")
    "a.jsonl: no key 'text'; there are 'body', 'title'"
    """
    message = re.sub(r"\s*\(--\w[^)]*\)", "", message)
    message = re.sub(r"choose --\w+ from", "there are", message)
    return re.sub(r"[;,] (?:check|try|choose|use|give|or) --\w[^;]*", "", message)
