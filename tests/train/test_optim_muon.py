"""Muon beside AdamW: against the published algorithm, written down here a second time."""

import copy

import pytest
import torch

from model import GPT, GPTConfig
from pretrain.train import optim
from pretrain.train.optim import OPTIMIZERS, SCHEDULES, OptimizerMismatch, make_optimizer, trapezoid

SIZES = {"block_size": 8, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 32}
SETTINGS = {"learning_rate": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES))


def give_gradients(model, seed):
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


def orthogonal(matrix):
    """Keller Jordan's Newton-Schulz iteration, in bfloat16 as published."""
    x = matrix.bfloat16()
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if is_tall else x).float()


class Reference:
    """Muon on one matrix."""

    def __init__(self, weight):
        self.weight, self.momentum = weight.detach().clone(), torch.zeros_like(weight)

    def step(self, gradient, lr):
        self.momentum = 0.95 * self.momentum + 0.05 * gradient
        update = orthogonal(0.95 * self.momentum + 0.05 * gradient)
        rows, columns = self.weight.shape
        self.weight *= 1 - lr * SETTINGS["weight_decay"]
        self.weight -= lr * max(1, rows / columns) ** 0.5 * update


def test_matrices_of_the_blocks_follow_muon_and_queries_keys_values_are_three_of_them():
    model = gpt()
    matrices = {
        name: list(map(Reference, p.split(32) if "c_attn" in name else [p]))
        for name, p in model.named_parameters()
        if ".h." in name and p.dim() == 2
    }
    assert [len(parts) for parts in matrices.values()] == [3, 1, 1, 1] * 2
    optimizer = make_optimizer(model, name="muon", **SETTINGS)
    parameters = dict(model.named_parameters())
    for step in range(4):
        give_gradients(model, step)
        for name, parts in matrices.items():
            gradients = parameters[name].grad.chunk(len(parts))
            for part, gradient in zip(parts, gradients, strict=True):
                part.step(gradient, 0.02 / (step + 1))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (step + 1) * group["lr_scale"]
        optimizer.step()
    for name, parts in matrices.items():
        expected = torch.cat([part.weight for part in parts])
        # bfloat16 rounds the two ways of writing it differently
        torch.testing.assert_close(parameters[name].data, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("numbers_at_a_time", [1, 32 * 32 * 3, 2**25])
def test_matrices_taken_together_are_updated_as_torch_updates_one_after_another(
    numbers_at_a_time, monkeypatch
):
    monkeypatch.setattr(optim, "BATCH_NUMBERS", numbers_at_a_time)
    monkeypatch.setattr(optim, "_computes_in_bfloat16", lambda device: True)  # as torch's always
    random = torch.Generator().manual_seed(3)
    shapes = [(32, 32), (128, 32), (32, 32), (32, 128), (32, 32), (32, 32), (128, 32)]
    mine, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "original"}
    optimizers = optim.Muon(mine, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        # A product in bfloat16 may be rounded otherwise when it is one of several.
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


def test_taking_the_three_as_one_matrix_gives_another_update():
    models = [gpt(), gpt()]
    split, whole = (make_optimizer(model, name="muon", **SETTINGS) for model in models)
    whole.parts["muon"].param_groups[0]["rows"] = None
    for model, optimizer in zip(models, (split, whole), strict=True):
        give_gradients(model, 0)
        model.transformer.h[0].attn.c_attn.weight.grad[:32] *= 100  # queries drown the others
        optimizer.step()
    a, b = (model.transformer.h[0].attn.c_attn.weight.data for model in models)
    assert (a[32:] - b[32:]).abs().max() > 0.002
    assert torch.equal(*(model.transformer.h[0].mlp.c_fc.weight.data for model in models))


def test_everything_else_follows_adamw_at_its_own_share_of_the_rate():
    model, theirs = gpt(), gpt()
    optimizer = make_optimizer(model, name="muon", **SETTINGS)
    named = dict(theirs.named_parameters())
    rest = [name for name, p in named.items() if p.dim() == 1 or ".h." not in name]
    groups = [
        {"params": [named[n] for n in rest if named[n].dim() == 2], "weight_decay": 0.1},
        {"params": [named[n] for n in rest if named[n].dim() == 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.02 * optim.ADAMW_SHARE, betas=(0.8, 0.95))
    for step in range(3):
        for each, stepper in ((model, optimizer), (theirs, plain)):
            give_gradients(each, step)
            stepper.step()
    for name in rest:
        mine = dict(model.named_parameters())[name]
        torch.testing.assert_close(mine.data, named[name].data, atol=1e-6, rtol=1e-5)


class Tiny(torch.nn.Module):
    """A model that says for itself what is what."""

    def __init__(self, forget=False):
        super().__init__()
        self.forget = forget
        self.embedding = torch.nn.Embedding(10, 8)
        self.inner = torch.nn.Linear(8, 8, bias=False)
        self.gain = torch.nn.Parameter(torch.ones(8))

    def optimizer_groups(self):
        adamw = {"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.001}
        return [
            {"params": [self.inner.weight], "optimizer": "muon", "weight_decay": 0.05},
            {"params": [self.embedding.weight], "lr_scale": 28.0, **adamw},
            {"params": [] if self.forget else [self.gain], "lr_scale": 0.6, **adamw},
        ]


def test_a_model_may_say_which_parameters_learn_how_and_how_fast():
    optimizer = make_optimizer(Tiny(), name="muon", **SETTINGS)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.02, 0.56, 0.012])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.001, 0.001]
    assert optimizer.param_groups[1]["eps"] == 1e-10
    frozen = Tiny()
    frozen.embedding.weight.requires_grad_(False)
    assert len(make_optimizer(frozen, name="muon", **SETTINGS).param_groups) == 2


def test_a_parameter_in_no_group_or_in_two_is_named():
    with pytest.raises(ValueError, match="in no parameter group, or in two: gain"):
        make_optimizer(Tiny(forget=True), name="muon", **SETTINGS)
    model = Tiny()
    groups = model.optimizer_groups()
    model.optimizer_groups = lambda: [*groups, {"params": [model.gain], "optimizer": "adamw"}]
    with pytest.raises(ValueError, match="gain"):
        make_optimizer(model, name="muon", **SETTINGS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name, tmp_path):
    model, other = gpt(), gpt()
    optimizer = make_optimizer(model, name=name, **SETTINGS)

    def train(model, optimizer, steps):
        for step in steps:
            give_gradients(model, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(p.grad is None for p in model.parameters())

    train(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    saved = torch.load(tmp_path / "c", weights_only=True)
    resumed = make_optimizer(other, name=name, **SETTINGS)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_another_optimizer_is_refused():
    optimizer = make_optimizer(gpt(), name="muon", **SETTINGS)
    plain = make_optimizer(gpt(), **SETTINGS)
    with pytest.raises(OptimizerMismatch, match="another optimizer"):
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))


def test_gradient_scaling_and_clipping_see_all_parts():
    model = gpt()
    optimizer = make_optimizer(model, name="muon", **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randint(100, (2, 8))
    scaler.scale(model(x, x)[1]).backward()
    scaled = [p.grad.clone() for p in model.parameters()]
    scaler.unscale_(optimizer)
    for parameter, before in zip(model.parameters(), scaled, strict=True):
        assert torch.equal(parameter.grad, before / 2**10)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    model.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)  # an overflow of one part leaves the update of all parts out
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)


def test_a_model_learns_a_batch_by_heart_under_muon():
    """Fifteen steps on one batch: a fall that no wrong sign or scale would give."""
    model = gpt()
    optimizer = make_optimizer(model, name="muon", **SETTINGS)
    x = torch.randint(100, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        loss = model(x, x)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0


def test_a_trapezoid_rises_stays_and_falls_in_straight_lines():
    settings = {"max_lr": 1.0, "warmup_iters": 4, "lr_decay_iters": 20, "decay_share": 0.25}
    rates = [trapezoid(step, **settings) for step in range(22)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:16] == [1.0] * 12
    assert rates[16:20] == pytest.approx([0.8, 0.6, 0.4, 0.2]) and rates[20:] == [0.0, 0.0]


def test_every_schedule_takes_the_same_settings_and_ends_at_the_minimum():
    for schedule in SCHEDULES.values():
        settings = {"max_lr": 1.0, "min_lr": 0.1, "warmup_iters": 5, "lr_decay_iters": 5}
        assert schedule(0, **settings) == pytest.approx(1 / 6)
        assert schedule(5, **settings) == schedule(10**9, **settings) == 0.1
