"""What a processor is spared: products with few rows, and logits that never exist all at once.

    loss = linear_cross_entropy(hidden, wte, targets, vocab_size)      # hidden (N, C), targets (N,)
    losses, likeliest = score_head(hidden, wte, targets, vocab_size)   # (N,) each, no gradients

Logits of GPT-2 are 50,257 numbers a token: those of a batch would be larger than everything else
that training keeps. Here a part of them exists at a time, its loss is taken, its gradient is formed
at once, and it is forgotten. Results are those of torch.nn.functional.linear and cross_entropy.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Linear",
    "linear",
    "linear_cross_entropy",
    "losses_and_likeliest",
    "residual",
    "score_head",
    "soft_capped",
    "token_losses",
]


class Linear(nn.Linear):
    """nn.Linear by way of linear()."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out).

    With 1 to 4 rows in float32 on a CPU, that is in generation, MKL (2024.2) is single-threaded or
    slow: as a batch of two halves of the weight the product is 2 to 6 times as fast.
    """
    rows = x.numel() // x.size(-1)
    if (
        not 0 < rows <= 4
        or len(weight) % 2
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t().expand(2, -1, -1)
    y = torch.bmm(weight.unflatten(0, (2, -1)), columns).flatten(0, 1).t()
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def residual(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The residual stream in dtype, if autocast computes in that here, else as it is. What blocks
    add to it is of that dtype too, so it stays so."""
    kind = x.device.type
    if dtype is None or not torch.is_autocast_enabled(kind):
        return x
    return x.to(dtype) if torch.get_autocast_dtype(kind) == dtype else x


# ---- The output head: hidden states to losses, a part of the logits at a time


class _Parts(NamedTuple):
    """How much of the output head is computed at a time."""

    rows: int  # of logits in memory
    softmax_rows: int  # of them taken through the softmax
    vocab: int  # rows of the weight's gradient

    @classmethod
    def on(cls, device: str, rows: int = 0) -> "_Parts":
        """rows: those of logits, 0 for what suits the device."""
        if device != "cpu":
            rows = rows or 8192
            return cls(rows, rows if torch.compiler.is_compiling() else 2048, 1 << 30)
        if torch.compiler.is_compiling():
            return cls(rows or 512, rows or 512, 1 << 30)
        # Few, so that intermediate results stay in the processor's caches.
        return cls(rows or 512, 8, 4096)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    rows: int = 0,
) -> Tensor:
    """Mean cross entropy, a float32 scalar, of the logits hidden @ weight[:vocab_size].T + bias.

    hidden (N, C); weight (rows, C) with rows >= vocab_size: further ones only pad, take no part and
    get no gradient; targets int64 (N,), of which negative ones do not count; bias (vocab_size,).
    Value and gradients are those of F.cross_entropy, NaN included where every target is negative.
    weights, float (N,), multiply the losses and are constants in the backward pass:
    sum(weights * loss) / count of targets. soft_cap c bounds the logits: see soft_capped.

    rows: of logits that exist at a time, by default what suits the device. Where it is given, the
    products that add up to the weight's gradient are taken in float32 rather than rounded to the
    dtype of the computation: many rows are few products, so that this costs little.
    """
    counted = targets >= 0
    weights = counted.float() if weights is None else counted * weights
    bias = _padded(bias, len(weight))
    if torch.is_grad_enabled():
        total = _SummedCrossEntropy.apply(
            hidden, weight, bias, targets.clamp(min=0), weights, vocab_size, soft_cap, rows
        )
    else:
        losses = token_losses(_head(weight, bias, vocab_size, soft_cap), hidden, targets)
        total = (losses * weights).sum()
    return total / counted.sum()


@torch.no_grad()
def score_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses in nats, float32 (N,), 0 at negative targets, and the likeliest tokens, int64 (N,).

    The scoring twin of linear_cross_entropy, with its arguments; without gradients.
    """
    head = _head(weight, _padded(bias, len(weight)), vocab_size, soft_cap)
    return losses_and_likeliest(head, hidden, targets)


def losses_and_likeliest(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """What token_losses returns, and the likeliest tokens, int64 (N,)."""
    losses, likeliest = [], []
    for logits, target in _logits_in_parts(head, hidden, targets):
        losses.append(F.cross_entropy(logits, target, ignore_index=-1, reduction="none"))
        likeliest.append(logits.argmax(1))
    return torch.cat(losses), torch.cat(likeliest)


def token_losses(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Losses in nats, float32 (N,), 0 at negative targets, by any head: hidden (n, ...) -> logits
    (n, vocabulary). Take the rows of interest before: the head runs on all that it is given."""
    losses = [
        F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
        for logits, target in _logits_in_parts(head, hidden, targets)
    ]
    return torch.cat(losses)


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """cap * x / sqrt(x^2 + cap^2): x where it is small, never beyond cap (modded-nanoGPT's form of
    Gemma 2's cap * tanh(x / cap))."""
    return logits * (cap * torch.rsqrt(logits.square() + cap**2))


def _padded(bias: Tensor | None, rows: int) -> Tensor | None:
    return bias if bias is None else F.pad(bias, (0, rows - len(bias)))


def _head(
    weight: Tensor, bias: Tensor | None, vocab_size: int, soft_cap: float | None
) -> Callable[[Tensor], Tensor]:
    def head(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)[:, :vocab_size]
        return logits if soft_cap is None else soft_capped(logits.float(), soft_cap)

    return head


def _logits_in_parts(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """float32 logits (n, vocabulary) and targets (n,), in which every negative one is -1."""
    parts = _Parts.on(hidden.device.type)
    for h, target in zip(hidden.split(parts.rows), targets.split(parts.rows), strict=True):
        split = head(h).split(parts.softmax_rows), target.clamp(min=-1).split(parts.softmax_rows)
        for logits, t in zip(*split, strict=True):
            yield logits.float(), t


class _SummedCrossEntropy(torch.autograd.Function):
    """sum_i weights_i * cross_entropy(logits_i, targets_i), logits = hidden @ weight.T + bias.

    The gradient of a chunk's logits, softmax - one_hot, is formed while they exist, which leaves
    backward with a product with a scalar. Its entries are of order 1 whatever the loss scale, so
    float16 holds them. Weights may be of any size, and in forward the loss scaler, which
    acts on the gradient, cannot help: so they are divided by `unit` until backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, vocab_size, soft_cap, rows):  # noqa: PLR0917
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        parts, is_exact = _Parts.on(device, rows), rows > 0
        unit = _unit(weights, dtype)
        losses, d_hidden, d_weight = (
            torch.empty_like(weights),
            torch.empty_like(hidden),
            torch.zeros_like(weight),
        )
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        d_bias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), parts.rows):
                part = slice(start, start + parts.rows)
                h, scale = hidden[part].to(dtype), weights[part, None] / unit
                logits = F.linear(h, w, b)
                split = (t.split(parts.softmax_rows) for t in (logits, targets[part], losses[part]))
                for some, target, loss in zip(*split, strict=True):
                    loss.copy_(_logits_to_gradient(some, target, vocab_size, soft_cap))
                d_hidden[part] = (logits @ w) * scale
                h = (h * scale).to(dtype)
                split = (d_weight.split(parts.vocab), logits.split(parts.vocab, dim=1))
                for d, d_logits in zip(*split, strict=True):
                    d += _in_float32(d_logits.t(), h) if is_exact else d_logits.t() @ h
                if d_bias is not None:
                    d_bias += logits.t() @ scale[:, 0].to(dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, unit)
        return (losses * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight, d_bias, unit = ctx.saved_tensors
        grad = grad * unit
        if d_bias is not None:
            d_bias.mul_(grad)
        # Scaled in place: they are as large as the weights.
        return d_hidden.mul_(grad), d_weight.mul_(grad), d_bias, None, None, None, None, None


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: the sums of a product of 16-bit numbers are float32, and stay so."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _unit(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What the weights of a float16 head are divided by, a scalar; 1 for formats of wide range.

    The largest weight becomes 1/64: a sum over 8192 rows of a chunk then stays below 65504, and
    what it loses at the lower end is 2e-6 of a hidden state of 1.
    """
    if dtype != torch.float16 or not len(weights):
        return weights.new_ones(())
    largest = weights.abs().amax()
    return 64 * torch.where(largest > 0, largest, 1.0)


def _logits_to_gradient(
    logits: Tensor, target: Tensor, vocab_size: int, soft_cap: float | None
) -> Tensor:
    """Losses (rows,) of logits (rows, padded vocabulary), which become their own gradient in place:
    softmax - one_hot, times the derivative of the soft cap."""
    target = target[:, None]
    x = logits.float()
    slope = None
    if soft_cap is not None:  # with r = c / sqrt(x^2 + c^2): x r, whose derivative is r^3
        ratio = soft_cap * torch.rsqrt(x.square() + soft_cap**2)
        x, slope = x * ratio, ratio**3
    x[:, vocab_size:] = -torch.inf
    top, at_target = x.amax(1, keepdim=True), x.gather(1, target)
    probs = x.softmax(1)
    # log p of the target by way of the likeliest token, whose probability does not underflow: one
    # exp per logit, where log_softmax and its exp take two.
    log_p = at_target - top + probs.amax(1, keepdim=True).log()
    p_less_1 = log_p.expm1()  # exact where p is near 1
    if slope is not None:
        probs, p_less_1 = probs * slope, p_less_1 * slope.gather(1, target)
    logits.copy_(probs)
    logits.scatter_(1, target, p_less_1.to(logits.dtype))
    return -log_p[:, 0]
