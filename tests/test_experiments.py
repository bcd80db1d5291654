"""What docs/experiments.md promises: a sweep that a loop of the shell makes and resumes, and
questions of one's own."""

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import hellaswag
import train_gpt2
from pretrain.flags import named_after_flags, named_files, wrong_files
from pretrain.report.compare import compare, seeds
from pretrain.report.runs import Run, task_results
from pretrain.train import run as runs_module

ROOT = Path(__file__).parent.parent
ITEMS = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
(SWEEP, *_) = re.findall(
    r"```sh\n(.*?)```", (ROOT / "docs/experiments.md").read_text(encoding="utf-8"), re.DOTALL
)
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "stride": 16, "batch_size": 2}
LENGTH = {"max_iters": 4, "warmup_iters": 1, "lr_decay_iters": 4, "eval_interval": 2}
OTHERS = {"eval_iters": 1, "log_interval": 1, "sample_interval": 0, "hellaswag": False}
PLACE = {"device": "cpu", "dtype": "float32"}
SETTINGS = SIZES | LENGTH | OTHERS | PLACE
TINY = [f"--{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, length in (("val_000000", 100), ("train_000001", 900)):
        tokens = np.cumsum(np.random.default_rng(1).integers(1, 4, length)) % 50
        np.save(folder / f"t_{name}.npy", tokens.astype(np.uint16))
    return folder


VALUES = {name: words.split()[:2] for name, words in re.findall(r"for (\w+) in ([^;]*);", SWEEP)}


def loop(data):
    """The statuses of the documented loop's runs, smaller ones, up to the first that fails."""
    command = re.search(r"python train_gpt2.py (.*?) \|\| exit", SWEEP, re.DOTALL)[1]
    statuses = []
    for rate in VALUES["learning_rate"]:
        for seed in VALUES["seed"]:
            line = command.replace("$learning_rate", rate).replace("$seed", seed)
            words = shlex.split(line.replace("\\\n", " "))[2:]  # without --config
            statuses.append(train_gpt2.main([*words, "--data_dir", str(data), *TINY]))
            if statuses[-1]:
                return statuses
    return statuses


def test_the_loop_is_one_that_a_shell_understands():
    assert subprocess.run(["bash", "-n", "-c", SWEEP], check=False).returncode == 0


def test_a_sweep_that_was_stopped_goes_on_with_the_same_loop(data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    advance, updates = runs_module.Run.advance, []

    def stopped_once(self, *values):
        advance(self, *values)
        updates.append(self.state.step)
        if len(updates) == 4 + 3:  # in the middle of the second run
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs_module.Run, "advance", stopped_once)
    assert loop(data) == [0, 128 + 15]
    rates = VALUES["learning_rate"]
    first = tmp_path / "runs" / f"lr{rates[0]}-seed1" / "metrics.jsonl"
    before = first.read_bytes()
    assert loop(data) == [0, 0, 0, 0]
    assert first.read_bytes() == before, "what is finished is passed over"
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == [
        f"lr{rate}-seed{seed}" for rate in rates for seed in (1, 2)
    ]
    found = [Run.load(folder) for folder in folders]
    assert [len(run.starts) for run in found] == [1, 2, 1, 1]
    assert {run.status().split(" (")[0] for run in found} == {"finished"}
    assert {"learning_rate", "seed"} <= set(compare(found).header)
    assert [line.split(":")[0] for line in seeds(found)] == [
        f"learning_rate {rate}" for rate in rates
    ]


def test_a_folder_is_named_after_flags_and_other_braces_stay():
    values = {"learning_rate": 3e-4, "data_dir": "data/web", "out_dir": "{seed}", "seed": 1}
    assert named_after_flags("a/lr{learning_rate}-{seed}", values) == "a/lr0.0003-1"
    assert named_after_flags("{data_dir}", values) == "data_web", "one folder, not two"
    assert named_after_flags("{x}-{out_dir}-{}-{seed", values) == "{x}-{out_dir}-{}-{seed"


def test_files_of_questions_are_scored_beside_the_loss(data, tmp_path, capfd):
    out_dir, other = tmp_path / "run", tmp_path / "other.jsonl"
    other.write_text("".join(ITEMS.read_text().splitlines(keepends=True)[:5]))
    words = ["--data_dir", str(data), *TINY, "--out_dir", str(out_dir), "--hellaswag_limit", "3"]
    tasks = ["--task", f"physics={ITEMS}", "--task", f"law={other}"]
    assert train_gpt2.main([*words, *tasks]) == 0
    found = task_results(Run.load(out_dir))
    assert set(found) == {("physics", "completion"), ("law", "completion")}
    for results in found.values():
        assert [step for step, _ in results] == [0, 2, 4] and results[0][1]["n"] == 3
    printed = capfd.readouterr().out
    assert len(re.findall(r"physics +\d+\.\d% \(3.*law +\d+\.\d% \(3", printed)) == 3
    # hellaswag.py scores the last checkpoint as training did.
    result = tmp_path / "law.json"
    words = ["--checkpoint", str(out_dir / "final_model.pt"), "--limit", "3", "--dtype", "float32"]
    words += ["--device", "cpu", "--output", str(result)]
    assert hellaswag.main([*words, "--task", f"law={other}"]) == 0
    record = json.loads(result.read_text())
    expected = found["law", "completion"][-1][1]
    assert record["task"] == "law" and record["acc_norm"] == expected["acc_norm"]
    printed = capfd.readouterr().out
    assert printed.startswith("law, 3 examples") and "published" not in printed


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["physics"], "--task physics: give its file, physics=physics.jsonl"),
        ([f"hellaswag={ITEMS}"], "--task hellaswag: this name is taken"),
        (["a=none.jsonl"], "--task a: none.jsonl: no such file"),
        ([f"a={ITEMS}", f"a={ITEMS}"], "--task a: named twice"),
    ],
)
def test_a_wrong_task_is_one_line(words, problem, capfd):
    assert train_gpt2.main(["--task", *words, "--data_dir", str(ROOT / "none")]) == 2
    assert problem in capfd.readouterr().err
    assert wrong_files("--task", words, taken=["hellaswag"]) == [problem]


def test_names_that_need_no_file_stand_alone():
    assert named_files(["hellaswag"], alone=["hellaswag"]) == {"hellaswag": None}


def test_hellaswag_py_takes_a_task_or_a_file(capfd):
    assert hellaswag.main(["--task", f"a={ITEMS}", "--data", str(ITEMS)]) == 1
    assert "--task and --data: give one of them" in capfd.readouterr().err
