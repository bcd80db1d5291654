"""Loss and accuracy on windows that are the same at every evaluation.

    sets = {"val": (windows, first(windows, 1600)), "train": (loader.windows, spread(loader.windows,
    1600))} scores = evaluate(model, sets, batch_size=8, ranks=ranks, autocast=autocast)
    scores["val"]["loss"]          # nats per token

The ranks share the windows out and add up their sums in float64, so the numbers depend neither on
how many ranks there are nor on where training is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.distributed import Ranks
from pretrain.eval.generation import evaluating
from pretrain.train.loader import TokenWindows

IGNORED = -1  # the target of padding: GPT.score leaves negative targets out


def first(windows: TokenWindows, count: int) -> np.ndarray:
    """Numbers of the first `count` windows, of all if there are fewer; int64."""
    return np.arange(min(count, len(windows)))


def spread(windows: TokenWindows, count: int) -> np.ndarray:
    """Numbers of `count` windows at equal distances, of all if there are fewer; int64."""
    count = min(count, len(windows))
    return np.arange(count) * len(windows) // count


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sets: dict[str, tuple[TokenWindows, np.ndarray]],
    *,
    batch_size: int,
    ranks: Ranks,
    autocast: AbstractContextManager,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]]:
    """{"val": {"loss": mean over all tokens, "accuracy": share predicted right, "tokens": how
    many}, ...}.

    model.score(x, y) returns the sum of losses, the number of right predictions and of tokens, as
    GPT.score does. All batches have one shape, (batch_size, block_size). Once `interrupted` says so
    the rest is left out and the numbers mean nothing; all ranks still meet in the reduction. The
    model is in eval mode meanwhile, in its own mode after.
    """
    sums = []
    with evaluating(model):
        for windows, numbers in sets.values():
            totals = torch.zeros(3, dtype=torch.float64)
            mine = numbers[ranks.rank :: ranks.world_size]
            for i in range(0, len(mine), batch_size):
                if interrupted():
                    break
                x, y = padded_batch(windows, mine[i : i + batch_size], batch_size)
                with autocast:
                    scores = model.score(x.to(ranks.device), y.to(ranks.device))
                totals += torch.tensor([score.item() for score in scores], dtype=torch.float64)
            sums += totals.tolist()
    sums = iter(ranks.sum(*sums))
    return {
        name: {
            "loss": loss / max(count, 1),
            "accuracy": correct / max(count, 1),
            "tokens": int(count),
        }
        for name, loss, correct, count in zip(sets, sums, sums, sums, strict=True)
    }


def padded_batch(
    windows: TokenWindows, numbers: np.ndarray, batch_size: int
) -> tuple[Tensor, Tensor]:
    """x, y int64 (batch_size, block_size); rows past len(numbers) have IGNORED targets."""
    tokens = torch.zeros(batch_size, windows.block_size + 1, dtype=torch.int64)
    tokens[: len(numbers)] = torch.from_numpy(windows.read(numbers).astype(np.int64))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[len(numbers) :] = IGNORED
    return x, y
