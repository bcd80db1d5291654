"""The losses that a language model gives to several endings of a context, which is computed once
for all.

The endings follow their context in one row. Each sees the context and itself, at the positions it
would have if it were alone, so that the losses are those of separate rows:

    row        c0 c1 c2  a0 a1  b0 b1 b2     an ending's last token is only predicted: it is not in
    the row
    branch      0  0  0   1  1   2  2  2     a token sees the ones before it in its own branch and
    in branch 0
    position    0  1  2   3  4   3  4  5

The output head runs only where a token of an ending is predicted. Rows of similar length form a
batch of at most `batch_tokens` positions.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.ops import losses_and_likeliest, token_losses

# Positions in a batch. A CPU likes what fits its caches, a GPU what keeps it busy.
BATCH_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16384}
# GPUs' attention kernels want masks whose width is a multiple of 8.
WIDTH_MULTIPLE = {"cpu": 1}


class Item(NamedTuple):
    """Token ids of a context, at least one, and of its endings, at least one each."""

    context: list[int]
    endings: list[list[int]]


@dataclass
class Row:
    """A context with endings of one item. Equal ones are there once, so that their losses are equal
    too."""

    item: int
    context: list[int]
    endings: list[list[int]]
    choices: list[list[int]]  # for each ending, its indices among the item's endings

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def fit(
    context: list[int], ending: list[int], block_size: int | None
) -> tuple[list[int], list[int]]:
    """Cut on the left, so that the model gets at most block_size tokens: all but the last."""
    if block_size is None or len(context) + len(ending) <= block_size + 1:
        return context, ending
    kept = (context + ending)[-(block_size + 1) :]
    scored = min(len(ending), block_size)
    return kept[:-scored], kept[-scored:]


def make_rows(items: Sequence[Item], block_size: int | None, share: bool) -> list[Row]:
    """All endings of all items. With `share` those of an item are in one row, as far as their
    context is cut alike and the row is no longer than block_size."""
    longest = block_size or math.inf
    rows: list[Row] = []
    for number, item in enumerate(items):
        mine: list[Row] = []
        for choice, whole in enumerate(item.endings):
            first = item.endings.index(whole)
            if first < choice:
                next(c for row in mine for c in row.choices if first in c).append(choice)
                continue
            context, ending = fit(item.context, whole, block_size)
            row = mine[-1] if mine else None
            if share and row and row.context == context and row.length + len(ending) - 1 <= longest:
                row.endings.append(ending)
                row.choices.append([choice])
            else:
                mine.append(Row(number, context, [ending], [[choice]]))
        rows += mine
    return rows


def make_batches(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Batches whose number of rows times longest row is at most batch_tokens (a single row may
    exceed it). The longest come first: memory that does not suffice shows at once."""
    batches: list[list[Row]] = []
    width = 0
    for row in sorted(rows, key=lambda row: -row.length):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = row.length
        batches[-1].append(row)
    return batches


class RowBatch(NamedTuple):
    """B rows padded on the right to T tokens, and the N tokens of their endings."""

    tokens: Tensor  # int64 (B, T)
    positions: Tensor  # int64 (B, T)
    branches: Tensor  # int64 (B, T): 0 context, from 1 on an ending, -1 padding
    sources: Tensor  # int64 (N,): where in the flattened (B * T) an ending's token is predicted
    targets: Tensor  # int64 (N,): that token


def collate(rows: Sequence[Row], width_multiple: int) -> RowBatch:
    width = -(-max(row.length for row in rows) // width_multiple) * width_multiple
    tokens, positions, branches = np.zeros((3, len(rows), width), dtype=np.int64)
    branches[:] = -1
    sources, targets = [], []
    for r, row in enumerate(rows):
        end = n = len(row.context)
        tokens[r, :n], positions[r, :n], branches[r, :n] = row.context, np.arange(n), 0
        for branch, ending in enumerate(row.endings, start=1):
            begin, end = end, end + len(ending) - 1
            tokens[r, begin:end] = ending[:-1]
            positions[r, begin:end] = np.arange(n, n + end - begin)
            branches[r, begin:end] = branch
            sources += [r * width + n - 1, *range(r * width + begin, r * width + end)]
            targets += ending
    return RowBatch(
        *map(torch.from_numpy, (tokens, positions, branches, np.array(sources), np.array(targets)))
    )


def attention_mask(branches: Tensor) -> Tensor:
    """(B, T) -> bool (B, 1, T, T), True where a query (third dimension) sees a key."""
    query, key = branches[:, :, None], branches[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


class Parts(NamedTuple):
    """A model as this file uses it."""

    body: Callable[
        [Tensor, Tensor, Tensor], Tensor
    ]  # tokens, positions, branches (B, T) -> (B, T, anything)
    head: Callable[[Tensor], Tensor]  # (N, anything) -> logits (N, vocabulary)
    packs: bool  # whether the body honours positions and branches, so that endings can share a row
    block_size: int | None  # longest sequence, where known
    vocab_size: int | None  # where known


def take_apart(model: Any) -> Parts:
    """The parts of our GPT, of transformers' GPT-2, or of anything that maps tokens (B, T) to
    logits (B, T, vocabulary): alone, first in a tuple, or as `.logits`. Wrappers of
    DistributedDataParallel and torch.compile are taken off, since they have nothing but a
    forward."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    config = getattr(model, "config", None)
    names = ("block_size", "n_positions", "max_position_embeddings")
    block_size = next((size for name in names if (size := getattr(config, name, None))), None)
    sizes = block_size, getattr(config, "vocab_size", None)

    def ours(tokens: Tensor, positions: Tensor, branches: Tensor) -> Tensor:
        return model.hidden_states(tokens, positions, attention_mask(branches))

    def transformers(tokens: Tensor, positions: Tensor, branches: Tensor) -> Tensor:
        mask = attention_mask(branches)
        if model.config._attn_implementation == "eager":  # adds the mask to the scores
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
        out = model.transformer(
            tokens, position_ids=positions, attention_mask=mask, use_cache=False
        )
        return out.last_hidden_state

    def any_other(tokens: Tensor, positions: Tensor, branches: Tensor) -> Tensor:
        out = model(tokens)
        out = getattr(out, "logits", out)
        return out if isinstance(out, Tensor) else out[0]

    if hasattr(model, "hidden_states") and hasattr(model, "logits"):
        return Parts(ours, model.logits, True, *sizes)
    takes_masks = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    if getattr(config, "model_type", None) == "gpt2" and hasattr(model, "lm_head") and takes_masks:
        return Parts(transformers, model.lm_head, True, *sizes)
    return Parts(any_other, lambda logits: logits, False, *sizes)


class Scores(NamedTuple):
    """Summed losses in nats: sums[i] is that of ending choices[i] of item items[i]."""

    items: np.ndarray  # int64
    choices: np.ndarray  # int64
    sums: np.ndarray  # float64
    greedy: (
        np.ndarray
    )  # bool: whether each token of the ending is the likeliest; False if not asked


def _scores(rows: Sequence[Row], losses: Tensor, is_likeliest: Tensor | None) -> Scores:
    lengths = [len(ending) for row in rows for ending in row.endings]
    starts = np.cumsum([0, *lengths[:-1]])
    sums = np.add.reduceat(losses.cpu().numpy().astype(np.float64), starts)
    greedy = np.zeros(len(sums), bool)
    if is_likeliest is not None:
        greedy = np.logical_and.reduceat(is_likeliest.cpu().numpy(), starts)
    of_endings = zip(sums, greedy, strict=True)
    found = []
    for row in rows:
        for choices, (loss, hit) in zip(row.choices, of_endings, strict=False):
            found += [(row.item, choice, loss, hit) for choice in choices]
    return Scores(*map(np.array, zip(*found, strict=True)))


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """What the batches of `score` are run in: no gradients, and autocast if dtype is a 16-bit one.
    It is entered once around all batches, so that each weight is converted once."""
    lower = dtype in (torch.bfloat16, torch.float16)
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype if lower else None, enabled=lower),
        ):
            yield
    finally:
        torch.clear_autocast_cache()  # an outer autocast would keep tensors that autograd refuses


def score(
    parts: Parts, batches: Iterable[Sequence[Row]], device: torch.device, *, greedy: bool = False
) -> Iterator[Scores]:
    """The losses of all endings, a batch at a time. Each is launched before the results of the one
    before are fetched, so that a GPU always has work. greedy: also whether a greedy reader would
    have written the ending."""
    before = None
    for rows in batches:
        batch = RowBatch(*(x.to(device) for x in collate(rows, WIDTH_MULTIPLE.get(device.type, 8))))
        hidden = parts.body(batch.tokens, batch.positions, batch.branches).flatten(0, 1)
        ends, hits = hidden[batch.sources], None
        if greedy:
            losses, likeliest = losses_and_likeliest(parts.head, ends, batch.targets)
            hits = likeliest == batch.targets
        else:
            losses = token_losses(parts.head, ends, batch.targets)
        if before is not None:
            yield _scores(*before)
        before = rows, losses, hits
    if before is not None:
        yield _scores(*before)
