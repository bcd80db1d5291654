"""train_gpt2.py as its users run it: small models, real processes where a kill or a second rank is
needed."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from free_port import free_port

import train_gpt2
from model import GPT, GPTConfig
from pretrain.eval import tasks
from pretrain.eval.hellaswag import HellaSwagError
from pretrain.report.runlog import last_per_step, read_log
from pretrain.train.optim import learning_rate
from pretrain.train.settings import build_parser

ROOT = Path(__file__).parent.parent
MODEL = [
    "--n_layer",
    "1",
    "--n_head",
    "2",
    "--n_embd",
    "16",
    "--block_size",
    "16",
    "--batch_size",
    "2",
]
RUN = [
    "--warmup_iters",
    "2",
    "--lr_decay_iters",
    "12",
    "--learning_rate",
    "3e-2",
    "--min_lr",
    "3e-3",
    "--eval_interval",
    "4",
    "--eval_iters",
    "2",
    "--log_interval",
    "1",
    "--sample_tokens",
    "4",
    "--no-hellaswag",
]
ONE_RANK = ["--gradient_accumulation_steps", "2", "--dropout", "0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_data(folder, seed=0, vocabulary=50):
    random = np.random.default_rng(seed)
    folder.mkdir()
    for name, length in (("val_000000", 400), ("train_000001", 700), ("train_000002", 900)):
        tokens = (np.cumsum(random.integers(1, 4, length)) % vocabulary).astype(np.uint16)
        np.save(folder / f"t_{name}.npy", tokens)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def flags(data):
    return ["--data_dir", str(data), *MODEL, *RUN, *ONE_RANK]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run of 12 updates that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    assert train_gpt2.main([*flags, "--max_iters", "12", "--out_dir", str(out_dir)]) == 0
    return out_dir


def records(out_dir, event):
    return last_per_step(read_log(out_dir / "metrics.jsonl"), event)


COMPARED = {
    "train": ("step", "loss", "learning_rate", "grad_norm"),
    "eval": ("step", "val_loss", "train_loss", "accuracy"),
}


def assert_same_run(out_dir, whole):
    """Losses, learning rates and gradient norms of every step, validation losses, weights and
    moments, bit for bit."""
    for event, names in COMPARED.items():
        mine, theirs = (
            [[r[name] for name in names] for r in records(folder, event)]
            for folder in (out_dir, whole)
        )
        assert mine == theirs, event
    mine, theirs = (
        torch.load(folder / "final_model.pt", weights_only=True) for folder in (out_dir, whole)
    )
    assert mine["step"] == theirs["step"] and mine["best_val_loss"] == theirs["best_val_loss"]
    for name, weight in theirs["model"].items():
        assert torch.equal(mine["model"][name], weight), name
    for number, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(mine["optimizer"]["state"][number][name], value), name


# ---- flags


def test_every_flag_that_users_know_is_there_with_its_default():
    args = vars(build_parser().parse_args([]))
    known = {
        "batch_size": 8,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "learning_rate": 6e-4,
        "min_lr": 6e-5,
        "warmup_iters": 2000,
        "lr_decay_iters": 600000,
        "max_iters": 600000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "gradient_accumulation_steps": 5,
        "eval_interval": 2000,
        "eval_iters": 200,
        "keep_checkpoints": 3,
        "out_dir": "checkpoints",
        "resume": "auto",
    }
    assert {name: args[name] for name in known} == known
    assert {
        "eval_only",
        "compile",
        "device",
        "dtype",
        "data_dir",
        "seed",
        "init_from",
        "log_interval",
    } <= set(args)


def test_all_problems_are_reported_at_once_and_nothing_is_started(tmp_path, capfd):
    out_dir = tmp_path / "out"
    wrong = ["--batch_size", "eight", "--dropout", "1.5", "--bach", "3", "--dtype", "float64"]
    assert train_gpt2.main([*wrong, "--out_dir", str(out_dir)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("train_gpt2.py: error: ") for line in lines)
    wrong = [
        "--n_embd",
        "30",
        "--n_head",
        "4",
        "--min_lr",
        "1",
        "--device",
        "cuda:77",
        "--resume",
        "gone.pt",
        "--warmup_iters",
        "9",
        "--lr_decay_iters",
        "8",
        "--total_batch_tokens",
        "1000",
        "--data_dir",
        str(tmp_path / "none"),
        "--hellaswag_data",
        "gone.jsonl",
    ]
    assert train_gpt2.main([*wrong, "--out_dir", str(out_dir)]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 8
    for part in (
        "--n_embd 30",
        "--min_lr 1.0",
        "--device cuda:77",
        "--resume gone.pt",
        "--warmup_iters 9",
        "--total_batch_tokens 1000: not a multiple of 8192",
        "fineweb.py",
        "gone.jsonl",
    ):
        assert part in error
    assert not out_dir.exists()


def test_a_batch_that_the_ranks_cannot_share_is_refused(flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (
        train_gpt2.main(
            [*flags[:-4], "--total_batch_tokens", "128", "--out_dir", str(tmp_path / "out")]
        )
        == 2
    )
    assert "--total_batch_tokens 128: not a multiple of 96" in capfd.readouterr().err


# ---- a run and what it leaves


def test_a_run_leaves_checkpoints_settings_and_a_log(whole, flags, data):
    names = sorted(path.name for path in whole.iterdir() if not path.name.startswith("."))
    iterations = [name for name in names if name.startswith("iter-")]
    assert [int(re.match(r"iter-(\d+)-loss-\d+\.\d{4}\.pt", name)[1]) for name in iterations] == [
        12,
        4,
        8,
    ]
    assert set(names) - set(iterations) == {
        "best_val_loss.pt",
        "final_model.pt",
        "config.json",
        "metrics.jsonl",
    }

    settings = json.loads((whole / "config.json").read_text())
    assert settings["flags"]["learning_rate"] == 3e-2 and settings["model_config"]["n_embd"] == 16
    assert (
        settings["versions"]["torch"].startswith(torch.__version__.split("+")[0])
        and settings["data_fingerprint"]
    )

    train, evaluations = records(whole, "train"), records(whole, "eval")
    assert [r["step"] for r in train] == list(range(1, 13))
    assert [r["step"] for r in evaluations] == [0, 4, 8, 12]
    for r in train:
        schedule = {"max_lr": 3e-2, "min_lr": 3e-3, "warmup_iters": 2, "lr_decay_iters": 12}
        assert r["learning_rate"] == learning_rate(r["step"] - 1, **schedule)
        assert r["tokens"] == r["step"] * 2 * 2 * 16 and r["epoch"] == pytest.approx(
            r["step"] * 4 / 99
        )
        assert r["mfu"] is None and r["tokens_per_second"] > 0 and r["grad_norm"] > 0
        assert r["tokens_per_second"] == pytest.approx(64 / (r["milliseconds_per_step"] / 1000))
    first, last = evaluations[0], evaluations[-1]
    assert (
        first["val_loss"] == pytest.approx(math.log(50257), abs=0.1)
        and last["val_loss"] < first["val_loss"] - 1
    )
    assert (
        last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
        and 0 <= last["accuracy"] <= 1
    )


def test_checkpoints_load_as_documented(whole):
    model, checkpoint = train_gpt2.load_checkpoint(whole / "final_model.pt")
    evaluation = records(whole, "eval")[-1]
    assert isinstance(model, GPT) and not model.training
    assert checkpoint["step"] == 12 and checkpoint["val_loss"] == evaluation["val_loss"]
    assert checkpoint["loss"] == evaluation["train_loss"] and checkpoint["learning_rate"] > 0
    assert checkpoint["best_val_loss"] == min(r["val_loss"] for r in records(whole, "eval"))
    assert not [key for key in checkpoint["model"] if key.startswith(("module.", "_orig_mod."))]
    assert (whole / f"iter-12-loss-{checkpoint['val_loss']:.4f}.pt").exists()
    best = torch.load(whole / "best_val_loss.pt", weights_only=True)
    assert best["val_loss"] == checkpoint["best_val_loss"]


def test_validation_is_the_mean_over_its_fixed_windows(whole, data):
    """Against a plain loop over the first 4 windows of val, one at a time, full logits."""
    model, checkpoint = train_gpt2.load_checkpoint(whole / "final_model.pt")
    tokens = np.load(data / "t_val_000000.npy").astype(np.int64)
    losses, right = [], 0
    for i in range(0, 64, 16):
        x, y = torch.from_numpy(tokens[i : i + 16])[None], torch.from_numpy(tokens[i + 1 : i + 17])
        logits = model(x)[0][0]
        losses.append(torch.nn.functional.cross_entropy(logits, y).item())
        right += (logits.argmax(-1) == y).sum().item()
    assert checkpoint["val_loss"] == pytest.approx(np.mean(losses), abs=0.02), (
        "bfloat16 where it is native"
    )
    assert records(whole, "eval")[-1]["accuracy"] == pytest.approx(right / 64, abs=0.05)


def test_losses_are_those_of_transformers_gpt2_trained_by_a_plain_loop(data, tmp_path):
    """Same initial weights, same batches, 20 updates: transformers' model, F.cross_entropy on all
    logits, torch's AdamW with two parameter groups, the schedule and the clipping written out."""
    transformers = pytest.importorskip("transformers")
    flags = [
        *MODEL,
        *RUN,
        "--gradient_accumulation_steps",
        "1",
        "--dtype",
        "float32",
        "--no-shuffle",
    ]
    flags += [
        "--data_dir",
        str(data),
        "--max_iters",
        "20",
        "--eval_interval",
        "0",
        "--out_dir",
        str(tmp_path),
    ]
    assert train_gpt2.main(flags) == 0

    torch.manual_seed(1337)
    ours = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16))
    sizes = {"n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    config = transformers.GPT2Config(**sizes, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    theirs = transformers.GPT2LMHeadModel(config).train()
    theirs.load_state_dict(ours.huggingface_state_dict())
    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    tokens = np.concatenate([np.load(data / f"t_train_00000{i}.npy") for i in (1, 2)]).astype(
        np.int64
    )
    losses = []
    for step in range(20):
        rows = torch.stack(
            [torch.from_numpy(tokens[i * 16 : i * 16 + 17]) for i in (2 * step, 2 * step + 1)]
        )
        logits = theirs(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        progress = min(1, max(0, (step - 2) / 10))
        rate = (
            3e-2 * (step + 1) / 3
            if step < 2
            else 3e-3 + 27e-3 * (1 + math.cos(math.pi * progress)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mine = [r["loss"] for r in records(tmp_path, "train")]
    assert mine == pytest.approx(losses, abs=1e-4) and mine[-1] < mine[0] - 1


# ---- stopping and going on


def test_a_finished_run_says_so_and_a_longer_one_goes_on_from_it(flags, whole, tmp_path, capfd):
    out_dir = str(tmp_path)
    assert train_gpt2.main([*flags, "--max_iters", "8", "--out_dir", out_dir]) == 0
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert train_gpt2.main([*flags, "--max_iters", "8", "--out_dir", out_dir]) == 0
    assert "finished at step 8" in capfd.readouterr().out
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    assert train_gpt2.main([*flags, "--max_iters", "12", "--out_dir", out_dir]) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("where", "number"), [("step", signal.SIGTERM), ("evaluation", signal.SIGINT)]
)
def test_a_signal_saves_and_the_same_command_goes_on_exactly(flags, whole, tmp_path, where, number):
    command = [*flags, "--max_iters", "12", "--out_dir", str(tmp_path)]
    seed_dropout, evaluate, evaluations = (
        train_gpt2.seed_dropout,
        train_gpt2.validation.evaluate,
        [],
    )

    def seed_and_signal(seed, step, micro_batch):
        if (step, micro_batch) == (6, 0):  # the first of two micro-steps
            os.kill(os.getpid(), number)
        seed_dropout(seed, step, micro_batch)

    def evaluate_and_signal(*arguments, **named):
        evaluations.append(1)
        if len(evaluations) == 3:  # that of step 8
            os.kill(os.getpid(), number)
        return evaluate(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        if where == "step":
            patch.setattr(train_gpt2, "seed_dropout", seed_and_signal)
        else:
            patch.setattr(train_gpt2.validation, "evaluate", evaluate_and_signal)
        assert train_gpt2.main(command) == 128 + number
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] == (
        6 if where == "step" else 8
    )
    assert read_log(tmp_path / "metrics.jsonl")[-1]["reason"] == f"signal {int(number)}"
    assert train_gpt2.main(command) == 0
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / "resume.pt").exists()


KILLED_RUNS = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt2
from pretrain.train import checkpoint
from pretrain.train import stopping

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

def in_a_step():
    check = stopping.FiniteGuard.check
    def check_or_die(self, step, *numbers):
        die() if step == 7 else check(self, step, *numbers)
    stopping.FiniteGuard.check = check_or_die

def in_a_save():
    saves, replace = [], os.replace
    def replace_or_die(source, target):
        saves.append(target)
        die() if "iter-8" in str(target) else replace(source, target)
    os.replace = replace_or_die

def in_a_later_save():
    saves, fsync = [], os.fsync
    def fsync_or_die(descriptor):
        saves.append(descriptor)
        die() if len(saves) == 11 else fsync(descriptor)  # resume.pt of step 6
    os.fsync = fsync_or_die

for kill in (in_a_step, in_a_save, in_a_later_save):
    out_dir = os.path.join({folder!r}, kill.__name__)
    command = {flags!r} + ["--checkpoint_interval", "3", "--out_dir", out_dir]
    for attempt in range(2):
        child = os.fork()
        if child == 0:
            if attempt == 0:
                kill()
            os._exit(train_gpt2.main(command))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if attempt else -signal.SIGKILL), (kill, attempt, code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_a_step_or_in_a_save_a_run_ends_as_if_it_had_not_been(flags, whole, tmp_path):
    code = KILLED_RUNS.format(
        root=str(ROOT), folder=str(tmp_path), flags=[*flags, "--max_iters", "12"]
    )
    forked.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=240)
    for name in ("in_a_step", "in_a_save", "in_a_later_save"):
        steps = [
            r["step"] for r in read_log(tmp_path / name / "metrics.jsonl") if r["event"] == "train"
        ]
        assert len(steps) > 12, "steps after the last checkpoint were made again"
        assert_same_run(tmp_path / name, whole)


def test_sigterm_from_outside_ends_the_process_with_143_and_a_checkpoint(flags, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train_gpt2.py"),
        *flags,
        "--out_dir",
        str(tmp_path),
        "--eval_interval",
        "0",
    ]
    process = forked.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step") and "loss" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 143 and "the same command continues" in rest
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] >= 1


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(flags, whole, tmp_path, capfd):
    command = [*flags, "--out_dir", str(tmp_path)]
    assert train_gpt2.main([*command, "--max_iters", "8"]) == 0
    newest = next(
        tmp_path.glob("iter-8-*.pt")
    )  # best_val_loss.pt and final_model.pt are the same file
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    with open(newest, "r+b") as file:
        file.write(data)
    assert train_gpt2.main([*command, "--max_iters", "12"]) == 0
    error = capfd.readouterr().err
    assert error.count("fails its checksum; passed over") == 3
    assert_same_run(tmp_path, whole)


def test_another_model_data_batch_or_order_is_refused_with_all_that_differs(
    flags, whole, tmp_path, capfd
):
    other = str(write_data(tmp_path / "other", seed=9))
    before = sorted(path.name for path in whole.iterdir())
    changed = [
        "--n_layer",
        "2",
        "--data_dir",
        other,
        "--batch_size",
        "4",
        "--seed",
        "5",
        "--no-shuffle",
    ]
    assert train_gpt2.main([*flags, *changed, "--max_iters", "20", "--out_dir", str(whole)]) == 1
    error = capfd.readouterr().err
    for part in (
        "n_layer: 1 in the checkpoint, 2 now",
        "data: ",
        "seed: 1337",
        "shuffle: True",
        "--out_dir",
        "tokens per update: 64 in the checkpoint, 128 now",
    ):
        assert part in error
    assert sorted(path.name for path in whole.iterdir()) == before


def test_the_same_batch_in_other_pieces_goes_on(flags, whole, tmp_path):
    command = [*flags, "--out_dir", str(tmp_path)]
    assert train_gpt2.main([*command, "--max_iters", "4"]) == 0
    other = ["--batch_size", "4", "--gradient_accumulation_steps", "1", "--eval_iters", "1"]
    assert train_gpt2.main([*command, *other, "--max_iters", "12"]) == 0
    mine, theirs = ([r["loss"] for r in records(folder, "train")] for folder in (tmp_path, whole))
    assert mine[:4] == theirs[:4]
    assert mine == pytest.approx(theirs, abs=0.2), "dropout differs, the data does not"


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(["--checkpoint_interval", "2"], [2, 4]), (["--checkpoint_minutes", "1e-9"], [1, 2, 3, 4, 5])],
)
def test_saves_between_evaluations_keep_to_their_intervals(
    flags, tmp_path, monkeypatch, interval, steps
):
    saved, save = [], train_gpt2.checkpoints.save

    def noted_save(path, state):
        saved.append((path.name, state["step"]))
        save(path, state)

    monkeypatch.setattr(train_gpt2.checkpoints, "save", noted_save)
    command = [
        *flags,
        *interval,
        "--eval_interval",
        "0",
        "--max_iters",
        "5",
        "--out_dir",
        str(tmp_path),
    ]
    assert train_gpt2.main(command) == 0
    assert saved == [*(("resume.pt", step) for step in steps), ("final_model.pt", 5)]


# ---- faults


@pytest.mark.parametrize("at", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_update(
    flags, whole, tmp_path, capfd, at
):
    real, calls = GPT.forward, []

    def forward(self, idx, targets=None, weights=None):
        _, loss = real(self, idx, targets, weights)
        calls.append(1)
        if len(calls) == 2 * 6:  # the second micro-step of step 5
            loss = loss * math.inf if at == "loss" else loss + (loss - loss.detach()) * math.nan
        return None, loss

    command = [*flags, "--max_iters", "12", "--out_dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        assert train_gpt2.main(command) == 1
    error = capfd.readouterr().err
    assert re.search(
        r"error: step 5: loss .* on rank 0, gradient norm nan; stopped before the update", error
    )
    stop = read_log(tmp_path / "metrics.jsonl")[-1]
    assert stop["event"] == "stop" and stop["reason"].startswith("not finite: step 5")
    assert train_gpt2.main(command) == 0
    assert_same_run(tmp_path, whole)


def test_a_full_disk_keeps_the_checkpoints_there_are_and_the_run_goes_on(flags, tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = [*flags, "--out_dir", str(tmp_path)]
    assert train_gpt2.main([*command, "--max_iters", "4"]) == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert train_gpt2.main([*command, "--max_iters", "9"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capfd.readouterr().err
    assert re.search(r"warning: .*iter-8-.*not saved.*earlier checkpoints are untouched", error)
    assert error.splitlines()[-1].startswith(f"train_gpt2.py: error: {tmp_path}: the end of this")
    assert error.count(f"{tmp_path}/final_model.pt") == 1  # names are said once
    assert records(tmp_path, "stop")[-1]["reason"].startswith("CheckpointError: ")
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 10)), (
        "it trained on, and logged"
    )
    assert torch.load(tmp_path / "final_model.pt", weights_only=True)["step"] == 4
    assert train_gpt2.main([*command, "--max_iters", "9"]) == 0
    assert torch.load(tmp_path / "final_model.pt", weights_only=True)["step"] == 9


def test_a_shard_with_a_wrong_token_is_named_before_training_and_while_reading(
    flags, tmp_path, capfd
):
    folder = write_data(tmp_path / "bad")
    tokens = np.load(folder / "t_train_000002.npy")
    tokens[77] = 60000
    np.save(folder / "t_train_000002.npy", tokens)
    command = [*flags, "--data_dir", str(folder), "--max_iters", "50", "--eval_interval", "0"]
    for name, extra in (("before", []), ("while", ["--no-verify_data"])):
        assert train_gpt2.main([*command, *extra, "--out_dir", str(tmp_path / name)]) == 1
        error = capfd.readouterr().err
        assert "t_train_000002.npy" in error and "60000" in error
        assert (tmp_path / name / "metrics.jsonl").exists() == (name == "while")


# ---- other ways to run


def test_eval_only_prints_and_writes_nothing(flags, whole, data, capfd):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    items = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
    words = [
        "--eval_only",
        "--out_dir",
        str(whole),
        "--data_dir",
        str(data),
        "--eval_iters",
        "2",
        "--batch_size",
        "2",
    ]
    assert train_gpt2.main([*words, "--hellaswag_data", str(items), "--hellaswag_limit", "4"]) == 0
    out = capfd.readouterr().out
    expected = records(whole, "eval")[-1]
    assert f"val    loss {expected['val_loss']:.4f}  perplexity {expected['perplexity']:.2f}" in out
    assert "token accuracy" in out and re.search(
        r"HellaSwag +acc \d\.\d+ +acc_norm \d\.\d+ +\(4 examples", out
    )
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    assert (
        train_gpt2.main([*words, "--no-hellaswag", "--init_from", str(whole / "best_val_loss.pt")])
        == 0
    )
    assert "best_val_loss.pt" in capfd.readouterr().out


def test_without_anything_to_evaluate_eval_only_says_so(flags, tmp_path, capfd):
    assert train_gpt2.main([*flags, "--eval_only", "--out_dir", str(tmp_path / "none")]) == 1
    assert "no checkpoint to evaluate" in capfd.readouterr().err


def test_a_run_can_begin_from_the_weights_of_another(flags, whole, data, tmp_path, capfd):
    begin = [
        "--data_dir",
        str(data),
        *RUN,
        "--init_from",
        str(whole / "final_model.pt"),
        "--max_iters",
        "2",
    ]
    assert train_gpt2.main([*begin, "--batch_size", "2", "--out_dir", str(tmp_path / "a")]) == 0
    first = records(tmp_path / "a", "eval")[0]
    assert first["step"] == 0 and first["val_loss"] == records(whole, "eval")[-1]["val_loss"]
    assert (
        train_gpt2.main(
            [*begin, "--n_layer", "3", "--block_size", "32", "--out_dir", str(tmp_path / "b")]
        )
        == 1
    )
    assert "leave out --n_layer 3, --block_size 32" in capfd.readouterr().err


def test_float16_scales_its_gradients_and_resumes_with_the_scale(flags, tmp_path):
    command = [*flags, "--dtype", "float16", "--out_dir", str(tmp_path), "--eval_interval", "0"]
    assert train_gpt2.main([*command, "--max_iters", "4"]) == 0
    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert saved["scaler"]["scale"] >= 1 and saved["scaler"]["_growth_tracker"] >= 1
    assert train_gpt2.main([*command, "--max_iters", "6"]) == 0
    after = torch.load(tmp_path / "final_model.pt", weights_only=True)["scaler"]
    assert (
        after["_growth_tracker"] > saved["scaler"]["_growth_tracker"]
        or after["scale"] < saved["scaler"]["scale"]
    )
    losses = [r["loss"] for r in records(tmp_path, "train")]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]


def test_a_compiled_run_trains_alike_and_compiles_nothing_for_evaluations(
    flags, whole, tmp_path, monkeypatch
):
    """With the compiler's last stage left out, which would take a minute: graphs are captured all
    the same."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    items = str(ROOT / "tests" / "data" / "hellaswag_items.jsonl")
    command = [
        *flags,
        "--compile",
        "True",
        "--hellaswag",
        "--hellaswag_data",
        items,
        "--eval_interval",
        "12",
        "--max_iters",
        "12",
    ]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert train_gpt2.main([*command, "--out_dir", str(tmp_path)]) == 0
    mine, theirs = ([r["loss"] for r in records(folder, "train")] for folder in (tmp_path, whole))
    assert mine == pytest.approx(theirs, abs=0.02)
    assert counters["stats"]["unique_graphs"] == 1, (
        "evaluations of all lengths ran without another one"
    )
    assert json.loads((tmp_path / "config.json").read_text())["compiled"] is True
    model, _ = train_gpt2.load_checkpoint(tmp_path / "final_model.pt")
    assert set(torch.load(tmp_path / "final_model.pt", weights_only=True)["model"]) == set(
        model.state_dict()
    )


def test_without_a_compiler_a_run_goes_on_uncompiled(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        "pretrain.train.speed.compiler_problem", lambda device: "no C++ compiler was found"
    )
    command = [
        *flags,
        "--compile",
        "--eval_interval",
        "0",
        "--max_iters",
        "1",
        "--out_dir",
        str(tmp_path),
    ]
    assert train_gpt2.main(command) == 0
    assert "warning: --compile left out: no C++ compiler" in capfd.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["compiled"] is False


def test_gradient_checkpointing_changes_no_number(flags, whole, tmp_path):
    command = [*flags, "--gradient_checkpointing", "--max_iters", "12", "--out_dir", str(tmp_path)]
    assert train_gpt2.main(command) == 0
    assert_same_run(tmp_path, whole)


def test_hellaswag_is_in_the_log_and_no_reason_to_stop(flags, tmp_path, monkeypatch, capfd):
    items = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
    on = [*flags, "--hellaswag", "--max_iters", "4"]
    assert (
        train_gpt2.main([*on, "--hellaswag_data", str(items), "--out_dir", str(tmp_path / "a")])
        == 0
    )
    for r in records(tmp_path / "a", "eval"):
        assert 0 <= r["tasks"]["hellaswag"]["acc_norm"] <= 1 and r["tasks"]["hellaswag"]["n"] > 5

    def no_network():
        raise HellaSwagError("no network")

    monkeypatch.setattr(tasks, "ensure_data", no_network)
    assert train_gpt2.main([*on, "--out_dir", str(tmp_path / "b")]) == 0
    assert capfd.readouterr().err.count("HellaSwag is left out: no network") == 1
    assert "tasks" not in records(tmp_path / "b", "eval")[-1]


# ---- several processes

RESTARTED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt2
from pretrain.train import stopping

check = stopping.FiniteGuard.check
def check_or_die(self, step, *numbers):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    check(self, step, *numbers)
stopping.FiniteGuard.check = check_or_die
sys.exit(train_gpt2.main())
"""


def test_torchrun_restarts_a_killed_rank_and_two_ranks_train_as_one(data, tmp_path):
    """Two ranks, one of them killed at step 7, against one process with twice the accumulation."""
    script = tmp_path / "killed_once.py"
    script.write_text(RESTARTED.format(root=str(ROOT)))
    shared = [
        "--data_dir",
        str(data),
        *MODEL,
        *RUN,
        "--dropout",
        "0.1",
        "--max_iters",
        "12",
        "--dtype",
        "float32",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
    ]
    two = [*shared, "--gradient_accumulation_steps", "1", "--out_dir", str(tmp_path / "two")]
    forked.run(
        [*torchrun, str(script), *two, "--compile", "False"],
        check=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    one = [*shared, "--gradient_accumulation_steps", "2", "--out_dir", str(tmp_path / "one")]
    assert train_gpt2.main(one) == 0

    log = read_log(tmp_path / "two" / "metrics.jsonl")
    assert [r["step"] for r in log if r["event"] == "start"] == [0, 4], (
        "restarted from the checkpoint of step 4"
    )
    compared = (("train", "loss", 1e-4), ("eval", "val_loss", 1e-5), ("eval", "train_loss", 1e-5))
    for event, name, tolerance in compared:
        mine, theirs = (
            [r[name] for r in records(tmp_path / folder, event)] for folder in ("two", "one")
        )
        assert len(mine) == len(theirs) and mine == pytest.approx(theirs, abs=tolerance), name


def start_ranks(flags, world_size):
    port = str(free_port())
    shared = {
        **ENVIRONMENT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size),
    }
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags]
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [forked.Popen(command, text=True, env=environment, **pipes) for environment in ranks]


def test_sigterm_to_one_rank_stops_all_and_one_process_goes_on(data, tmp_path):
    flags = [
        "--data_dir",
        str(data),
        *MODEL,
        *RUN,
        "--eval_interval",
        "0",
        "--out_dir",
        str(tmp_path),
    ]
    two = [*flags, "--gradient_accumulation_steps", "1"]
    processes = start_ranks(two, 2)
    for line in processes[0].stdout:
        if line.startswith("step"):
            break
    t0 = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in processes] == [143, 143]
    assert time.monotonic() - t0 < 60
    for process in processes:
        process.communicate()
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    end = str(saved["step"] + 2)
    assert train_gpt2.main([*flags, "--gradient_accumulation_steps", "2", "--max_iters", end]) == 0
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, int(end) + 1))
