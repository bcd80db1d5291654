"""Tokens from a model, with a key-value cache.

    for tokens in stream(model, prompts, 100, temperature=0.8, top_k=50, seed=1):    # (B,) each
        ...
    tokens = generate(model, prompts, 100, temperature=0)                            # greedy

The model is an argument: a model.GPT, which offers both as methods.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def stream(
    model: Any,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    slide: int = 1,
) -> Iterator[Tensor]:
    """Yield the next token of every prompt, int64 (B,), up to max_new_tokens times.

    prompts: int64 (B, T) or (T,), or a list of (T,) of any lengths. temperature: 0 is greedy.
    top_k: draw from the k likeliest tokens. top_p: draw from the fewest likeliest tokens whose
    probabilities reach p. The random numbers are from a generator of their own, seeded with `seed`
    (None: differently each time); global ones are not touched. stop_token: a row that has produced
    it repeats it, and the stream ends when every row has.

    The model sees the last block_size tokens. Its positions are absolute, so once the context moves
    it has to be computed anew. slide=1 does that at every token, as if there were no cache. slide=k
    moves on by k tokens at a time, computing anew every k tokens; the context is then between
    block_size - k + 1 and block_size tokens long.

    Computed in the number format of the weights, or of the autocast around it, in eval mode. Raises
    ValueError.
    """
    _check(temperature, top_k, top_p, slide, model.config.block_size)
    tokens, padding = _left_pad(prompts, model.device)
    is_padded = bool(padding.any())
    generator = torch.Generator(model.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=model.device)
    start, cache = 0, None
    for _ in range(max_new_tokens):
        if tokens.size(1) - start > model.config.block_size:
            start, cache = tokens.size(1) - model.config.block_size + slide - 1, None
        context = tokens[:, start:]
        with evaluating(model):
            cache = cache or model.new_cache(len(tokens))
            new = context[:, cache.length :]
            where = (
                _among_padding(context.size(1), new.size(1), padding - start) if is_padded else ()
            )
            hidden = model.hidden_states(new, *where, cache=cache)
            logits = model.logits(hidden[:, -1])
        token = _sample(logits.float(), temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = token.masked_fill(ended, stop_token)
            ended |= token == stop_token
        yield token
        if stop_token is not None and ended.all():
            return
        tokens = torch.cat((tokens, token[:, None]), dim=1)


def generate(
    model: Any, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **sampling
) -> Tensor | list[Tensor]:
    """Prompts with up to max_new_tokens new tokens behind each, on the model's device; `sampling`
    as in stream.

    A tensor (T,) or (B, T) gives one of the same dimensions, in which rows that stopped early are
    filled up with stop_token. A list gives a list of 1-D tensors, each ending with stop_token if it
    came to that.
    """
    new = list(stream(model, prompts, max_new_tokens, **sampling))
    if isinstance(prompts, Tensor):
        columns = new if prompts.dim() == 1 else [tokens[:, None] for tokens in new]
        return torch.cat((prompts.to(model.device), *columns), dim=-1)
    stop = sampling.get("stop_token")
    rows = []
    for i, prompt in enumerate(prompts):
        row = [int(tokens[i]) for tokens in new]
        if stop in row:
            row = row[: row.index(stop) + 1]
        rows.append(
            torch.cat((prompt.to(model.device), prompt.new_tensor(row, device=model.device)))
        )
    return rows


def _check(
    temperature: float, top_k: int | None, top_p: float | None, slide: int, block_size: int
) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} is not a number from 0 (greedy) on")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is not at least 1 (None: all tokens)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not above 0 and at most 1")
    if not 1 <= slide <= block_size:
        raise ValueError(f"slide {slide} is not from 1 to block_size {block_size}")


def _left_pad(prompts: Tensor | Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one int64 (B, T), and how many tokens on the left of each row are padding,
    (B,)."""
    rows = [prompts] if isinstance(prompts, Tensor) and prompts.dim() == 1 else list(prompts)
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) == 0:
        raise ValueError("a prompt needs a token; where there is none, begin with end-of-text")
    longest = max(lengths)
    tokens = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    return tokens.to(device), torch.tensor([longest - length for length in lengths], device=device)


def _among_padding(num_keys: int, num_queries: int, padding: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids (B, queries) and attn_mask (B, 1, queries, keys) of the last queries among keys
    whose first padding[b] (none if negative) do not exist."""
    padding = padding.clamp(min=0)[:, None]
    key = torch.arange(num_keys, device=padding.device)
    query = key[-num_queries:]
    # Padding attends to itself: without any key it would become NaN, and that would spread.
    is_key = (key >= padding)[:, None, :] | (key == query[:, None])
    mask = is_key & (key <= query[:, None])
    return (query - padding).clamp(min=0), mask[:, None]


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Logits (B, vocab_size), float32 -> tokens (B,)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature  # no overflow, however cold
    tokens = None  # in the order of their columns, where these are no longer all
    if top_k is not None and top_k < logits.size(1):
        logits, tokens = logits.topk(top_k)  # with 50 of 50,257 a sixth of the time
    probs = logits.softmax(dim=1)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=1, descending=True)
        likelier = ordered.cumsum(dim=1) - ordered  # probability of all likelier tokens together
        probs = torch.zeros_like(probs).scatter_(
            1, order, ordered.masked_fill(likelier >= top_p, 0.0)
        )
    drawn = torch.multinomial(probs, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode inside, and back to the mode of before; nothing for what has no modes."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
