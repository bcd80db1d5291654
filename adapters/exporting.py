"""The folder of an export: whole and compared with the model, or not there.

    with new_export("my-gpt2") as temporary:        # takes the name when the block ends
        ...
        compare_logits(model, temporary, "float32", "my-gpt2")

A name is never that of half an export, and never that of a model which computes something else.
"""

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adapters.model_card import RECORD
from pretrain import files
from pretrain.errors import UserError
from pretrain.tokens.tokenizer import VOCAB_SIZE

if TYPE_CHECKING:
    from model import GPT

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
FILES = (RECORD, CONFIG, "generation_config.json", WEIGHTS, *TOKENIZER)
COMPARED_TOKENS = 64  # of a sequence that both models read
# In float64 rounding is nothing, and whatever differs is another function. Models that would not
# fit in memory like that are compared in float32, whose rounding a deep model amplifies.
PRECISE_PARAMETERS, PRECISE_TOLERANCE, TOLERANCE = 500_000_000, 1e-6, 1e-2


class HuggingFaceError(UserError):
    """What keeps an export, import or push from happening; one line for the user."""


@contextlib.contextmanager
def new_export(out_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write an export to. When the block ends it takes out_dir's place in one step,
    with those files of the old out_dir that an export does not have; when the block raises, out_dir
    is as it was and nothing else is left. Raises HuggingFaceError, Locked, OSError.
    """
    out_dir = Path(out_dir).resolve()
    if not out_dir.name or Path.cwd().is_relative_to(out_dir):
        raise HuggingFaceError(f"{out_dir}: is the current folder or above it; name another")
    if out_dir.exists() and not overwrite:
        names = os.listdir(out_dir) if out_dir.is_dir() else [out_dir.name]
        if names and RECORD not in names:
            raise HuggingFaceError(
                f"{out_dir}: exists and is no export; choose another, or --overwrite"
            )
    if out_dir.exists() and not out_dir.is_dir():
        raise HuggingFaceError(f"{out_dir}: is a file; choose another name")
    made = [folder for folder in out_dir.parents if not folder.exists()]
    temporary = out_dir.with_name(f".{out_dir.name}.exporting")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock(temporary / ".lock", f"{out_dir}: another export is writing here"):
            _empty(temporary)
            yield temporary
            if out_dir.exists():
                _keep_others(out_dir, temporary)
        (temporary / ".lock").unlink(missing_ok=True)
        files.replace_folder(temporary, out_dir)
    except files.Locked:
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:  # the nearest first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _empty(folder: Path) -> None:
    """Take away what an export that was killed left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _keep_others(old: Path, new: Path) -> None:
    """What a folder has beside the files of an export, as second names in the new one."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target, follow_symlinks=False)

    for path in old.iterdir():
        target = new / path.name
        if path.name in FILES or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=link)
        else:
            link(str(path), str(target))


def compare_logits(model: "GPT", folder: Path, dtype: str, out_dir: str | Path) -> None:
    """Raise HuggingFaceError unless transformers, from the files in `folder`, computes the logits
    of the model with weights rounded to dtype."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    theirs = cast(torch.nn.Module, AutoModelForCausalLM.from_pretrained(folder))
    if shown:
        logging.enable_progress_bar()
    precise = model.num_parameters() <= PRECISE_PARAMETERS
    exact = torch.float64 if precise else torch.float32
    theirs = theirs.to(exact).eval()
    ours = copy.deepcopy(model).to("cpu", getattr(torch, dtype)).to(exact).eval()
    length = min(COMPARED_TOKENS, model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (1, length), generator=generator)
    with torch.no_grad():
        expected = ours(tokens)[0][..., :VOCAB_SIZE].double()  # (1, length, VOCAB_SIZE)
        found = theirs(tokens).logits.double()
    expected, found = (x - x.mean(dim=-1, keepdim=True) for x in (expected, found))
    difference = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if not difference <= (PRECISE_TOLERANCE if precise else TOLERANCE):  # nan is not either
        raise HuggingFaceError(
            f"{out_dir}: not exported: transformers' GPT-2 computes other logits with these weights"
            f" (by {difference:.1e} of their norm): model.py is not the GPT-2 that was published,"
            " or the weights are not finite"
        )
