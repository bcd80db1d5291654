"""HellaSwag's examples: from the published files or one of your own, to the tokens that are scored.

    path = ensure_data()                 # data/hellaswag/hellaswag_val.jsonl, downloaded if missing
    examples = load_examples(path)       # 10,042 of them
    context, endings = prompt(examples[0], "lm-eval")

Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?" (2019). The data's licence
is MIT.
"""

import gzip
import hashlib
import json
import os
import random
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import UserError, reason

if TYPE_CHECKING:
    from pretrain.eval.choices import Item

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
SPLITS = ("val", "train", "test")
PUBLISHED_FILES = {  # split: (bytes, SHA-256)
    "val": (12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
}
STYLES = ("completion", "lm-eval")
DEFAULT_FOLDER = "data/hellaswag"
LARGEST_FILE = 10**9  # bytes of text; the published files have 12 to 50 million
SAMPLE_SEED = 1337  # of the choice that a limit makes


class HellaSwagError(UserError):
    """HellaSwag cannot be scored: one line that says what is wrong and where. No reason to stop
    training."""


class DataUnavailable(HellaSwagError):
    """There is no data file, and none can be downloaded."""


@dataclass(frozen=True)
class Example:
    """One line of a data file. `ctx_a` and `ctx_b` are None in files that hold only the whole
    context."""

    ind: int
    activity_label: str
    ctx: str
    ctx_a: str | None
    ctx_b: str | None
    endings: tuple[str, str, str, str]
    label: int  # of the right ending, 0 to 3


def data_path(split: str = "val", folder: str | Path | None = None) -> Path:
    """Where the file of a split is, or will be once it is downloaded."""
    folder = folder or os.environ.get("HELLASWAG_DIR") or DEFAULT_FOLDER
    return Path(folder) / f"hellaswag_{split}.jsonl"


def ensure_data(
    split: str = "val", folder: str | Path | None = None, *, progress: bool = False
) -> Path:
    """The file of a split in `folder` (default: $HELLASWAG_DIR, else data/hellaswag), downloaded if
    need be.

    Many processes may call this at once: one downloads, the others wait. Raises DataUnavailable.
    """
    from pretrain.text.download import DownloadError, fetch

    path = data_path(split, folder)
    size, sha256 = PUBLISHED_FILES.get(split, (None, None))
    url = URL.format(split=split)
    try:
        fetch(url, path, size=size, sha256=sha256, check=_not_examples, progress=progress)
    except (DownloadError, OSError) as error:
        raise DataUnavailable(f"no {path}, and it cannot be downloaded: {error}") from None
    return path


def _not_examples(path: Path) -> str | None:
    """What is wrong with a downloaded file, judging by its first and last lines."""
    lines = path.read_bytes().strip().split(b"\n")
    try:
        whole = all("endings" in json.loads(line) for line in (lines[0], lines[-1]))
    except (ValueError, TypeError):
        whole = False
    return None if whole else "its lines are not HellaSwag's"


def load_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """The examples of a file in HellaSwag's format, .jsonl or .jsonl.gz.

    Of more than `limit` (0 or None: all) it is a random choice in the file's order, always the same
    one, which contains that of any smaller limit. The first ones would not do: the published files
    are ordered by source. Raises HellaSwagError naming the line.
    """
    return load_with_hash(path, limit)[0]


def load_with_hash(path: str | Path, limit: int | None = None) -> tuple[list[Example], str]:
    """load_examples, and the SHA-256 of the decompressed content, from one reading."""
    data = _read(path)
    examples = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                examples.append(_parse(line, number))
            except ValueError as error:
                raise HellaSwagError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise HellaSwagError(f"{path}: no examples in it")
    if limit and limit < len(examples):
        order = list(range(len(examples)))
        random.Random(SAMPLE_SEED).shuffle(order)
        examples = [examples[i] for i in sorted(order[:limit])]
    return examples, hashlib.sha256(data).hexdigest()


def data_sha256(path: str | Path) -> str:
    """Of the decompressed content, so that a compressed copy of a published file is known as that
    file."""
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str | Path) -> bytes:
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # a pipe would be waited for
            raise HellaSwagError(f"{path}: not a file")
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise HellaSwagError(f"{path}: {reason(error)}") from None
    if len(data) > LARGEST_FILE:
        raise HellaSwagError(
            f"{path}: more than {LARGEST_FILE / 1e9:.0f} GB of text; not HellaSwag"
        )
    return data


def _parse(line: bytes, number: int) -> Example:
    """Raises ValueError that says what is wrong with the line."""
    try:
        item = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not an example: nested too deeply") from None
    if not isinstance(item, dict):
        raise ValueError(f"expected a JSON object, got {type(item).__name__}")
    for key in ("activity_label", "ctx"):
        if not isinstance(item.get(key), str):
            raise ValueError(f"{key} must be a string, got {item.get(key)!r}")
    endings = item.get("endings")
    if (
        not isinstance(endings, list)
        or len(endings) != 4
        or not all(isinstance(e, str) for e in endings)
    ):
        raise ValueError("endings must be a list of four strings")
    ctx_a, ctx_b = item.get("ctx_a"), item.get("ctx_b")
    if not (isinstance(ctx_a, str) and isinstance(ctx_b, str)) and (ctx_a, ctx_b) != (None, None):
        raise ValueError("ctx_a and ctx_b must be two strings, or both be missing")
    label = item.get("label")
    if label in (None, ""):
        raise ValueError(
            "no label to score against (the published test file has none: take val or train)"
        )
    if isinstance(label, bool) or str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"label must be 0, 1, 2 or 3, got {label!r}")
    texts = (item["activity_label"], item["ctx"], ctx_a or "", ctx_b or "", *endings)
    if any("\ud800" <= letter <= "\udfff" for one in texts for letter in one):
        raise ValueError("half a character (a lone surrogate) in its text")
    ind = item.get("ind")
    return Example(
        ind if isinstance(ind, int) and not isinstance(ind, bool) else number - 1,
        item["activity_label"],
        item["ctx"],
        ctx_a,
        ctx_b,
        tuple(endings),
        int(label),
    )


def prompt(example: Example, style: str) -> tuple[str, list[str]]:
    """Context and endings, as texts that are joined by a space.

    completion: as they are in the file. lm-eval: as EleutherAI's harness makes them for its task
    hellaswag: the activity in front, the last sentence's beginning capitalised, WikiHow's marks in
    brackets removed. A file without ctx_a and ctx_b is taken to have the latter two behind it.
    """
    if style == "completion":
        return example.ctx, list(example.endings)
    if style != "lm-eval":
        raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")
    if example.ctx_a is None or example.ctx_b is None:
        return f"{example.activity_label}: {example.ctx}", list(example.endings)
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return _without_marks(context), [_without_marks(ending) for ending in example.endings]


def _without_marks(text: str) -> str:
    # In this order, and with the spaces that it leaves: so the published numbers came about.
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def encode(example: Example, style: str, encoding: Any) -> tuple["Item", list[int]]:
    """Token ids of context and endings, and the lengths by which acc_norm divides the losses.

    completion: tokenized apart, lengths in tokens. lm-eval: tokenized together and cut after the
    context's number of tokens, spaces at the end of the context going with the endings; lengths in
    characters of the ending, without the space before it.
    """
    from pretrain.eval.choices import Item
    from pretrain.tokens.tokenizer import END_OF_TEXT

    context, endings = prompt(example, style)
    if style == "completion":
        before = encoding.encode_ordinary(context)
        tokens = [encoding.encode_ordinary(" " + ending) for ending in endings]
        lengths = [len(ending) for ending in tokens]
    else:
        text = context.rstrip()
        space = context[len(text) :] + " "
        before = encoding.encode_ordinary(text)
        tokens = [
            encoding.encode_ordinary(text + space + ending)[len(before) :] for ending in endings
        ]
        lengths = [len(ending) for ending in endings]
    return Item(
        before or [END_OF_TEXT], tokens
    ), lengths  # something has to predict the first token
