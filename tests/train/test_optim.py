"""The optimizer: what decays, and AdamW as torch computes it parameter by parameter."""

import copy

import pytest
import torch

from model import GPT, GPTConfig
from pretrain.train.optim import make_optimizer, parameter_groups

SIZES = {"block_size": 8, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 32}


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES))


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_and_embeddings_decay_biases_and_norms_do_not(bias):
    model = GPT(GPTConfig(**SIZES, bias=bias))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    expected = ["transformer.wte.weight", "transformer.wpe.weight"] + [
        f"transformer.h.{layer}.{matrix}.weight"
        for layer in range(2)
        for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert [names[p] for p in decaying["params"]] == expected
    rest = [names[p] for p in others["params"]]
    assert sorted(expected + rest) == sorted(names.values())
    assert all(name.endswith("bias") or ".ln_" in name for name in rest)


def test_frozen_parameters_are_left_out():
    model = gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    parameters = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(parameters) == len(list(model.parameters())) - 1
    assert all(p is not model.transformer.wpe.weight for p in parameters)


def test_updates_are_those_of_adamw_without_fusion():
    ours, theirs = gpt(), gpt()
    optimizer = make_optimizer(ours, learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.9),
        fused=False,
        foreach=False,
    )
    for step in range(10):
        torch.manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()
        plain.step()
    start = gpt()
    before = dict(start.named_parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert (a - before[name]).abs().max() > 0.005, name


def test_weight_decay_alone_shrinks_matrices_and_nothing_else():
    model = gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.5, weight_decay=0.2, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.data, before[name] * (0.9 if parameter.dim() == 2 else 1.0)
        )


def test_the_state_of_one_optimizer_fits_another_of_the_same_configuration():
    models = [gpt(), gpt()]
    first, second = (
        make_optimizer(m, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95)) for m in models
    )

    def train(model, optimizer, seed):
        x = torch.randint(100, (2, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x, x)[1].backward()
        optimizer.step()

    train(models[0], first, 0)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # else they would share it
    for model, optimizer in zip(models, (first, second), strict=True):
        train(model, optimizer, 1)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
