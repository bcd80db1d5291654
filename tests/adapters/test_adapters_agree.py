"""The same flags give the same run in train_gpt2.py and in the three frameworks' trainers."""

import pytest
from lazily import Lazily
from tiny_runs import flags, logged

import train_gpt2

state = Lazily("accelerate.state")
TRAINERS = {
    name: Lazily(f"adapters.{name}")
    for name in ("hf_trainer", "accelerate_loop", "lightning_module")
}
CHANGES = {
    "max_iters": 20,
    "lr_decay_iters": 20,
    "warmup_iters": 3,
    "eval_interval": 10,
    "n_layer": 2,
}


@pytest.fixture(scope="module")
def ours(data_dir, tmp_path_factory):
    """20 updates of 64 tokens in train_gpt2.py: most of the windows."""
    out_dir = tmp_path_factory.mktemp("ours")
    device = ["--device", "cpu", "--no-hellaswag", "--no-compile"]
    assert train_gpt2.main(flags(data_dir, out_dir, **CHANGES) + device) == 0
    return out_dir


@pytest.mark.parametrize("name", TRAINERS)
def test_twenty_losses_are_those_of_the_training_script(name, data_dir, ours, tmp_path):
    state.AcceleratorState._reset_state(reset_partial_state=True)
    assert TRAINERS[name].main([*flags(data_dir, tmp_path, **CHANGES), "--cpu"]) == 0
    losses, expected = logged(tmp_path), logged(ours)
    assert list(losses) == list(range(1, 21))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert expected[20] < expected[1] - 0.5  # they have something to agree on
    rates = logged(tmp_path, name="learning_rate")
    assert rates == pytest.approx(logged(ours, name="learning_rate"), rel=1e-6)
    validation = logged(ours, "eval", "val_loss")
    assert logged(tmp_path, "eval", "val_loss") == pytest.approx(
        {step: validation[step] for step in (10, 20)}, abs=1e-4
    )
