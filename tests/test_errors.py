"""The net around every program: what it advises can be done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import write_shards

import fineweb
import hellaswag
import sample
import train_gpt2
from adapters import common, huggingface
from pretrain.errors import lasting_output, program, reason
from pretrain.tokens import command
from pretrain.train import settings

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "fineweb": (fineweb, (command, "run"), fineweb.make_parser, ["--source", "text.txt"]),
    "hellaswag": (hellaswag, (hellaswag, "run"), hellaswag.build_parser, []),
    "sample": (sample, (sample, "run"), sample.build_parser, []),
    "train_gpt2": (
        train_gpt2,
        (train_gpt2, "train"),
        settings.build_parser,
        ["--data", "text.txt"],
    ),
}


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. x")])
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_memory_a_program_advises_flags_that_it_has(
    name, error, monkeypatch, tmp_path, capsys
):
    module, (place, function), build_parser, argv = PROGRAMS[name]

    def exhausted(*args):
        raise error

    monkeypatch.setattr(place, function, exhausted)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A mill by the river.")
    assert module.main(argv) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "out of memory" in line
    advised = re.findall(r"--\w+", line)
    known = {word for action in build_parser()._actions for word in action.option_strings}
    assert advised and set(advised) <= known


def test_a_program_without_sizes_among_its_flags_advises_none(capsys):
    with program("report") as outcome:
        raise MemoryError
    assert outcome.status == 1 and "--" not in capsys.readouterr().err


def test_a_trainer_of_another_framework_refuses_a_modern_model_in_one_line(tmp_path):
    run = Path(tmp_path, "run")
    shared = ["--n_layer", "1", "--n_head", "2", "--n_embd", "8", "--block_size", "16"]
    text = Path(tmp_path, "text.txt")
    text.write_text("A mill by the river. " * 99)
    new = ["--model", "modern", "--data", str(text), "--max_iters", "1", "--warmup_iters", "0"]
    new += ["--eval_interval", "0", "--no-hellaswag", "--device", "cpu", "--batch_size", "1"]
    assert train_gpt2.main([*shared, *new, "--out_dir", str(run)]) == 0
    for name in (run / "final_model.pt", run):
        flags = ["--init_from", str(name), "--data_dir", str(run / "data"), "--warmup_iters", "0"]
        args, given = common.parse("", flags, str(tmp_path / "other"))
        with pytest.raises(common.AdapterError, match="a model of the modern architecture"):
            common.build_model(args, given)


@pytest.mark.parametrize(
    "variable", [{"WORLD_SIZE": "0"}, {"RANK": "x"}, {"RANK": "0", "LOCAL_RANK": "first"}]
)
@pytest.mark.parametrize("name", ["train_gpt2", "adapter"])
def test_variables_that_torchrun_would_not_set_are_one_line_in_every_trainer(
    name, variable, monkeypatch, tmp_path, capsys
):
    for key, value in variable.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A mill by the river. " * 99)
    if name == "adapter":
        flags = [
            "--data_dir",
            str(write_shards(tmp_path / "data")),
            "--warmup_iters",
            "0",
            "--max_iters",
            "1",
        ]
        status = common.main("x.py", flags, common.build_model, description="", out_dir="out")
    else:
        flags = ["--data", "text.txt", "--total_batch_tokens", str(8 * 1024), "--device", "cpu"]
        status = train_gpt2.main(flags)
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1 and "not what torchrun sets" in error


@pytest.mark.parametrize("config", ["[1]", "{x", "[" * 100_000, '"gpt2"'])
def test_a_folder_whose_configuration_is_none_is_not_pushed(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert huggingface.main(["push", str(tmp_path), "somebody/model"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not that of a GPT-2" in error


def test_a_full_disk_behind_stdout_is_called_so():
    script = (
        "from pretrain.errors import program\n"
        "with program('x.py') as outcome: print('line')\n"
        "raise SystemExit(outcome.status)"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, cwd=ROOT, env=buffered, check=False, **pipes)
    assert done.returncode == 1
    assert done.stderr == "x.py: error: standard output: No space left on device\n"


def test_work_that_lasts_says_once_that_the_disk_behind_stdout_is_full(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115 (closing it fails)
    with lasting_output():
        for _ in range(3):
            print("a line", flush=True)
    assert capsys.readouterr().err == "warning: standard output: No space left on device\n"


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "a/b"), ValueError("no")]
)
def test_a_reason_is_for_messages_that_name_the_file_themselves(error):
    assert reason(error) in ("Permission denied", "no")
