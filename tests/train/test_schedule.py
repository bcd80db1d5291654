import math

import pytest

from pretrain.train.optim import learning_rate

GPT2 = {"max_lr": 6e-4, "min_lr": 6e-5, "warmup_iters": 2000, "lr_decay_iters": 600_000}


def test_warmup_rises_in_equal_steps_from_above_zero_to_the_maximum():
    settings = {"max_lr": 1.0, "min_lr": 0.1, "warmup_iters": 4, "lr_decay_iters": 10}
    rates = [learning_rate(step, **settings) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_middle_of_the_decay_is_halfway_between_maximum_and_minimum():
    middle = (GPT2["warmup_iters"] + GPT2["lr_decay_iters"]) // 2
    assert learning_rate(middle, **GPT2) == pytest.approx((6e-4 + 6e-5) / 2)


def test_the_decay_agrees_with_torchs_cosine_annealing():
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=6e-5)
    for step in range(10, 61):
        ours = learning_rate(step, max_lr=6e-4, min_lr=6e-5, warmup_iters=10, lr_decay_iters=60)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_after_the_decay_the_rate_stays_at_the_minimum():
    assert learning_rate(600_000, **GPT2) == learning_rate(10**9, **GPT2) == 6e-5


def test_warmup_and_decay_may_be_empty():
    assert learning_rate(0, max_lr=1.0, min_lr=0.1, warmup_iters=0, lr_decay_iters=0) == 0.1
    assert learning_rate(0, max_lr=1.0, min_lr=0.1, warmup_iters=0, lr_decay_iters=10) == 1.0
    assert learning_rate(5, max_lr=1.0, min_lr=0.1, warmup_iters=5, lr_decay_iters=5) == 0.1


def test_the_rate_never_rises_after_warmup_nor_leaves_its_bounds():
    rates = [learning_rate(step, **GPT2) for step in range(2000, 600_001, 997)]
    assert rates == sorted(rates, reverse=True)
    assert all(6e-5 <= rate <= 6e-4 and math.isfinite(rate) for rate in rates)
