"""Runs that are killed, watched by nobody, told odd things or begun by the version before."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from tiny_runs import flags, logged, write_shards

import train_gpt2
from pretrain.errors import CheckpointError
from pretrain.eval import validation
from pretrain.report.runlog import read_log
from pretrain.train.settings import build_parser, resolve

ROOT = Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "data" / "before"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", train_tokens=1000)


def tiny(data, out_dir, **changes):
    quiet = {"hellaswag": False, "sample_interval": 0, "eval_iters": 1, "device": "cpu"}
    return flags(data, out_dir, **quiet | changes)


def held(path):
    return torch.load(path, weights_only=True)


# ---- the best model and patience

# Its first weights stay the best: the learning rate ruins them at once.
RUINED = {"learning_rate": 30, "min_lr": 30, "warmup_iters": 0, "max_iters": 12}
RUINED |= {"eval_interval": 2, "early_stopping": 3, "grad_clip": 0, "keep_checkpoints": 9}


def test_where_step_0_stays_best_patience_counts_from_it_and_it_is_the_best_model(data, tmp_path):
    assert train_gpt2.main(tiny(data, tmp_path, **RUINED)) == 0
    losses = logged(tmp_path, "eval", "val_loss")
    assert min(losses, key=losses.get) == 0 and max(losses) == 6
    best, final = held(tmp_path / "best_val_loss.pt"), held(tmp_path / "final_model.pt")
    assert best["step"] == final["best_step"] == 0
    assert best["val_loss"] == final["best_val_loss"] == losses[0]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt2

def die_at(number, name):
    calls, real = [], getattr(os, name)
    def call(source, target, *more, **named):
        calls.append(target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, target, *more, **named)
    setattr(os, name, call)

for name, numbers in (("link", {links!r}), ("replace", {renames!r})):
    for number in numbers:
        folder = os.path.join({folder!r}, name + str(number))
        for attempt in range(2):
            child = os.fork()
            if child == 0:
                if attempt == 0:
                    die_at(number, name)
                os._exit(train_gpt2.main({flags!r} + ["--out_dir", folder]))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == (0 if attempt else -signal.SIGKILL), (name, number, attempt, code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("changes", "links", "renames"),
    [({"eval_interval": 2, "max_iters": 4, "early_stopping": 3}, [1, 2], [3]), (RUINED, [1], [2])],
)
def test_killed_between_a_save_and_its_links_the_best_model_is_that_of_an_unkilled_run(
    data, tmp_path, changes, links, renames
):
    argv = tiny(data, tmp_path / "whole", **changes)
    assert train_gpt2.main(argv) == 0
    code = KILLED.format(
        root=str(ROOT), folder=str(tmp_path), flags=argv, links=links, renames=renames
    )
    forked.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=240)
    whole = {
        name: held(tmp_path / "whole" / name) for name in ("best_val_loss.pt", "final_model.pt")
    }
    killed = [f"link{number}" for number in links] + [f"replace{number}" for number in renames]
    for number in killed:
        for name, theirs in whole.items():
            mine = held(tmp_path / number / name)
            for key in ("step", "val_loss", "best_val_loss", "best_step", "evals_since_best"):
                assert mine[key] == theirs[key], (number, name, key)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_link_that_fails_is_made_later_and_the_record_stays(
    data, tmp_path, monkeypatch, failures
):
    """As where hard links are not to be had and the disk has room for one more file, not two."""
    link, left = train_gpt2.checkpoints.link, [failures]

    def refuse(existing, name):
        if "best_val_loss" in str(name) and left[0]:
            left[0] -= 1
            raise CheckpointError(f"{name}: not saved (No space left on device)")
        link(existing, name)

    monkeypatch.setattr(train_gpt2.checkpoints, "link", refuse)
    argv = tiny(data, tmp_path, **RUINED | {"keep_checkpoints": 1})
    assert train_gpt2.main(argv) == 0
    final = held(tmp_path / "final_model.pt")
    assert final["best_step"] == held(tmp_path / "best_val_loss.pt")["step"] == 0
    assert len(list(tmp_path.glob("iter-*.pt"))) == 1


def test_a_save_that_fails_is_no_record(data, tmp_path, monkeypatch, capfd):
    save = train_gpt2.checkpoints.save

    def full(path, content):
        if "iter-4" in path.name:
            error = train_gpt2.checkpoints.CheckpointError
            raise error(f"{path}: not saved (No space left on device)")
        save(path, content)

    monkeypatch.setattr(train_gpt2.checkpoints, "save", full)
    assert train_gpt2.main(tiny(data, tmp_path, eval_interval=2)) == 0
    assert "not saved" in capfd.readouterr().err
    best, final = held(tmp_path / "best_val_loss.pt"), held(tmp_path / "final_model.pt")
    assert best["step"] == final["best_step"] == 2
    assert best["val_loss"] == final["best_val_loss"]


# ---- the version before


def test_a_run_of_the_version_before_goes_on_to_the_same_losses(tmp_path, capfd):
    names = ("iter-3-loss-10.8268.pt", "best_val_loss.pt", "final_model.pt")
    for name in names:
        shutil.copyfile(BEFORE / "checkpoint_step3.pt", tmp_path / name)
    shutil.copyfile(BEFORE / "metrics.jsonl", tmp_path / "metrics.jsonl")
    saved = json.loads((BEFORE / "config.json").read_text())["flags"]
    left_out = ("data", "data_dir", "out_dir", "max_iters", "epochs", "key_token_alpha")
    kept = {
        name: value for name, value in saved.items() if value is not None and name not in left_out
    }
    kept |= {"data_dir": BEFORE / "data", "max_iters": 6}
    argv = [word for name, value in kept.items() for word in (f"--{name}", str(value))]
    assert train_gpt2.main([*argv, "--out_dir", str(tmp_path)]) == 0
    expected = [json.loads(line) for line in (BEFORE / "expected.jsonl").read_text().splitlines()]
    mine = {(r["event"], r["step"]): r for r in read_log(tmp_path / "metrics.jsonl")}
    for record in expected[:4]:
        name = "loss" if record["event"] == "train" else "val_loss"
        found = mine[record["event"], record["step"]]
        assert found[name] == pytest.approx(record[name], abs=1e-5)

    assert train_gpt2.main([*argv, "--out_dir", str(tmp_path / "anew")]) == 0
    again, anew = held(tmp_path / "final_model.pt"), held(tmp_path / "anew" / "final_model.pt")
    for name, weight in anew["model"].items():
        torch.testing.assert_close(again["model"][name], weight, rtol=0, atol=1e-5)
    assert again["version"] and again["architecture"] == "gpt2" and again["best_step"] == 6


# ---- nobody looks on


def assert_it_went_on(folder):
    assert held(folder / "final_model.pt")["step"] == 9
    assert read_log(folder / "metrics.jsonl")[-1]["reason"] == "finished"


@pytest.mark.parametrize("ending", [">&-", ">&- 2>&-"])
def test_a_run_goes_on_where_it_has_no_output(data, tmp_path, ending):
    words = [ROOT / "train_gpt2.py", *tiny(data, tmp_path, max_iters=9)]
    if "2" in ending:
        quoted = " ".join(f"'{word}'" for word in [sys.executable, *words])
        shell = ["bash", "-c", f"{quoted} {ending}"]
        subprocess.run(shell, env=ENVIRONMENT, timeout=240, check=False)
    else:
        command = forked.prepared(forked.closed(1), words)
        forked.run(command, cwd=ROOT, env=ENVIRONMENT, timeout=240)
    assert_it_went_on(tmp_path)


def test_a_run_goes_on_when_the_reader_of_its_output_goes_away(data, tmp_path):
    """As before `| head -n 1`."""
    words = [sys.executable, str(ROOT / "train_gpt2.py"), *tiny(data, tmp_path, max_iters=9)]
    with forked.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        process.wait(240)
    assert_it_went_on(tmp_path)


def test_help_and_wrong_flags_are_answered_without_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train_gpt2.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('train_gpt2.py', run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code or 0\n"
        "heavy = {'torch', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)\n"
    )
    for words, status, part in (
        (["--help"], 0, "--batch_size"),
        (["--batch_size", "0", "--lr", "1"], 2, "--batch_size"),
    ):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert part in done.stdout + done.stderr


# ---- numbers and folders at their limits


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**64},
        {"epochs": 1e300},
        {"n_layer": 10**9},
        {"n_embd": 10**9, "n_head": 1},
        {"block_size": 10**15},
        {"batch_size": 10**12},
        {"gradient_accumulation_steps": 10**14},
        {"n_layer": 10**400},
        {"learning_rate": "nan"},
        {"max_iters": "1e400"},
    ],
)
def test_what_no_machine_can_hold_is_refused_before_memory_is_asked_for(data, tmp_path, changes):
    _, problems = resolve(tiny(data, tmp_path / "out", **changes), world_size=1)
    assert problems and f"--{next(iter(changes))}" in problems[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "too long", "a null byte in it"])
def test_an_out_dir_that_cannot_be_is_one_line(data, tmp_path, capfd, kind):
    (tmp_path / "file").write_text("mine")
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "out",
        "too long": tmp_path / ("x" * 300),
        "a null byte in it": tmp_path / "a\0b",
    }[kind]
    assert train_gpt2.main(tiny(data, folder)) == 1
    error = capfd.readouterr().err
    assert error.startswith("train_gpt2.py: error: --out_dir ") and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_whose_perplexity_no_float_holds_is_saved(data, tmp_path, monkeypatch):
    evaluate = validation.evaluate

    def enormous(*arguments, **named):
        scores = evaluate(*arguments, **named)
        scores["val"]["loss"] += 800
        return scores

    monkeypatch.setattr(validation, "evaluate", enormous)
    assert train_gpt2.main(tiny(data, tmp_path, max_iters=2)) == 0
    assert held(tmp_path / "best_val_loss.pt")["val_loss"] > 800
    assert train_gpt2.main(tiny(data, tmp_path, max_iters=3)) == 0


# ---- said, though allowed


def test_what_defeats_a_run_and_what_changed_since_is_a_warning(data, tmp_path, capfd):
    assert train_gpt2.main(tiny(data, tmp_path, warmup_iters=4, max_iters=2)) == 0
    assert "--warmup_iters 4: the run ends after 2 updates" in capfd.readouterr().err
    path = tmp_path / "final_model.pt"
    saved = held(path)
    saved["model_source"]["model.py"] = "0" * 64
    torch.save(saved, path)
    for other in tmp_path.glob("*.pt"):
        if other != path:
            other.unlink()
    assert train_gpt2.main(tiny(data, tmp_path, max_iters=4, learning_rate=0.02)) == 0
    error = capfd.readouterr().err
    assert "model.py is not as it was when this checkpoint was trained" in error
    assert "--learning_rate 0.01 before, 0.02 now" in error


def test_settings_have_a_field_for_each_flag_and_cannot_change(data, tmp_path):
    settings, problems = resolve(tiny(data, tmp_path), world_size=1)
    assert not problems and settings.flags.keys() == vars(build_parser().parse_args([])).keys()
    with pytest.raises(AttributeError):
        settings.max_iters = 3


def test_a_signal_number_is_the_exit_status(data, tmp_path, monkeypatch):
    seed_dropout = train_gpt2.seed_dropout

    def seed_and_signal(seed, step, micro_batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_dropout(seed, step, micro_batch)

    monkeypatch.setattr(train_gpt2, "seed_dropout", seed_and_signal)
    assert train_gpt2.main(tiny(data, tmp_path)) == 128 + signal.SIGTERM
    assert held(tmp_path / "resume.pt")["step"] == 2
