"""Loss and accuracy on windows that are the same at every evaluation.

    sets = {"val": (windows, first(windows, 1600)),
            "train": (loader.windows, spread(loader.windows, 1600))}
    scores = evaluate(model, sets, batch_size=8, ranks=ranks, autocast=autocast)
    scores["val"]["loss"]          # nats per token

The ranks share the windows out and add up their sums in float64, so the numbers depend neither on
how many ranks there are nor on where training is.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.distributed import Ranks
from pretrain.eval.generation import evaluating
from pretrain.report.console import silent
from pretrain.tokens.tokenizer import TokenizerUnavailable, token_bytes
from pretrain.train.data import TrainingData
from pretrain.train.loader import BatchLoader, TokenWindows
from pretrain.train.settings import SettingsError, TrainSettings

Windows = dict[str, tuple[TokenWindows, np.ndarray]]  # what evaluations look at, with the numbers
IGNORED = -1  # the target of padding: GPT.score leaves negative targets out
SUMS = 4  # of a set of windows: losses, right predictions, tokens, bytes


def first(windows: TokenWindows, count: int) -> np.ndarray:
    """Numbers of the first `count` windows, of all if there are fewer; int64."""
    return np.arange(min(count, len(windows)))


def spread(windows: TokenWindows, count: int) -> np.ndarray:
    """Numbers of `count` windows at equal distances, of all if there are fewer; int64."""
    count = min(count, len(windows))
    return np.arange(count) * len(windows) // count


def evaluated_windows(
    settings: TrainSettings, data: TrainingData, loader: BatchLoader, vocab_size: int
) -> Windows:
    """The first windows of val, and as many of train as --eval_iters says, named val and train, or
    val/web and so on in a mixture. Raises SettingsError where val has no --val_tokens."""
    block_size, found = loader.block_size, Windows()
    asked, count = settings.val_tokens, settings.eval_iters * settings.batch_size
    for name, val in data.validation(block_size=block_size, vocab_size=vocab_size).items():
        whole = asked // block_size if asked else count
        if asked and not 0 < whole <= len(val):
            raise SettingsError(
                f"--val_tokens {asked:,}: {data.folders[name]} has {len(val) * block_size:,} to"
                f" score, in windows of {block_size}; choose from {block_size} up to that"
            )
        found[f"val/{name}" if name else "val"] = val, first(val, whole)
    for name, part in loader.parts.items():
        numbers = spread(part.windows, count)
        found[f"train/{name}" if name else "train"] = part.windows, numbers
    return found


@torch.no_grad()
def evaluate(
    model: Any,  # GPT, or an architecture with its score()
    sets: dict[str, tuple[TokenWindows, np.ndarray]],
    *,
    batch_size: int,
    ranks: Ranks,
    autocast: AbstractContextManager,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Callable[[str, int, int], None] = silent,
    score: Callable[[Tensor, Tensor], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """{"val": {"loss": mean over all tokens, "accuracy": share predicted right, "tokens": how
    many, "bits_per_byte": loss in bits over the bytes that the tokens stand for}, ...}.

    bits_per_byte, which does not depend on a vocabulary, is left out where GPT-2's is not at hand;
    end-of-text tokens cost bits and count no byte.

    model.score(x, y) returns the sum of losses, the number of right predictions and of tokens, as
    GPT.score does; `score` is the same, compiled. All batches have one shape, (batch_size,
    block_size), and every rank makes as many: with sharded weights each is a call of all ranks.
    Once `interrupted` says so on any rank the rest is left out on all, and the numbers mean
    nothing. progress is told the set, and how many of how many batches are done. The model is in
    eval mode meanwhile, in its own mode after.
    """
    sums: list[float] = []
    with evaluating(model):
        for name, (windows, numbers) in sets.items():
            totals = np.zeros(SUMS)
            mine = numbers[ranks.rank :: ranks.world_size]
            most = math.ceil(len(numbers) / ranks.world_size)  # windows of the rank with most
            for i in range(0, most, batch_size):
                if ranks.sum(float(interrupted()))[0]:
                    break
                x, y = padded_batch(windows, mine[i : i + batch_size], batch_size)
                with autocast:
                    scores = (score or model.score)(x.to(ranks.device), y.to(ranks.device))
                totals += [*(score.item() for score in scores), count_bytes(y)]
                progress(name, i // batch_size + 1, math.ceil(most / batch_size))
            sums += totals.tolist()
    sums = ranks.sum(*sums)
    parts = [sums[i : i + SUMS] for i in range(0, len(sums), SUMS)]
    return {name: _means(*part) for name, part in zip(sets, parts, strict=True)}


def weighted(
    scores: dict[str, dict[str, float]], shares: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Scores of a mixture's sources, "val/web" and so on, with "val" and "train" before them: the
    means by these shares. Without shares the scores as they are.

    bits_per_byte is that of text of which the sources have these shares of the tokens.
    """
    if not shares:
        return scores
    return {split: _mean_of(split, scores, shares) for split in ("val", "train")} | scores


def _mean_of(
    split: str, scores: dict[str, dict[str, float]], shares: dict[str, float]
) -> dict[str, float]:
    parts = [(share, scores[f"{split}/{name}"]) for name, share in shares.items() if share]
    means = {
        name: sum(share * part[name] for share, part in parts) for name in ("loss", "accuracy")
    }
    if all("bits_per_byte" in part and part["bits_per_byte"] > 0 for _, part in parts):
        # Bits per token over bytes per token; the latter is bits per token over bits per byte.
        size = sum(share * part["loss"] / part["bits_per_byte"] for share, part in parts)
        means["bits_per_byte"] = means["loss"] / size if size else math.nan
    return means | {"tokens": sum(int(part["tokens"]) for _, part in parts)}


def _means(loss: float, correct: float, count: float, size: float) -> dict[str, float]:
    means = {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}
    if size > 0:  # nan on all ranks where one lacks the vocabulary
        means["bits_per_byte"] = loss / math.log(2) / size
    return means | {"tokens": int(count)}


def padded_batch(
    windows: TokenWindows, numbers: np.ndarray, batch_size: int
) -> tuple[Tensor, Tensor]:
    """x, y int64 (batch_size, block_size); rows past len(numbers) have IGNORED targets."""
    tokens = torch.zeros(batch_size, windows.block_size + 1, dtype=torch.int64)
    if len(numbers):
        tokens[: len(numbers)] = torch.from_numpy(windows.read(numbers).astype(np.int64))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[len(numbers) :] = IGNORED
    return x, y


def count_bytes(targets: Tensor) -> float:
    """The bytes of text that targets int64 (B, T) stand for; nan without GPT-2's vocabulary."""
    sizes = _token_bytes()
    if sizes is None:
        return math.nan
    known = targets[(targets >= 0) & (targets < len(sizes))]
    return float(sizes[known.numpy()].sum())


@functools.cache
def _token_bytes() -> np.ndarray | None:
    """The bytes of each token, int64 (END_OF_TEXT,)."""
    try:
        return np.array([len(token) for token in token_bytes()])
    except TokenizerUnavailable:
        return None
