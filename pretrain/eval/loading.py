"""The model that a user names, for every program that only looks at one.

    model, about = open_model(Path("checkpoints"), None)     # the best checkpoint of a run's folder
    model, about = open_model(None, "gpt2")                  # from the Hugging Face hub

A path is taken for what it holds: a .pt file, the folder of a run, or a folder in Hugging Face's
format.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pretrain import weights
from pretrain.errors import UserError, first_line
from pretrain.eval.arguments import DEFAULT_CHECKPOINT
from pretrain.tokens.tokenizer import END_OF_TEXT, VOCAB_SIZE, shown_tokens
from pretrain.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from model import GPT


class ModelUnavailable(UserError):
    """The model that was named cannot be had, or knows another vocabulary than GPT-2's."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What the readers of models and the choice of a device raise, as UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ModelUnavailable(first_line(error)) from None


def open_model(
    checkpoint: Path | None, name: str | None, *, any_tokenizer: bool = False
) -> tuple["GPT", dict[str, Any]]:
    """(the model in eval mode on the CPU, {"name": ..., "step": of a checkpoint, "parameters": how
    many}).

    checkpoint: a path; name: one of the hub, or a path; with neither DEFAULT_CHECKPOINT.
    any_tokenizer: also a model that was trained with another tokenizer than GPT-2's, whose numbers
    then mean nothing on text. Raises UserError.
    """
    from model import GPT, load_checkpoint

    path = Path(name) if name is not None else checkpoint or DEFAULT_CHECKPOINT
    with user_errors():
        if weights.is_huggingface(path) or (name is not None and not _is_ours(path)):
            if (problem := foreign_vocabulary(path)) and not any_tokenizer:
                raise ModelUnavailable(
                    f"{path}: {problem}, and texts would reach it as the wrong tokens; use its own"
                    " tools, or go on with --any_tokenizer"
                )
            model = GPT.from_pretrained(name if name is not None else path)
            about: dict[str, Any] = {"name": str(name if name is not None else path)}
        else:
            file = checkpoints.model_file(path)
            model, saved = load_checkpoint(file)
            about = {"name": str(file), "step": saved.get("step")}
    if model.config.vocab_size < VOCAB_SIZE:
        size = model.config.vocab_size
        raise ModelUnavailable(
            f"{about['name']}: a vocabulary of {size} tokens, but GPT-2's tokenizer has"
            f" {VOCAB_SIZE}"
        )
    return model, about | {"parameters": model.num_parameters()}


def _is_ours(path: Path) -> bool:
    """Whether there is a .pt file at the path, or in the folder that it names."""
    return path.is_file() or (path.is_dir() and any(path.glob("*.pt")))


def foreign_vocabulary(folder: Path) -> str | None:
    """What tells the tokenizer in a model's folder from GPT-2's, by its tokens and its merges; None
    where it is GPT-2's, or where there is none. Ids past GPT-2's are nobody's: others add tokens
    there."""
    known = 0
    for name in ("vocab.json", "tokenizer.json", "merges.txt"):
        if not os.path.lexists(folder / name):
            continue
        known += 1
        try:
            if problem := _foreign_file(folder / name):
                return problem
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return f"its {name} is not that of GPT-2's tokenizer"
    for name in ("tokenizer.model", "spiece.model", "vocab.txt"):
        if os.path.lexists(folder / name):
            return f"its tokenizer ({name}) is not GPT-2's"
    return None if known else _foreign_class(folder / "tokenizer_config.json")


def _foreign_file(file: Path) -> str | None:
    text = file.read_text(encoding="utf-8")
    if file.name == "merges.txt":
        merges: list[Any] = [line for line in text.splitlines() if not line.startswith("#version")]
    else:
        content = json.loads(text)
        vocabulary = content if file.name == "vocab.json" else content["model"]["vocab"]
        if {token: i for token, i in vocabulary.items() if i < END_OF_TEXT} != shown_tokens():
            return f"its tokenizer ({file.name}, {len(vocabulary):,} tokens) is not GPT-2's"
        merges = [] if file.name == "vocab.json" else content["model"]["merges"]
    # Each makes the next token of two: with the same tokens in another order texts split otherwise.
    made = ["".join(each.split() if isinstance(each, str) else each) for each in merges if each]
    if file.name != "vocab.json" and made != list(shown_tokens())[256:]:
        return f"its tokenizer ({file.name}, {len(made):,} merges) is not GPT-2's"
    return None


def _foreign_class(config: Path) -> str | None:
    """What a folder without a vocabulary says of the tokenizer that belongs to it."""
    if not os.path.lexists(config):
        return None
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"its {config.name} is not that of GPT-2's tokenizer"
    is_known = name is None or str(name).startswith("GPT2Tokenizer")
    return None if is_known else f"its tokenizer ({config.name}: {str(name)[:60]}) is not GPT-2's"
