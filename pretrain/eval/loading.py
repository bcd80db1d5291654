"""The model that a user names, for every program that only looks at one.

    model, about = open_model(Path("checkpoints"), None)     # the best checkpoint of a run's folder
    model, about = open_model(None, "gpt2")                  # from the Hugging Face hub

A path is taken for what it holds: a .pt file, the folder of a run, or a folder in Hugging Face's
format.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pretrain import weights
from pretrain.errors import UserError, first_line
from pretrain.eval.arguments import DEFAULT_CHECKPOINT
from pretrain.tokens.tokenizer import END_OF_TEXT, VOCAB_SIZE, load_encoding, shown_bytes
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
    """What tells the tokenizer in a model's folder from GPT-2's; None where it is GPT-2's, or where
    there is none. Ids past GPT-2's are nobody's: others add tokens there."""
    for name in ("vocab.json", "tokenizer.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = content if name == "vocab.json" else content["model"]["vocab"]
            ids = {token: i for token, i in vocabulary.items() if i < END_OF_TEXT}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return f"its {name} is not that of GPT-2's tokenizer"
        if ids != _gpt2_tokens():
            return f"its tokenizer ({name}, {len(vocabulary):,} tokens) is not GPT-2's"
    for name in ("tokenizer.model", "spiece.model", "vocab.txt"):
        if (folder / name).is_file():
            return f"its tokenizer ({name}) is not GPT-2's"
    return None


def _gpt2_tokens() -> dict[str, int]:
    """GPT-2's tokens as vocab.json writes them."""
    shown, encoding = shown_bytes(), load_encoding()
    tokens = (encoding.decode_single_token_bytes(i) for i in range(END_OF_TEXT))
    return {"".join(shown[byte] for byte in token): i for i, token in enumerate(tokens)}
