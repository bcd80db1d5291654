"""Runs of train_gpt2.py with --model modern and --optimizer muon: all that classic ones promise."""

import json
import os
import signal
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from free_port import free_port

import sample
import train_gpt2
from model import load_checkpoint
from pretrain.errors import UserError
from pretrain.models import ARCHITECTURES
from pretrain.models.modern import Modern
from pretrain.train import arguments, optim
from pretrain.train.settings import resolve

ROOT = Path(__file__).parents[2]
MODERN = ["--model", "modern", "--optimizer", "muon", "--schedule", "trapezoid"]
SIZES = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16"]
RUN = ["--batch_size", "2", "--eval_interval", "3", "--eval_iters", "2", "--log_interval", "1"]
RUN += ["--no-hellaswag", "--sample_interval", "0", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for name, length in (("val_000000", 400), ("train_000001", 1600)):
        tokens = (np.cumsum(random.integers(1, 4, length)) % 50).astype(np.uint16)
        np.save(folder / f"t_{name}.npy", tokens)
    return folder


@pytest.fixture(scope="module")
def flags(data):
    shared = ["--data_dir", str(data), *SIZES, *RUN, "--max_iters", "6"]
    return [*shared, *MODERN, "--gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run of six updates that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    assert train_gpt2.main([*flags, "--out_dir", str(out_dir)]) == 0
    return out_dir


VALUES = ["--value_embeddings"]


def logged(out_dir, event, *names):
    """The values of each step; of a step that was made twice, those of the last time."""
    lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    found = {r["step"]: [r[name] for name in names] for r in lines if r["event"] == event}
    return [found[step] for step in sorted(found)]


def tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from tensors(inner, f"{name}.{key}")


def test_the_rate_is_constant_and_then_falls_in_a_line_and_the_loss_falls(whole):
    rates = [rate for (rate,) in logged(whole, "train", "learning_rate")]
    assert rates == pytest.approx([0.025, 0.025, *(0.025 * left / 4.2 for left in (4, 3, 2, 1))])
    losses = [loss for (loss,) in logged(whole, "eval", "val_loss")]
    assert losses[0] == pytest.approx(np.log(50257), abs=1e-4) and losses == sorted(losses)[::-1]


@pytest.mark.parametrize(("model", "further"), [("modern", []), ("modern", VALUES), ("gpt2", [])])
def test_interrupted_the_same_command_goes_on_bit_for_bit(  # noqa: PLR0917 (cases and fixtures)
    model, further, flags, whole, tmp_path, monkeypatch
):
    flags = [*flags, "--model", model, *further]
    if model != "modern" or further:  # Muon takes GPT-2's queries, keys and values apart
        whole = tmp_path / "whole"
        assert train_gpt2.main([*flags, "--out_dir", str(whole)]) == 0
    seed_dropout, sent = train_gpt2.seed_dropout, []

    def interrupt(seed, step, micro_batch):
        if step == 4 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        seed_dropout(seed, step, micro_batch)

    monkeypatch.setattr(train_gpt2, "seed_dropout", interrupt)
    out_dir = tmp_path / "out"
    assert train_gpt2.main([*flags, "--out_dir", str(out_dir)]) == 128 + signal.SIGTERM
    saved = torch.load(out_dir / "resume.pt", weights_only=True)
    assert saved["step"] == 4 and saved["architecture"] == model
    assert train_gpt2.main([*flags, "--out_dir", str(out_dir)]) == 0

    for event, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "val_loss")):
        assert logged(out_dir, event, name) == logged(whole, event, name)
    mine, theirs = (
        dict(tensors(torch.load(folder / "final_model.pt", weights_only=True)))
        for folder in (out_dir, whole)
    )
    assert mine.keys() == theirs.keys() and len(mine) > 30
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_two_ranks_train_as_one(flags, whole, tmp_path):
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags, "--out_dir", str(tmp_path)]
    command += ["--gradient_accumulation_steps", "1"]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        forked.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, cwd=tmp_path)
        for rank in "01"
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for event, name in (("train", "loss"), ("eval", "val_loss")):
        mine, theirs = logged(tmp_path, event, name), logged(whole, event, name)
        assert np.array(mine) == pytest.approx(np.array(theirs), abs=1e-3)


def test_gradient_checkpointing_changes_no_number(flags, whole, tmp_path):
    assert train_gpt2.main([*flags, "--gradient_checkpointing", "--out_dir", str(tmp_path)]) == 0
    assert logged(tmp_path, "train", "loss", "grad_norm") == logged(
        whole, "train", "loss", "grad_norm"
    )


def test_a_checkpoint_says_what_it_is_and_every_program_takes_it(whole, flags, tmp_path, capfd):
    model, _ = load_checkpoint(whole / "best_val_loss.pt")
    assert type(model) is Modern and not model.training
    prompt = torch.tensor([1, 3, 5])
    assert len(model.generate(prompt, 4, temperature=0)) == 7

    about = ["--checkpoint", str(whole / "best_val_loss.pt"), "--max_new_tokens", "3"]
    assert sample.main([*about, "--prompt", "Hello", "--device", "cpu"]) == 0
    assert "Hello" in capfd.readouterr().out

    loss = logged(whole, "eval", "val_loss")[-1][0]
    assert train_gpt2.main([*flags, "--out_dir", str(whole), "--eval_only"]) == 0
    assert f"{loss:.4f}" in capfd.readouterr().out


def test_a_run_begins_from_the_weights_of_a_modern_one_and_takes_its_architecture(
    whole, flags, tmp_path, capfd
):
    begin = ["--init_from", str(whole / "final_model.pt"), "--out_dir", str(tmp_path)]
    plain = [flag for flag in flags if flag not in ("--model", "modern")]
    assert train_gpt2.main([*plain, *begin, "--max_iters", "1"]) == 0
    assert logged(tmp_path, "eval", "val_loss")[0] == logged(whole, "eval", "val_loss")[-1]
    assert torch.load(tmp_path / "final_model.pt", weights_only=True)["architecture"] == "modern"

    other = ["--init_from", str(whole / "final_model.pt"), "--out_dir", str(tmp_path / "b")]
    assert train_gpt2.main([*plain, *other, "--model", "gpt2"]) == 1
    assert "leave out --model gpt2" in capfd.readouterr().err


def test_another_architecture_or_optimizer_is_refused_by_name(whole, flags, capfd):
    other = [*flags, "--model", "gpt2", "--optimizer", "adamw", "--out_dir", str(whole)]
    assert train_gpt2.main([*other, "--max_iters", "8"]) == 1
    error = capfd.readouterr().err
    assert "model: modern in the checkpoint, gpt2 now" in error
    assert "optimizer: muon in the checkpoint, adamw now" in error


def test_an_export_to_hugging_face_says_that_there_is_no_such_model(whole):
    model, _ = load_checkpoint(whole / "final_model.pt")
    with pytest.raises(UserError, match="no Hugging Face counterpart"):
        model.huggingface_state_dict()


# ---- flags


def test_the_flags_name_what_there_is():
    assert set(arguments.MODELS) == set(ARCHITECTURES)
    assert set(arguments.OPTIMIZERS) == set(optim.OPTIMIZERS)
    assert set(arguments.SCHEDULES) == set(optim.SCHEDULES)


def test_with_muon_other_defaults_hold_and_what_is_given_stays(data):
    here = ["--data_dir", str(data)]
    settings, problems = resolve([*here, *MODERN, "--max_iters", "900", "--beta1", "0.85"], 1)
    assert not problems
    assert (settings.learning_rate, settings.min_lr, settings.grad_clip) == (0.025, 0, 0)
    assert (settings.weight_decay, settings.beta1, settings.warmup_iters) == (0.05, 0.85, 0)
    assert (settings.n_head, settings.lr_decay_iters) == (6, 900)
    settings, problems = resolve([*here, *MODERN, "--lr_decay_iters", "500", "--n_head", "12"], 1)
    assert not problems and (settings.n_head, settings.lr_decay_iters) == (12, 500)
    settings, problems = resolve([*here, "--schedule", "trapezoid", "--max_iters", "500"], 1)
    assert not problems and (settings.warmup_iters, settings.learning_rate) == (50, 6e-4)
    settings, problems = resolve(here, 1)
    assert (settings.learning_rate, settings.n_head, settings.lr_decay_iters) == (6e-4, 12, 600000)


def test_tables_of_values_belong_to_a_run_and_to_the_modern_model(whole, flags, tmp_path, capfd):
    assert train_gpt2.main([*flags, *VALUES, "--out_dir", str(whole)]) == 1
    assert "value_embeddings: None in the checkpoint, True now" in capfd.readouterr().err
    wrong = ["--model", "gpt2", "--optimizer", "adamw", "--out_dir", str(tmp_path)]
    assert train_gpt2.main([*flags, *VALUES, *wrong]) == 2
    assert "--value_embeddings: only --model modern has them" in capfd.readouterr().err
    begin = ["--init_from", str(whole / "final_model.pt"), "--out_dir", str(tmp_path)]
    assert train_gpt2.main([*flags, *VALUES, *begin]) == 1
    assert "leave out --value_embeddings True" in capfd.readouterr().err


def test_heads_that_cannot_turn_are_refused_before_a_start(data):
    wrong = ["--data_dir", str(data), *MODERN, "--n_embd", "36", "--n_head", "2"]
    _, problems = resolve(wrong, 1)
    assert problems == [
        "--n_embd 36, --n_head 2: heads of 18; --model modern needs a multiple of 4"
    ]


@pytest.mark.parametrize("name", ["modern-124m", "modern-small"])
def test_the_configurations_are_the_recipe_as_the_defaults_have_it(name, data):
    file = ROOT / "configs" / f"{name}.yaml"
    settings, problems = resolve(["--config", str(file), "--data_dir", str(data)], 8)
    assert not problems
    recipe = ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "beta1")
    bare = [*MODERN, "--data_dir", str(data), "--n_embd", str(settings.n_embd)]
    defaults, _ = resolve([*bare, "--max_iters", str(settings.max_iters)], 8)
    for flag in (*recipe, "beta2", "n_head", "decay_share", "lr_decay_iters", "schedule"):
        assert getattr(settings, flag) == getattr(defaults, flag), flag
    assert yaml.safe_load(file.read_text())["optimizer"] == "muon"
