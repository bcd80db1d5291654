"""An export is whole, computes what the model computes, and takes an earlier one's place in one
step."""

import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F

import model as model_file
from adapters import exporting, huggingface
from model import GPT, GPTConfig
from pretrain import files

ROOT = Path(__file__).parents[2]


def gpt(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32} | changes))


def save(model, path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"model": model.state_dict(), "model_config": asdict(model.config), "format": 1}
    torch.save({**saved, "step": 1, **more}, path)
    return path


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def embedding(folder):
    return GPT.from_pretrained(folder).transformer.wte.weight[0, 0].item()


def run(*argv):
    return huggingface.main([str(word) for word in argv])


# ---- the same function


def relu_squared(self, x):
    return self.c_proj(F.relu(self.c_fc(x)).square())


def gelu_of_erf(self, x):
    return self.c_proj(F.gelu(self.c_fc(x)))


def test_an_edited_model_is_not_exported(tmp_path, monkeypatch, capsys):
    path = save(gpt(), tmp_path / "a.pt")
    monkeypatch.setattr(model_file.MLP, "forward", relu_squared)
    assert run("export", path, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "computes other logits" in errors
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("edit", ["eps", "scale", "erf"])
def test_small_edits_are_seen_too(edit, tmp_path, monkeypatch):
    model = gpt(n_layer=2)
    for parameter in model.parameters():
        parameter.data *= 8  # as large as those of a model that has learnt
    if edit == "eps":
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                monkeypatch.setattr(module, "eps", 1e-2)
    elif edit == "scale":
        model.transformer.h[0].attn.register_forward_hook(lambda *a: a[-1] * 1.01)
    else:
        monkeypatch.setattr(model_file.MLP, "forward", gelu_of_erf)
    with pytest.raises(exporting.HuggingFaceError, match="other logits"):
        huggingface.export(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_to_a_smaller_type_is_no_other_function(dtype, tmp_path):
    model = gpt(n_layer=3)
    for parameter in model.parameters():
        parameter.data *= 8
    huggingface.export(model, tmp_path / "out", dtype=dtype)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_that_is_not_finite_is_not_exported(tmp_path):
    model = gpt()
    model.transformer.wpe.weight.data[0] = torch.nan
    with pytest.raises(exporting.HuggingFaceError, match="not finite"):
        huggingface.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_export_leaves_the_model_as_it_was(tmp_path):
    model = gpt().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    huggingface.export(model, tmp_path / "out", dtype="bfloat16")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- what is exported


@pytest.mark.parametrize("name", ["best_val_loss.pt", "final_model.pt"])
def test_the_folder_of_a_run_is_exported(name, tmp_path, capsys):
    out = tmp_path / "run"
    save(gpt(seed=3), out / name)
    (out / "config.json").write_text('{"n_layer": 1}')  # its flags
    assert run("export", out, tmp_path / "out") == 0
    assert embedding(tmp_path / "out") == gpt(seed=3).transformer.wte.weight[0, 0].item()


def test_the_folder_of_another_trainers_run_is_exported(tmp_path):
    huggingface.export(gpt(seed=3), tmp_path / "run" / "export")
    assert run("export", tmp_path / "run", tmp_path / "out") == 0
    assert embedding(tmp_path / "out") == embedding(tmp_path / "run" / "export")


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert run("export", tmp_path / "run", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "best_val_loss.pt" in errors


# ---- whole or as before


def test_an_export_over_an_export_keeps_other_files_and_no_old_one(tmp_path):
    out = tmp_path / "out"
    huggingface.export(gpt(seed=1), out)
    (out / "README.md").write_text("mine")
    (out / "figures").mkdir()
    (out / "figures" / "loss.txt").write_text("3.1")
    (out / "link").symlink_to("README.md")
    huggingface.export(gpt(seed=2), out)
    assert embedding(out) == gpt(seed=2).transformer.wte.weight[0, 0].item()
    assert (out / "README.md").read_text() == "mine" and (out / "link").is_symlink()
    assert (out / "figures" / "loss.txt").read_text() == "3.1"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_takes_the_place_of_another(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert contents(tmp_path) == {"old/new": b"new"}


@pytest.mark.parametrize("limit", [1_000, 200_000, 2_000_000])  # within each of the large files
def test_a_full_disk_leaves_the_export_of_before_and_nothing_else(limit, tmp_path, capsys):
    path, out = save(gpt(seed=2), tmp_path / "a.pt"), tmp_path / "out"
    huggingface.export(gpt(seed=1), out)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert run("export", path, out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "too large" in errors.lower()
    assert contents(tmp_path) == before


KILLED = """
import os, signal, sys
from pretrain import files
real = files.sync_tree
files.sync_tree = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
from adapters import huggingface
huggingface.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_before_an_export_has_its_name_leaves_the_one_of_before(tmp_path):
    path, out = save(gpt(seed=2), tmp_path / "a.pt"), tmp_path / "out"
    huggingface.export(gpt(seed=1), out)
    before = contents(out)
    command = [sys.executable, "-c", KILLED, "export", str(path), str(out)]
    done = forked.run(
        command, popen=forked.AdapterPopen, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(out) == before
    assert run("export", path, out) == 0
    assert embedding(out) == gpt(seed=2).transformer.wte.weight[0, 0].item()
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "out"]


def test_two_exports_do_not_write_to_one_folder(tmp_path):
    with (
        exporting.new_export(tmp_path / "out"),
        pytest.raises(files.Locked, match="another export"),
        exporting.new_export(tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_the_users_that_looks_temporary_stays(tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "notes.txt").write_text("mine")
    huggingface.export(gpt(), tmp_path / "out")
    assert (tmp_path / ".out.tmp" / "notes.txt").read_text() == "mine"


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, capsys):
    path = save(gpt(), tmp_path / "a.pt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("export", path, ".", "--overwrite") == 1
    assert "current folder" in capsys.readouterr().err and Path.cwd().is_dir()
