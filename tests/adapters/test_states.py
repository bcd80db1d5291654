"""What the three frameworks' trainers do with saved states that are damaged, hostile, of another
run or half-written, and with folders in which somebody else writes."""

import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import forked
import once
import pytest
import torch
from lazily import Lazily
from tiny_runs import flags, logged, write_shards

from adapters import states
from pretrain import files

ROOT = Path(__file__).parents[2]
state, transformers = Lazily("accelerate.state"), Lazily("transformers")
accelerate_loop = Lazily("adapters.accelerate_loop")
TRAINERS = {
    "accelerate": accelerate_loop,
    "trainer": Lazily("adapters.hf_trainer"),
    "lightning": Lazily("adapters.lightning_module"),
}
# A state of each trainer: the folder or file of update N, or the pattern of all.
STATE = {"accelerate": "step-{}", "trainer": "checkpoint-{}", "lightning": "last.ckpt"}
BOMBED = {
    "accelerate": ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"),
    "trainer": ("optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "lightning": ("last.ckpt",),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No network, and Accelerate as if no other test had configured it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The shards of the runs, which continue with the same."""
    return once.folder(tmp_path_factory, "states-data", write_shards)


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """{trainer: folder of a run of four updates, with the states of updates 2 and 4}."""
    return Finished(data_dir, tmp_path_factory)


class Finished(dict):
    """Runs that are trained when the first test asks for them; nobody writes to them."""

    def __init__(self, data_dir, tmp_path_factory):
        super().__init__()
        self.data_dir, self.factory = data_dir, tmp_path_factory

    def __missing__(self, name):
        self[name] = once.folder(self.factory, f"states-{name}", lambda out: self.train(name, out))
        return self[name]

    def train(self, name, folder):
        assert train(name, self.data_dir, folder) == 0


def train(name, data_dir, out_dir, **changes):
    state.AcceleratorState._reset_state(reset_partial_state=True)
    return TRAINERS[name].main([*flags(data_dir, out_dir, **changes), "--cpu"])


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def plant(file, mark, *, legacy=False):
    if legacy:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"step": 1, "state": Bomb(mark)}, file)


def lines(text, word):
    return [line for line in text.splitlines() if word in line]


# ---- hostile states


CASES = [(name, file) for name, names in BOMBED.items() for file in names]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize(("name", "file"), CASES)
def test_a_bomb_in_a_state_is_one_line_and_does_not_go_off(
    name, file, legacy, *, runs, data_dir, tmp_path, capsys
):
    out, mark = tmp_path / "out", tmp_path / "mark"
    shutil.copytree(runs[name], out)
    found = list(out.glob(f"*/{file}")) or [out / "last.ckpt", out / "best.ckpt"]
    for path in found:
        plant(path, mark, legacy=legacy)
    capsys.readouterr()
    assert train(name, data_dir, out, max_iters=6) == 1
    errors = capsys.readouterr().err
    assert not mark.exists()
    assert "Traceback" not in errors
    assert len(lines(errors, "error:")) == 1 and found[0].name in lines(errors, "error:")[0]


def test_objects_that_trainer_writes_and_nobody_reads_stay_unread(runs, data_dir, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "mark"
    shutil.copytree(runs["trainer"], out)
    for path in out.glob("*/training_args.bin"):
        plant(path, mark)
    assert train("trainer", data_dir, out, max_iters=6) == 0
    assert not mark.exists()


def test_torch_load_runs_nothing_even_for_a_caller_that_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(states.FORBID, "1")  # some people's environments have it
    plant(tmp_path / "bomb.pt", tmp_path / "mark")
    with states.plain_values_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert not (tmp_path / "mark").exists()
    assert states.FORCE not in os.environ and os.environ[states.FORBID] == "1"


# ---- damaged states


def cut(state):
    """A state whose save was cut short, in the middle of its largest file."""
    file = state if state.is_file() else max(state.iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [cut, lambda state: shutil.rmtree(state) or state.mkdir()])
@pytest.mark.parametrize("name", ["accelerate", "trainer"])
def test_a_damaged_newest_state_is_passed_over(name, damage, *, runs, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(runs[name], out)
    damage(out / STATE[name].format(4))
    (out / "metrics.jsonl").unlink()
    assert train(name, data_dir, out) == 0
    assert len(lines(capsys.readouterr().err, "passed over")) == 1
    again, whole = logged(out), logged(runs[name])
    assert again == {step: whole[step] for step in (3, 4)}
    assert (out / "earlier-1" / STATE[name].format(4)).is_dir()
    assert train(name, data_dir, out) == 0  # there is a whole state of update 4 again
    assert logged(out) == again


def test_lightning_goes_on_from_its_best_checkpoint_where_the_last_is_damaged(
    runs, data_dir, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(runs["lightning"], out)
    cut(out / "last.ckpt")
    assert train("lightning", data_dir, out, max_iters=5) == 0
    assert len(lines(capsys.readouterr().err, "passed over")) == 1
    assert max(logged(out)) == 5
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_whose_states_are_all_damaged_does_not_begin_anew(
    name, runs, data_dir, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(runs[name], out)
    damaged = [*out.glob("step-*"), *out.glob("checkpoint-*"), *out.glob("*.ckpt")]
    for state in damaged:
        cut(state)
    before = sorted(path for path in out.rglob("*") if path.name != ".lock")
    assert train(name, data_dir, out, max_iters=6) == 1
    errors = lines(capsys.readouterr().err, "error:")
    assert len(errors) == 1 and "older ones" in errors[0]
    assert sorted(path for path in out.rglob("*") if path.name != ".lock") == before


def test_a_state_that_the_system_does_not_let_us_read_is_no_damage(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(runs["accelerate"], out)
    refused, real = out / "step-4" / "optimizer.bin", open

    def guarded(path, *args, **kwargs):
        if Path(str(path)) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(states, "open", guarded, raising=False)
    with pytest.raises(PermissionError):
        accelerate_loop.newest_state(out)
    assert (out / "step-4").is_dir()


# ---- another split, another run


@pytest.mark.parametrize("name", ["accelerate", "trainer"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_goes_on_with_its_batch_split_otherwise(name, stop, runs, data_dir, tmp_path):
    """One micro-batch of four becomes two of two, after an odd number of them. The state is not the
    last of its run: at the end of the data Accelerate counts micro-batches from 0 again anyway."""
    whole = {"batch_size": 4, "gradient_accumulation_steps": 1, "eval_iters": 2}
    assert train(name, data_dir, tmp_path, max_iters=stop + 1, eval_interval=1, **whole) == 0
    shutil.rmtree(tmp_path / STATE[name].format(stop + 1))
    (tmp_path / "metrics.jsonl").unlink()
    assert train(name, data_dir, tmp_path) == 0
    for value in ("loss", "learning_rate"):
        expected = logged(runs[name], name=value)
        rest = {step: expected[step] for step in range(stop + 1, 5)}
        assert logged(tmp_path, name=value) == pytest.approx(rest, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("accelerate", {"batch_size": 4}, "sequences_per_update 4 there, 8 now"),
        ("accelerate", {"n_embd": 16}, "n_embd 8 there, 16 now"),
        ("trainer", {"gradient_accumulation_steps": 1}, "sequences_per_update 4 there, 2 now"),
        ("trainer", {"n_layer": 2}, "n_layer 1 there, 2 now"),
        ("lightning", {"seed": 4}, "seed 3 there, 4 now"),
        ("lightning", {"batch_size": 4, "gradient_accumulation_steps": 1}, "batch_size 2 there"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    name, changes, complaint, *, runs, data_dir, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(runs[name], out)
    assert train(name, data_dir, out, max_iters=6, **changes) == 1
    errors = lines(capsys.readouterr().err, "error:")
    assert len(errors) == 1 and complaint in errors[0]


@pytest.mark.parametrize("name", ["accelerate", "trainer"])
def test_states_of_earlier_versions_which_do_not_name_their_run_continue(
    name, runs, data_dir, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(runs[name], out)
    for path in out.glob(f"*/{states.RUN}"):
        path.unlink()
    shutil.rmtree(out / STATE[name].format(4))
    (out / "metrics.jsonl").unlink()
    assert train(name, data_dir, out) == 0
    assert logged(out) == {step: logged(runs[name])[step] for step in (3, 4)}


def test_several_gpus_in_one_process_are_refused(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 3))
    assert train("trainer", data_dir, tmp_path) == 1
    errors = lines(capsys.readouterr().err, "error:")
    assert len(errors) == 1 and "torchrun --nproc_per_node=3" in errors[0]


# ---- folders


@pytest.mark.parametrize("name", TRAINERS)
def test_two_runs_do_not_write_to_one_folder(name, data_dir, tmp_path, capsys):
    with files.lock(tmp_path / ".lock", "taken"):
        assert train(name, data_dir, tmp_path) == 1
    assert "another run is writing here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_folder_that_cannot_be_is_one_line(name, data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(name, data_dir, tmp_path / "file") == 1
    errors = capsys.readouterr().err
    assert len(lines(errors, "error:")) == 1 and "Traceback" not in errors


@pytest.mark.parametrize("name", TRAINERS)
def test_a_disk_that_fills_up_at_a_save_is_one_line_and_earlier_states_stay(
    name, runs, data_dir, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(runs[name], out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # a state has 1.6 MB and more
    try:
        assert train(name, data_dir, out, max_iters=6) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = capsys.readouterr().err
    assert len(lines(errors, "error:")) == 1 and "Traceback" not in errors
    assert train(name, data_dir, out, max_iters=6) == 0
    assert max(logged(out)) == 6


# ---- kills

# What is called between the writing of a state and its name, and how often it is called before.
KILLED = {
    "accelerate": ("pretrain.files", "publish", 1),
    "trainer": ("transformers.trainer_callback", "TrainerState.save_to_json", 1),
    "lightning": ("fsspec.implementations.local", "LocalFileOpener.commit", 1),
}
KILLING = """
import importlib, os, signal, sys
module, name, calls = sys.argv[1], sys.argv[2].split("."), int(sys.argv[3])
owner = importlib.import_module(module)
for part in name[:-1]:
    owner = getattr(owner, part)
real = getattr(owner, name[-1])

def kill(*args, **kwargs):
    global calls
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    calls -= 1
    return real(*args, **kwargs)

setattr(owner, name[-1], kill)
sys.exit(importlib.import_module(sys.argv[4]).main(sys.argv[5:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_killed_between_writing_a_state_and_its_name_goes_on(name, runs, data_dir, tmp_path):
    module, function, calls = KILLED[name]
    argv = [*flags(data_dir, tmp_path), "--cpu"]
    command = [sys.executable, "-c", KILLING, module, function, str(calls)]
    done = forked.run(
        [*command, TRAINERS[name].__name__, *argv],
        popen=forked.AdapterPopen,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert train(name, data_dir, tmp_path) == 0
    assert logged(tmp_path) == pytest.approx(logged(runs[name]), abs=1e-6)
    assert logged(tmp_path, "eval", "val_loss") == pytest.approx(
        logged(runs[name], "eval", "val_loss"), abs=1e-6
    )
