"""pretrain/ops.py against torch's linear and cross entropy on all logits at once, with autograd."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.ops import (
    linear,
    linear_cross_entropy,
    residual,
    score_head,
    soft_capped,
    token_losses,
)


@pytest.mark.parametrize(
    "shape", [(1,), (1, 1), (3, 1), (2, 2), (1, 5), (6, 1), (0, 1), ()], ids=str
)
@pytest.mark.parametrize("out_features", [6, 7])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_a_product_with_any_number_of_rows_is_that_of_torch(shape, out_features, has_bias):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, 5),
        torch.randn(out_features, 5),
        torch.randn(out_features),
    )
    bias = bias if has_bias else None
    product = linear(x, weight, bias)
    assert product.shape == (*shape, out_features)
    torch.testing.assert_close(product, F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


def plain_loss(hidden, weight, targets, weights=None):
    """The formula, on all logits at once."""
    logits = (hidden @ weight.t()).float()
    losses = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
    return (losses if weights is None else losses * weights).sum() / (targets >= 0).sum()


# --- The loss


@pytest.mark.parametrize("kind", ["plain", "ignored", "weighted", "ignored and weighted"])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_the_plain_formula(kind):
    hidden, weight, targets, weights = loss_inputs(kind)
    losses, gradients = [], []
    for formula in (
        plain_loss,
        lambda h, w, *rest: linear_cross_entropy(h, F.pad(w, (0, 0, 0, 124)), *rest),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        vocab_size = () if formula is plain_loss else (len(weight),)
        loss = formula(h, w, targets, *vocab_size, weights)
        (3 * loss).backward()
        losses.append(loss)
        gradients.append((h.grad, w.grad))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(
            ours, expected, atol=1e-3 * expected.abs().mean().item(), rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["plain", "ignored and weighted"])
def test_the_loss_under_autocast_is_that_of_the_plain_formula_within_the_rounding_of_bfloat16(kind):
    hidden, weight, targets, weights = loss_inputs(kind)
    exact_h, exact_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = plain_loss(exact_h, exact_w, targets, weights)
    exact.backward()
    h, padded = hidden.clone().requires_grad_(), F.pad(weight, (0, 0, 0, 124)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, padded, targets, len(weight), weights)
    loss.backward()
    assert loss.dtype == h.grad.dtype == padded.grad.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0, rtol=3e-3)
    for ours, expected in ((h.grad, exact_h.grad), (padded.grad[: len(weight)], exact_w.grad)):
        assert (ours - expected).norm() < 0.01 * expected.norm()


def loss_inputs(kind):
    """More rows and more vocabulary than are computed at a time."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (1030, 4100))
    targets = torch.randint(4100, (1030,), generator=generator)
    if "ignored" in kind:
        targets[::3], targets[1::30] = -1, -100
    weights = 2 * torch.rand(1030, generator=generator) if "weighted" in kind else None
    return hidden, weight, targets, weights


def test_the_loss_is_exact_where_the_model_is_very_sure_or_very_wrong():
    hidden, weight = 400 * torch.eye(4, 8), torch.eye(8).requires_grad_()
    targets = torch.tensor([0, 7, 2, 7])  # right, wrong, right, wrong
    for part in (slice(0, 1), slice(1, 2), slice(0, 4)):
        padded = F.pad(weight, (0, 0, 0, 120))
        loss = linear_cross_entropy(hidden[part], padded, targets[part], 8)
        expected = plain_loss(hidden[part], weight, targets[part])
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(each, weight)[0] for each in (loss, expected)]
        torch.testing.assert_close(*gradients)


# --- Bias, soft cap, number formats: every combination against autograd

FORMATS = {  # number format of the inputs, of autocast around, error allowed of a gradient's norm
    "float32": (torch.float32, None, 1e-5),
    "bfloat16": (torch.bfloat16, None, 0.02),
    "float16": (torch.float16, None, 4e-3),
    "autocast to bfloat16": (torch.float32, torch.bfloat16, 0.02),
    "autocast to float16": (torch.float32, torch.float16, 4e-3),
}


def all_logits(hidden, weight, bias, soft_cap):
    logits = F.linear(hidden, weight, bias)
    return logits if soft_cap is None else soft_cap * logits / (logits**2 + soft_cap**2).sqrt()


def plain_cross_entropy(hidden, weight, targets, weights, bias=None, soft_cap=None):  # noqa: PLR0917
    logits = all_logits(hidden, weight, bias, soft_cap)
    losses = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
    return (losses if weights is None else losses * weights).sum() / (targets >= 0).sum()


@pytest.mark.parametrize("soft_cap", [None, 5.0], ids=["", "capped"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", ["plain", "ignored and weighted"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_value_and_gradients_are_those_of_torch_with_bias_and_soft_cap(
    number_format, kind, has_bias, soft_cap
):
    dtype, autocast, tolerance = FORMATS[number_format]
    hidden, weight, targets, weights = loss_inputs(kind)
    hidden, targets = hidden[:520], targets[:520]  # more than one chunk, and quick
    weights = None if weights is None else weights[:520]
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), torch.randn(4100).to(dtype)
    inputs = [hidden, weight, *([bias] if has_bias else [])]
    exact = [x.double().requires_grad_() for x in inputs]
    expected = plain_cross_entropy(
        *exact[:2], targets, weights, exact[2] if has_bias else None, soft_cap
    )
    (3 * expected).backward()
    ours = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = linear_cross_entropy(
            ours[0],
            F.pad(ours[1], (0, 0, 0, 124), value=7.0),  # rows that must take no part
            targets,
            4100,
            weights,
            bias=ours[2] if has_bias else None,
            soft_cap=soft_cap,
        )
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for x, y in zip(ours, exact, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - y.grad).norm() < tolerance * y.grad.norm()


@pytest.mark.parametrize("soft_cap", [None, 5.0], ids=["", "capped"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_scores_are_the_losses_and_likeliest_tokens_of_all_logits(has_bias, soft_cap):
    hidden, weight, targets, _ = loss_inputs("ignored")
    bias = torch.randn(4100) if has_bias else None
    logits = all_logits(hidden, weight, bias, soft_cap)
    expected = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
    padded = F.pad(weight, (0, 0, 0, 124), value=7.0).requires_grad_()
    losses, likeliest = score_head(hidden, padded, targets, 4100, bias=bias, soft_cap=soft_cap)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert not losses[targets < 0].any()
    assert torch.equal(likeliest, logits.argmax(1))
    with torch.no_grad():
        mean = linear_cross_entropy(hidden, padded, targets, 4100, bias=bias, soft_cap=soft_cap)
    torch.testing.assert_close(mean, expected.sum() / (targets >= 0).sum())


def test_any_head_gives_the_losses_of_chosen_rows():
    hidden, weight, targets, _ = loss_inputs("plain")
    rows = torch.arange(5, 1030, 7)
    asked = []

    def head(h):
        asked.append(len(h))
        return h @ weight.t()

    losses = token_losses(head, hidden[rows], targets[rows])
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")[rows]
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert sum(asked) == len(rows)


def test_a_soft_cap_bounds_logits_and_leaves_small_ones_as_they_are():
    x = torch.tensor([-1e4, -15.0, -0.01, 0.0, 0.01, 15.0, 1e4])
    capped = soft_capped(x, 15.0)
    assert capped.abs().max() <= 15
    torch.testing.assert_close(capped[2:5], x[2:5], atol=0, rtol=1e-5)
    torch.testing.assert_close(capped[5].item(), 15 / 2**0.5)
    cap = 15 * x / (x**2 + 225).sqrt()
    torch.testing.assert_close(capped, cap)


# --- float16: what the loss scaler cannot help with must not happen


@pytest.mark.parametrize("weight_of_key_tokens", [1000.0, 1e5, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_key_tokens_of_any_weight_leave_gradients_finite_and_right_in_16_bits(
    weight_of_key_tokens, dtype
):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (600, 200))
    hidden, weight = 50 * hidden, weight / 50
    targets = torch.randint(200, (600,), generator=generator)
    weights = torch.where(torch.arange(600) % 3 == 0, weight_of_key_tokens, 1.0)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    plain_cross_entropy(*exact, targets, weights).backward()
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(*ours, targets, 200, weights)
    loss.backward()
    for x, y in zip(ours, exact, strict=True):
        assert x.grad.isfinite().all()
        assert (x.grad.double() - y.grad).norm() < 0.02 * y.grad.norm()


def test_many_rows_of_one_surprising_token_do_not_overflow_float16_before_the_scaler_acts():
    hidden = torch.full((4096, 8), 60.0)  # its row of the gradient is a sum over the chunk
    weight = torch.zeros(128, 8)
    targets = torch.full((4096,), 3)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(*ours, targets, 128, torch.full((4096,), 30.0))
    loss.backward()
    expected = 30 * 60.0 * (1 / 128 - 1)
    torch.testing.assert_close(ours[1].grad[3], torch.full((8,), expected), rtol=2e-3, atol=0)


def test_weights_of_zero_give_gradients_of_zero_in_float16():
    hidden, weight, targets, _ = loss_inputs("plain")
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(*ours, targets, 4100, torch.zeros(1030))
    loss.backward()
    assert loss == 0
    assert not any(x.grad.any() for x in ours)


# --- Rows at a time, and a residual stream in 16 bits


def head_gradients(rows, dtype=torch.bfloat16):
    """(loss, gradient of hidden, of weight) of numbers that bfloat16 holds; float64: the truth."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16).bfloat16().to(torch.float32) for n in (512, 128))
    if dtype == torch.float64:
        hidden, weight = hidden.double(), weight.double()
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(100, (512,))
    if dtype == torch.float64:
        loss = plain_loss(hidden, weight[:100] / 10, targets)
    else:
        with torch.autocast("cpu", dtype):
            loss = linear_cross_entropy(hidden, weight / 10, targets, 100, rows=rows)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def test_with_rows_given_the_heads_gradient_is_added_up_in_float32_and_nearer_to_the_truth():
    _, _, truth = head_gradients(0, torch.float64)
    errors = {rows: (head_gradients(rows)[2] - truth).norm().item() for rows in (0, 64, 4096)}
    assert max(errors[64], errors[4096]) < 0.7 * errors[0]


@pytest.mark.parametrize("rows", [64, 500, 4096])
def test_the_number_of_rows_at_a_time_changes_nothing_but_rounding(rows):
    for ours, expected in zip(head_gradients(rows), head_gradients(0), strict=True):
        torch.testing.assert_close(ours, expected, atol=3e-4, rtol=0.02)


def test_the_residual_stream_is_in_16_bits_only_where_autocast_computes_in_them():
    x = torch.ones(2)
    assert residual(x, None) is x and residual(x, torch.bfloat16) is x
    with torch.autocast("cpu", torch.float16):
        assert residual(x, torch.bfloat16) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert residual(x, torch.bfloat16).dtype == torch.bfloat16 and residual(x, None) is x
