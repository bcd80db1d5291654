"""How often a model picks the right one of four endings, as published numbers have it.

    result = score_examples(model, load_examples("hellaswag_val.jsonl"), style="lm-eval")
    result.acc_norm, result.acc_norm_stderr

The same code scores in hellaswag.py, inside of training and in benchmarks.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.eval import choices as engine
from pretrain.eval.generation import evaluating
from pretrain.eval.hellaswag import Example, HellaSwagError, encode
from pretrain.tokens.tokenizer import VOCAB_SIZE, load_encoding

SUMMARY = ("style", "n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "truncated", "seconds")


@dataclass(frozen=True)
class Result:
    """Accuracies, and the arrays that they are made of, in the order of the examples."""

    style: str
    n: int  # examples
    acc: float  # share whose right ending has the lowest loss, summed over its tokens
    acc_norm: float  # the same of the loss per token (completion) or character (lm-eval)
    acc_stderr: float  # sqrt(acc (1 - acc) / (n - 1)), NaN for one example
    acc_norm_stderr: float
    truncated: int  # endings whose context was cut on the left to fit into the model
    seconds: float
    losses: np.ndarray  # float64 (n, 4), summed, nats
    losses_norm: np.ndarray  # float64 (n, 4), per token or character
    picks: np.ndarray  # int64 (n,), index of the lowest loss, the first of equal ones
    picks_norm: np.ndarray  # int64 (n,), the same of losses_norm
    labels: np.ndarray  # int64 (n,)

    def summary(self) -> dict[str, Any]:
        """The numbers alone, as JSON takes them: a standard error that is not defined is None."""
        values = {name: getattr(self, name) for name in SUMMARY}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _refuse_vocabulary(size: int | None) -> None:
    if (size or VOCAB_SIZE) < VOCAB_SIZE:
        raise HellaSwagError(f"a vocabulary of {size} tokens is not GPT-2's of {VOCAB_SIZE}")


def score_examples(
    model: Callable,
    examples: Sequence[Example],
    *,
    style: str = "completion",
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    group: Any = None,
    progress: str = "",
    advance: Callable[[int, int], None] = lambda done, total: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Result | None:
    """Score a model: our GPT or transformers' GPT-2 (either may be wrapped by DDP or
    torch.compile), or, with less speed, anything that maps token ids int64 (B, T) to logits (B, T,
    vocabulary).

    batch_tokens: positions in a batch, which bounds the memory (default: by device). device:
    default that of the model's weights. dtype: of the computation, by autocast (default: that of
    the weights). With world_size > 1 all ranks call this with the same examples, make the same
    number of forward passes, add up their losses in the process group `group`, and get the same
    whole result, that of world_size 1. The model is in eval mode meanwhile, in its own after.

    progress: a name for a bar on a terminal ("": none). advance is told how many of how many
    batches of this rank are done.

    Returns None if `interrupted`, asked after each batch, has said so on any rank. Raises
    HellaSwagError if losses are not finite, or a vocabulary is not GPT-2's.
    """
    t0 = time.perf_counter()
    weights = model.parameters() if hasattr(model, "parameters") else ()
    place = torch.device(device or next((w.device for w in weights), "cpu"))
    parts = engine.take_apart(model)
    _refuse_vocabulary(parts.vocab_size)
    items, lengths, labels = _encoded(examples, style)
    rows = engine.make_rows(items, parts.block_size, share=parts.packs)
    batches = engine.make_batches(rows, batch_tokens or engine.BATCH_TOKENS.get(place.type, 4096))
    mine, num_own = _share(batches, rank, world_size)
    losses = np.zeros((len(items), 4))
    computing, bar = engine.computing(place, dtype), _bar(mine, progress * (rank == 0))
    with evaluating(model), computing, bar as show:
        for number, scores in enumerate(engine.score(parts, mine, place)):
            if number < num_own:
                losses[scores.items, scores.choices] = scores.sums
                show(scores, losses, lengths, labels)
            advance(number + 1, len(mine))
            if _any(interrupted(), world_size, group, place):
                return None
    if world_size > 1:
        losses = _add_up(losses, group, place)
    if bad := (~np.isfinite(losses)).any(axis=1).sum():
        raise HellaSwagError(
            f"losses of the model are not finite on {bad} of {len(items)} examples"
        )
    truncated = sum(len(r.choices) for r in rows if len(r.context) < len(items[r.item].context))
    seconds = time.perf_counter() - t0
    accuracies = _accuracies(losses, lengths, labels)
    return Result(style, len(items), truncated=truncated, seconds=seconds, **accuracies)


def _encoded(
    examples: Sequence[Example], style: str
) -> tuple[list[engine.Item], np.ndarray, np.ndarray]:
    """(token ids, lengths int64 (n, 4) that acc_norm divides by, labels int64 (n,))."""
    encoding = load_encoding()
    pairs = [encode(example, style, encoding) for example in examples]
    items, lengths = [item for item, _ in pairs], np.array([lengths for _, lengths in pairs])
    return items, lengths, np.array([example.label for example in examples])


def _share(batches: list, rank: int, world_size: int) -> tuple[list, int]:
    """(the batches of a rank, how many of them count). Whole batches, so that rounding does not
    depend on world_size. Where a rank would have one less than another it takes the last, a small
    one, once more: with sharded weights every forward pass is one of all ranks."""
    mine = batches[rank::world_size]
    most = math.ceil(len(batches) / world_size)
    return mine + batches[-1:] * (most - len(mine)), len(mine)


def _accuracies(losses: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The fields of a Result that follow from losses (n, 4), lengths (n, 4) and labels (n,)."""
    with np.errstate(divide="ignore"):  # an empty ending: infinite loss per character
        found: dict[str, Any] = {
            "losses": losses,
            "losses_norm": losses / lengths,
            "labels": labels,
        }
    for norm in ("", "_norm"):
        picks = found[f"losses{norm}"].argmin(axis=1)
        share, n = float((picks == labels).mean()), len(labels)
        stderr = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan
        found |= {f"picks{norm}": picks, f"acc{norm}": share, f"acc{norm}_stderr": stderr}
    return found


@contextlib.contextmanager
def _bar(batches: Sequence, name: str) -> Iterator[Callable]:
    """A progress bar, on a terminal only, with the accuracy over what this rank has scored so
    far."""
    if not name:
        yield lambda *_: None
        return
    from tqdm import tqdm

    total = sum(len(choices) for batch in batches for row in batch for choices in row.choices)
    seen: set[int] = set()
    with tqdm(total=total, unit=" endings", desc=name, disable=None) as bar:

        def show(
            scores: engine.Scores, losses: np.ndarray, lengths: np.ndarray, labels: np.ndarray
        ) -> None:
            bar.update(len(scores.items))
            if not bar.disable:
                seen.update(scores.items.tolist())
                some = list(seen)
                picks = (losses[some] / lengths[some]).argmin(axis=1)
                bar.set_postfix(acc_norm=f"{(picks == labels[some]).mean():.4f}", refresh=False)

        yield show


def _any(flag: bool, world_size: int, group: Any, device: torch.device) -> bool:
    """Whether the flag is set on any rank: they stop after the same batch, or not at all."""
    return bool(_add_up(np.array([float(flag)]), group, device)[0]) if world_size > 1 else flag


def _add_up(values: np.ndarray, group: Any, device: torch.device) -> np.ndarray:
    """float64 values of all ranks added up; for losses each has zeros where another has its own."""
    sums = torch.from_numpy(values.copy())
    sums = sums.to(device if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(sums, group=group)
    return sums.cpu().numpy()
