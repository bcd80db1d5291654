"""Training on one's own text: its shards, the end of a run, weights of sequences, samples,
trackers."""

import json
import os
import re
import sqlite3
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import SETTINGS, flags, initial_model, logged, write_shards

import fineweb
import train_gpt2
from model import GPT, GPTConfig, load_checkpoint
from pretrain.eval.sampling import TrainingSamples
from pretrain.report import trackers
from pretrain.report.console import Console
from pretrain.report.runlog import RunLog, last_per_step, read_log
from pretrain.tokens import owntext
from pretrain.tokens.owntext import prepare
from pretrain.tokens.shards import find_shards, open_shard
from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding
from pretrain.train.arguments import build_parser
from pretrain.train.data import unigram_entropy
from pretrain.train.loader import ShardLoader, TokenWindows
from pretrain.train.optim import learning_rate
from pretrain.train.settings import resolve

DOCUMENTS = [
    f"The mill by the river has {n} wheels, and each of them turns {n * n} times." for n in range(9)
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mills.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def tokens_of(folder, split):
    return np.concatenate([open_shard(path) for path in find_shards(folder, split)])


def train(data_dir, out_dir, *more, **changes):
    changes = {"hellaswag": False, "sample_tokens": 4, **changes}
    return train_gpt2.main([*flags(data_dir, out_dir, **changes), *more])


# ---- text


def test_a_text_becomes_a_tenth_for_validation_and_the_rest_for_training(text, tmp_path, capfd):
    assert train(None, tmp_path / "out", "--data", str(text)) == 0
    encoding = load_encoding()
    expected = []
    for document in text.read_text(encoding="utf-8").split("<|endoftext|>\n"):
        expected += [END_OF_TEXT, *encoding.encode_ordinary(document)]
    val, training = (
        tokens_of(tmp_path / "out" / "data", split).tolist() for split in ("val", "train")
    )
    assert val + training == expected
    assert len(val) == len(expected) // 10
    windows = TokenWindows(find_shards(tmp_path / "out" / "data", "val"), block_size=16)
    seen = windows.read(
        np.arange(len(windows))
    )  # (windows, 17), the last token of each is only predicted
    assert (
        seen[:, :-1].reshape(-1).tolist() == val[: 16 * len(windows)]
    )  # one after the other, once each
    assert (
        f"{len(training):,} tokens for training, {len(val):,} for validation"
        in capfd.readouterr().out
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["train_tokens"] == len(
        training
    )


def test_shards_of_a_text_are_kept_and_another_text_is_refused(text, tmp_path, capfd):
    assert train(None, tmp_path / "out", "--data", str(text), max_iters=1) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").glob("*.npy")}
    assert train(None, tmp_path / "out", "--data", str(text), max_iters=2) == 0
    assert "shards kept from before" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made} == made
    other = tmp_path / text.name
    other.write_text("Another text.", encoding="utf-8")
    assert train(None, tmp_path / "out", "--data", str(other), max_iters=3) == 1
    error = capfd.readouterr().err
    assert (
        "holds shards of other documents" in error
        and "--out_dir" in error
        and error.count("\n") == 1
    )


def test_shards_made_with_other_settings_are_refused_with_flags_that_the_program_has(
    text, tmp_path, capfd
):
    data = tmp_path / "out" / "data"
    assert (
        fineweb.main(["--source", str(text), "--val_fraction", "0.2", "--out_dir", str(data)]) == 0
    )
    capfd.readouterr()
    assert train(None, tmp_path / "out", "--data", str(text)) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "made with other settings" in error
    known = {name for action in build_parser()._actions for name in action.option_strings}
    assert set(re.findall(r"--\w+", error)) <= known


def test_a_folder_of_shards_is_taken_as_it_is(data, tmp_path):
    assert train(None, tmp_path / "a", "--data", str(data), max_iters=2) == 0
    assert train(data, tmp_path / "b", max_iters=2) == 0
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    assert not (tmp_path / "a" / "data").exists()


def test_text_that_is_not_there_is_one_error_before_anything_is_written(tmp_path, capfd):
    assert train(None, tmp_path / "out", "--data", str(tmp_path / "gone.txt")) == 2
    error = capfd.readouterr().err
    assert "--data" in error and "gone.txt" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_processes_wait_until_the_shards_are_complete(text, tmp_path, monkeypatch):
    monkeypatch.setattr(owntext, "POLL_SECONDS", 0.01)
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(prepare([text], tmp_path / "data", builder=False)), daemon=True
    )
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive() and not found and not (tmp_path / "data").exists()
    prepare([text], tmp_path / "data")
    waiting.join(30)
    assert found == [tmp_path / "data"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt2

def die_at(number):
    left = [number]
    for name in ("fsync", "replace"):
        def call(*arguments, real=getattr(os, name), **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        setattr(os, name, call)

for number in range(1, 100):  # each goes on with what the one before has left
    child = os.fork()
    if child == 0:
        die_at(number)
        os._exit(train_gpt2.main({flags!r}))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if os.path.exists(os.path.join({out_dir!r}, "metrics.jsonl")):
        break  # the shards were made, and training has begun
    assert code == -signal.SIGKILL, (number, code)
assert number > 3, "it is killed in the middle"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_it_makes_the_shards_of_a_text_a_run_goes_on_as_if_it_had_not_been(
    text, tmp_path
):
    """At the first thing that is asked of the disk, then at the second, and so on."""
    quiet = {"hellaswag": False, "sample_interval": 0, "device": "cpu", "data": text}
    for name in ("whole", "killed"):
        argv = flags(None, tmp_path / name, **quiet, max_iters=1)
        if name == "killed":
            code = KILLED.format(
                root=str(Path(train_gpt2.__file__).parent), flags=argv, out_dir=str(tmp_path / name)
            )
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            forked.run([sys.executable, "-c", code], check=True, env=environment, timeout=200)
        assert train_gpt2.main(argv) == 0
    made, remade = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()}
        for name in ("whole", "killed")
    )
    assert remade == made
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def test_unigram_entropy_is_that_of_the_frequencies(tmp_path):
    np.save(tmp_path / "t_train_000001.npy", np.array([7, 7, 7, 9], dtype="<u2"))
    np.save(tmp_path / "t_train_000002.npy", np.array([9, 9, 50256, 7], dtype="<u2"))
    paths = find_shards(tmp_path, "train")
    expected = -(0.5 * np.log(0.5) + 0.375 * np.log(0.375) + 0.125 * np.log(0.125))
    assert unigram_entropy(paths) == pytest.approx(expected)


# ---- the end of a run


def test_early_stopping_counts_evaluations_without_improvement_across_resumes(
    data, tmp_path, capfd
):
    still = {
        "min_lr": 0,
        "lr_decay_iters": 2,
        "eval_interval": 2,
    }  # after two updates no loss changes
    stop = ("--early_stopping", "2")
    assert (
        train(data, tmp_path / "out", *stop, **still, max_iters=4) == 0
    )  # step 4 was no better than 2
    assert train(data, tmp_path / "out", *stop, **still, max_iters=40) == 0
    evals = last_per_step(read_log(tmp_path / "out" / "metrics.jsonl"), "eval")
    assert [record["step"] for record in evals] == [0, 2, 4, 6]
    assert load_checkpoint(tmp_path / "out" / "final_model.pt")[1]["step"] == 6
    assert (
        "stopped early: the validation loss was lowest 2 evaluations ago" in capfd.readouterr().out
    )
    assert train(data, tmp_path / "out", *stop, **still, max_iters=40) == 0
    assert "finished at step 6; with a higher --early_stopping it goes on" in capfd.readouterr().out
    assert train(data, tmp_path / "out", "--early_stopping", "3", **still, max_iters=40) == 0
    assert load_checkpoint(tmp_path / "out" / "final_model.pt")[1]["step"] == 8


def test_a_run_that_improves_is_not_stopped_early(data, tmp_path):
    assert train(data, tmp_path / "out", "--early_stopping", "1", eval_interval=1) == 0
    losses = logged(tmp_path / "out", "eval", "val_loss")
    assert list(losses) == [0, 1, 2, 3, 4] and sorted(losses.values(), reverse=True) == list(
        losses.values()
    )


def test_weights_alone_in_the_folder_of_a_run_are_not_taken_for_its_own(data, tmp_path, capfd):
    model = initial_model()
    config = {
        name: getattr(model.config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")
    }
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    weights = out_dir / "imported.pt"
    state = {"format": 1, "step": 0, "model": model.state_dict(), "model_config": config}
    torch.save(state, weights)
    assert train(data, out_dir, max_iters=2) == 0
    assert weights.exists() and "begins anew" in capfd.readouterr().out
    assert train(data, tmp_path / "other", "--resume", str(weights)) == 1
    assert "--init_from" in capfd.readouterr().err


# ---- weights of sequences


def weighted_losses(data, key_ids, alpha, steps):
    """Losses of SETTINGS with one micro-step of four sequences, by the formula, sequence by
    sequence."""
    model = initial_model()
    matrices, vectors = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader = ShardLoader(
        find_shards(data, "train"), batch_size=4, block_size=16, seed=SETTINGS["seed"]
    )
    losses = []
    for step in range(steps):
        x, y = (part[0] for part in loader.batch(step))
        total = 0.0
        for tokens, targets in zip(x, y, strict=True):
            found = sum(token in key_ids for token in tokens.tolist())
            total = total + alpha * (1 + found) * F.cross_entropy(
                model(tokens[None])[0][0], targets
            )
        loss = total / len(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, max_lr=0.01, min_lr=0.001, warmup_iters=1, lr_decay_iters=4
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_key_tokens_weigh_training_as_the_formula_says_and_evaluation_not_at_all(data, tmp_path):
    common = np.bincount(tokens_of(data, "train")).argsort()[::-1][:40].tolist()
    encoding = load_encoding()
    words = [encoding.decode([token]) for token in common]
    words = [w for w in words if "\n" not in w and len(encoding.encode_ordinary(w)) == 1][:5]
    (tmp_path / "keys.txt").write_text("\n".join(words), encoding="utf-8")
    key_ids = {encoding.encode_ordinary(word)[0] for word in words}
    batch = {"batch_size": 4, "gradient_accumulation_steps": 1}
    keys = ("--key_tokens", str(tmp_path / "keys.txt"), "--key_token_alpha", "0.7")
    assert train(data, tmp_path / "plain", **batch) == 0
    assert train(data, tmp_path / "keys", *keys, **batch) == 0
    expected = weighted_losses(data, key_ids, 0.7, 4)
    assert list(logged(tmp_path / "keys").values()) == pytest.approx(expected, rel=1e-5)
    assert (
        expected[0] > 1.1 * 0.7 * logged(tmp_path / "plain")[1]
    )  # some sequences do hold key tokens
    first = [logged(tmp_path / name, "eval", "val_loss")[0] for name in ("keys", "plain")]
    assert first[0] == first[1]


# ---- samples


def test_samples_are_what_the_checkpoint_of_their_step_generates(data, tmp_path):
    prompt = ("--sample_prompt", "The mill", "--sample_tokens", "5")
    assert train(data, tmp_path / "out", *prompt, eval_interval=1, keep_checkpoints=9) == 0
    encoding = load_encoding()
    samples = logged(tmp_path / "out", "sample", "step")
    assert list(samples) == [1, 2, 3, 4]
    for record in read_log(tmp_path / "out" / "metrics.jsonl"):
        if record["event"] == "sample":
            (path,) = (tmp_path / "out").glob(f"iter-{record['step']}-*.pt")
            model = load_checkpoint(path)[0].eval()
            ids = torch.tensor(encoding.encode_ordinary("The mill"))
            out = model.generate(ids, 5, temperature=0.8, top_k=50, seed=SETTINGS["seed"])
            assert record["prompt"] + record["text"] == encoding.decode(out.tolist())


@pytest.fixture(scope="module")
def sampled(data, tmp_path_factory):
    """A run with a sample at each evaluation."""
    out_dir = tmp_path_factory.mktemp("sampled") / "out"
    assert train(data, out_dir, eval_interval=1, dropout=0.1) == 0
    return out_dir


@pytest.mark.parametrize("interval, steps", [(2, [2, 4]), (3, [3, 4]), (0, [])])
def test_sampling_keeps_to_its_interval_and_changes_nothing_of_the_training(
    data, tmp_path, sampled, interval, steps
):
    assert (
        train(data, tmp_path / "out", eval_interval=1, sample_interval=interval, dropout=0.1) == 0
    )
    records = read_log(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records if record["event"] == "sample"] == steps
    assert list(logged(sampled, "sample", "step")) == [1, 2, 3, 4]
    for event, name in (("train", "loss"), ("eval", "val_loss")):
        assert logged(tmp_path / "out", event, name) == logged(sampled, event, name)


def test_a_sample_of_any_length_ends_when_the_run_is_told_to_stop():
    torch.manual_seed(0)
    model, asked = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)), []

    def is_told_to_stop():
        asked.append(1)
        return len(asked) == 3

    samples = TrainingSamples("The mill", 10**12, seed=1)
    assert samples.write(model, is_told_to_stop) is None and len(asked) == 3
    assert "at most" in str(resolve(["--sample_tokens", "1e12"], 1)[1])


# ---- looking on


class Terminal:
    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


TRAIN = {
    "event": "train",
    "step": 10,
    "loss": 3.25,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "mfu": None,
    "tokens_per_second": 12345.6,
    "milliseconds_per_step": 9.5,
    "memory_bytes": 10**9,
}


def test_a_terminal_gets_a_bar_and_lines_for_what_stays(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    console = Console(20, 5)
    console.train(TRAIN)
    console.say("step 10/20 | val loss 3.3000")
    console.sample({"step": 10, "prompt": "The mill", "text": " by\nthe" + " river" * 100})
    console.close()
    assert (
        "10/20" in terminal.text
        and "loss 3.2500" in terminal.text
        and "12,346 tok/s" in terminal.text
    )
    assert "\nstep 10/20 | val loss 3.3000\n" in terminal.text.replace("\r", "\n")
    (sample,) = [
        line for line in terminal.text.replace("\r", "\n").splitlines() if "The mill by the" in line
    ]
    assert len(sample) < 250 and sample.endswith(" ...")
    assert "lr 1.00e-03" not in terminal.text  # the lines of train_line are for files


def test_what_is_no_terminal_gets_lines_that_begin_alike_and_no_bar(capsys):
    console = Console(20, 0)
    console.train(TRAIN)
    console.say("step 10/20 | val loss 3.3000")
    console.close()
    out, error = capsys.readouterr()
    first, estimate, last = out.splitlines()
    assert first.startswith("step 10/20 | loss  3.2500 | lr 1.00e-03")
    assert estimate.startswith("about ") and "the other 10 updates" in estimate
    assert last.startswith("step 10/20 | ")
    assert error == "" and "\r" not in out


def test_tensorboard_gets_the_numbers_of_the_log(data, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    assert train(data, tmp_path / "out", "--tensorboard") == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for event, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "val_loss")):
        found = {scalar.step: scalar.value for scalar in events.Scalars(f"{event}/{name}")}
        expected = logged(tmp_path / "out", event, name)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)


def test_trackio_gets_the_numbers_of_the_log_and_one_run_however_often_it_resumes(
    data, tmp_path, monkeypatch
):
    pytest.importorskip("trackio")  # an extra of its own
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train(data, tmp_path / "out", "--trackio") == 0
    with sqlite3.connect(tmp_path / "trackio" / "gpt2.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    found = {step: json.loads(m)["train/loss"] for _, step, m in rows if b"train/loss" in bytes(m)}
    assert found == pytest.approx(logged(tmp_path / "out", "train", "loss"))


def wandb_records(path):
    """The records of an offline run's file: a LevelDB log with a header of seven bytes of its
    own."""
    from wandb.proto import wandb_internal_pb2

    data, at, content = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no header fits into the rest of a block
            at += 2**15 - at % 2**15
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            yield record
            content = b""


def test_wandb_gets_the_numbers_of_the_log_without_a_network(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train(data, tmp_path / "out", "--wandb") == 0
    (path,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # the package's own process writes, and may be a moment behind
    while not any(r.HasField("exit") for r in wandb_records(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    losses = {}
    for record in wandb_records(path):
        items = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
        }
        if "train/loss" in items:
            losses[items["step"]] = items["train/loss"]
    assert losses == logged(tmp_path / "out")


@pytest.mark.parametrize("package", trackers.PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused_with_the_package_to_install(
    data, tmp_path, capfd, monkeypatch, package
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert train(data, tmp_path / "out", f"--{package}") == 2
    assert f"--{package} needs a package: pip install {package}\n" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_is_left_out_and_the_log_goes_on(tmp_path, capfd):
    class Broken:
        def write(self, record):
            raise OSError("no network")

    log = RunLog(tmp_path)
    log.follow(Broken())
    log.write("train", step=1, loss=2.0)
    log.write("train", step=2, loss=1.0)
    assert [record["step"] for record in read_log(log.path)] == [1, 2]
    assert capfd.readouterr().err == "warning: Broken is left out: no network\n"


def test_the_shards_of_a_text_are_made_once_by_two_ranks(text, tmp_path):
    """Under torchrun the first process builds and the other waits; both train on the same
    shards."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        train_gpt2.__file__,
        *flags(None, tmp_path / "out", hellaswag=False, max_iters=2),
        "--data",
        str(text),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = forked.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shards made") == 1
    assert list(logged(tmp_path / "out")) == [1, 2]
