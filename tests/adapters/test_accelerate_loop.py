"""The loop in Accelerate's idiom: on one process and on two, interrupted and resumed."""

import os
import sys
from pathlib import Path

import forked
import pytest
import torch
from lazily import Lazily
from tiny_runs import flags, initial_model, logged, plain_loop, validation_loss

from model import GPT

ROOT = Path(__file__).parents[2]
accelerate, state = Lazily("accelerate"), Lazily("accelerate.state")
accelerate_loop = Lazily("adapters.accelerate_loop")


@pytest.fixture(autouse=True)
def alone():
    """Accelerate as if no other test had configured it."""
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The folder of a finished run on one process."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    out_dir = tmp_path_factory.mktemp("run")
    assert train(data_dir, out_dir) == 0
    return out_dir


def train(data_dir, out_dir, *more, **changes):
    return accelerate_loop.main([*flags(data_dir, out_dir, **changes), "--cpu", *more])


def test_losses_are_those_of_a_plain_loop(data_dir, run):
    losses, val_loss = plain_loop(data_dir)
    assert list(logged(run).values()) == pytest.approx(losses, abs=1e-5)
    assert logged(run, "eval", "val_loss")[4] == pytest.approx(val_loss, abs=1e-5)


def test_two_processes_train_and_evaluate_like_one_with_twice_the_micro_batches(
    data_dir, run, tmp_path
):
    """The five validation windows are three batches: the processes have different shares of them.
    Learning rates are compared too: a prepared scheduler would be stepped by every process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "adapters.accelerate_loop", "--cpu"]
    command += flags(data_dir, tmp_path, gradient_accumulation_steps=1)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = forked.run(
        command,
        popen=forked.AdapterPopen,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step      4/4 | loss") == 1  # one process speaks
    for event, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "val_loss")):
        assert logged(tmp_path, event, name) == pytest.approx(logged(run, event, name), abs=1e-5)
    assert (tmp_path / "step-4" / "random_states_1.pkl").exists()
    assert logged(tmp_path, name="tokens") == logged(run, name="tokens")


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data_dir, run, tmp_path, capsys):
    assert train(data_dir, tmp_path, max_iters=2) == 0
    assert train(data_dir, tmp_path) == 0
    assert "continues" in capsys.readouterr().out
    for event, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "val_loss")):
        assert logged(tmp_path, event, name) == logged(run, event, name)


def test_a_finished_run_is_not_trained_further(data_dir, run, capsys):
    before = logged(run)
    assert train(data_dir, run) == 0
    assert logged(run) == before and "loss" not in capsys.readouterr().out


def test_only_whole_states_are_there_and_only_the_newest_two(data_dir, tmp_path, monkeypatch):
    assert train(data_dir, tmp_path, eval_interval=1) == 0
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "export",
        "metrics.jsonl",
        "step-3",
        "step-4",
    ]

    def killed(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerate.Accelerator, "save_state", killed)
    assert train(data_dir, tmp_path, max_iters=6, eval_interval=1) == 130
    monkeypatch.undo()
    state.AcceleratorState._reset_state(reset_partial_state=True)
    assert accelerate_loop.newest_state(tmp_path).name == "step-4"
    assert train(data_dir, tmp_path, max_iters=6, eval_interval=1) == 0
    assert accelerate_loop.newest_state(tmp_path).name == "step-6"


def test_the_export_is_the_model_that_was_trained(data_dir, run):
    model = GPT.from_pretrained(run / "export")
    assert validation_loss(model, data_dir) == pytest.approx(
        logged(run, "eval", "val_loss")[4], abs=1e-5
    )
    assert validation_loss(initial_model(), data_dir) > logged(run, "eval", "val_loss")[4] + 0.1


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(
    data_dir, run, tmp_path, monkeypatch
):
    seen = []
    original = GPT.hidden_states

    def spy(self, *args, **kwargs):
        if self.transformer.wte.weight.dtype != torch.float64:  # as which an export is compared
            enabled = torch.is_autocast_enabled("cpu")
            seen.append(torch.get_autocast_dtype("cpu") if enabled else None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    assert train(data_dir, tmp_path, dtype="bfloat16") == 0
    assert set(seen) == {torch.bfloat16}  # in training and in evaluations
    assert list(logged(tmp_path).values()) == pytest.approx(list(logged(run).values()), abs=0.05)
    assert GPT.from_pretrained(tmp_path / "export").transformer.wte.weight.dtype == torch.float32


def test_gradient_checkpointing_changes_memory_and_not_the_losses(data_dir, run, tmp_path):
    assert train(data_dir, tmp_path, "--gradient_checkpointing", max_iters=2) == 0
    assert logged(tmp_path) == pytest.approx({step: logged(run)[step] for step in (1, 2)}, abs=1e-6)


def test_a_mistake_is_one_line(data_dir, tmp_path, capsys):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"PK")
    assert train(data_dir, tmp_path / "out", "--init_from", str(damaged)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(
        f"accelerate_loop: error: {damaged}: damaged"
    )
