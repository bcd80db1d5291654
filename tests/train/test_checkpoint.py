import os
import random
import resource
import sys
from pathlib import Path

import forked
import pytest
import torch

from pretrain.files import Locked
from pretrain.train import checkpoint as checkpoints
from pretrain.train.checkpoint import CheckpointError, find, link, load, newest, prune, save

ROOT = Path(__file__).parents[2]


def make(step, seed=0):
    weights = torch.randn(64, 33, generator=torch.Generator().manual_seed(seed + step))
    model, config = {"weight": weights}, {"flags": ["a", 1.5, None]}
    return {"format": 1, "step": step, "model": model, "optimizer": {}, "config": config}


def same(a, b):
    return a["step"] == b["step"] and torch.equal(a["model"]["weight"], b["model"]["weight"])


def damage(path):
    """Flip one bit inside the tensor's bytes."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_checkpoint_comes_back_as_it_was_and_plain_torch_can_read_it(tmp_path):
    save(tmp_path / "a.pt", make(7))
    assert same(load(tmp_path / "a.pt"), make(7))
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), make(7))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_writing_to_loaded_tensors_does_not_change_the_file(tmp_path):
    save(tmp_path / "a.pt", make(7))
    load(tmp_path / "a.pt")["model"]["weight"].zero_()
    assert same(load(tmp_path / "a.pt"), make(7))


KILLED_SAVE = """
import builtins, os, signal, sys, torch
sys.path.insert(0, {root!r})
from pretrain import files
from pretrain.train import checkpoint
folder = {folder!r}

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

class DieInWrite:
    def __init__(self, file): self.file, self.left = file, 20_000
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, data):
        self.left -= len(data)
        self.file.write(data[: max(0, self.left)])
        if self.left < 0:
            self.file.flush()
            die()
        return len(data)

def in_write(): files.open = lambda *a: DieInWrite(builtins.open(*a))
def before_sync(): os.fsync = die
def before_rename(): os.replace = die
def after_rename():
    rename = os.replace
    def rename_and_die(*a):
        rename(*a)
        die()
    os.replace = rename_and_die

weights = (torch.full((100, 100), float(n)) for n in (1, 2))
old, new = ({{"format": 1, "optimizer": 0, "step": n, "w": w}} for n, w in enumerate(weights, 1))
for moment in (in_write, before_sync, before_rename, after_rename):
    path = os.path.join(folder, moment.__name__ + ".pt")
    checkpoint.save(path, old)
    child = os.fork()
    if child == 0:
        moment()
        checkpoint.save(path, new)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_of_a_save_leaves_one_whole_checkpoint(tmp_path):
    code = KILLED_SAVE.format(root=str(ROOT), folder=str(tmp_path))
    forked.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, step in (
        ("in_write", 1),
        ("before_sync", 1),
        ("before_rename", 1),
        ("after_rename", 2),
    ):
        found = load(tmp_path / f"{name}.pt")
        assert found["step"] == step and bool((found["w"] == step).all()), name
    assert len(list(tmp_path.glob(".*.tmp"))) == 3, "a killed save leaves its temporary file"
    find(tmp_path, "auto")
    assert not list(tmp_path.glob(".*.tmp")), "which the next run removes"


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path):
    save(tmp_path / "a.pt", make(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt: not saved .*[Ff]ile too large"):
            save(tmp_path / "a.pt", make(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(load(tmp_path / "a.pt"), make(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_flipped_bit_is_noticed_wherever_it_changes_anything(tmp_path):
    path = tmp_path / "a.pt"
    save(path, make(3))
    whole, chosen, noticed = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
        try:
            assert same(load(path), make(3)), "a bit of padding or of an unused header field"
        except CheckpointError:
            noticed += 1
    assert noticed > 200


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    save(path, make(3))
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt: damaged"):
            load(path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    torch.save(
        {"format": 1, "step": 10**9, "model": Hostile(tmp_path / "executed")}, tmp_path / "evil.pt"
    )
    with pytest.raises(CheckpointError, match="refused because loading it could run code"):
        load(tmp_path / "evil.pt")
    save(tmp_path / "good.pt", make(5))
    path, _ = newest(tmp_path)
    assert path.name == "good.pt" and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {}}, {"step": "7"}, {"step": 3, "format": 99}]
)
def test_what_is_not_a_checkpoint_of_this_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint|format 99"):
        load(tmp_path / "a.pt")


def test_the_newest_is_found_by_its_step_not_by_name_or_age(tmp_path):
    for name, step in (
        ("iter-9-loss-1.0000.pt", 900),
        ("resume.pt", 1200),
        ("iter-99-loss-1.0000.pt", 300),
    ):
        save(tmp_path / name, make(step))
    os.utime(tmp_path / "resume.pt", (0, 0))
    path, checkpoint = newest(tmp_path)
    assert path.name == "resume.pt" and same(checkpoint, make(1200))
    assert newest(tmp_path / "nothing") is None


def test_damaged_checkpoints_are_passed_over_with_a_warning_until_a_good_one(tmp_path, capsys):
    for step in (100, 200, 300):
        save(tmp_path / f"iter-{step}-loss-1.0000.pt", make(step))
    damage(tmp_path / "iter-300-loss-1.0000.pt")
    (tmp_path / "iter-200-loss-1.0000.pt").write_bytes(b"PK")
    path, checkpoint = newest(tmp_path)
    assert path.name == "iter-100-loss-1.0000.pt" and same(checkpoint, make(100))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all("iter-300" in line or "iter-200" in line for line in warnings)
    damage(path)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be read(.|\n)*iter-200(.|\n)*iter-100"
    ):
        newest(tmp_path)


def test_only_the_newest_iterations_are_kept_and_resume_goes_when_one_is_newer(tmp_path):
    for step in (5, 10, 100, 20):
        save(tmp_path / f"iter-{step}-loss-2.5000.pt", make(step))
    for name in ("best_val_loss.pt", "final_model.pt", "resume.pt"):
        save(tmp_path / name, make(1))
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best_val_loss.pt",
        "final_model.pt",
        "iter-100-loss-2.5000.pt",
        "iter-20-loss-2.5000.pt",
    ]


def test_a_link_takes_no_room_and_outlives_its_source(tmp_path, monkeypatch):
    save(tmp_path / "a.pt", make(1))
    link(tmp_path / "a.pt", tmp_path / "best.pt")
    assert (tmp_path / "a.pt").stat().st_ino == (tmp_path / "best.pt").stat().st_ino
    save(tmp_path / "a.pt", make(2))
    assert same(load(tmp_path / "best.pt"), make(1)), "a save makes a new file"

    def no_links(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    link(tmp_path / "a.pt", tmp_path / "best.pt")
    assert same(load(tmp_path / "best.pt"), make(2))
    assert (tmp_path / "a.pt").stat().st_ino != (tmp_path / "best.pt").stat().st_ino


def test_starting_anew_moves_an_earlier_run_aside_whole(tmp_path):
    for name in ("iter-5-loss-2.0000.pt", "best_val_loss.pt"):
        save(tmp_path / name, make(5))
    (tmp_path / "broken.pt").write_bytes(b"?")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    assert find(tmp_path, "never") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "notes.txt"]
    assert len(list((tmp_path / "earlier-1").iterdir())) == 4
    save(tmp_path / "resume.pt", make(1))
    find(tmp_path, "never")
    assert (tmp_path / "earlier-2" / "resume.pt").exists()
    assert find(tmp_path, "never") is None and not (tmp_path / "earlier-3").exists()


def test_going_back_to_a_checkpoint_moves_later_ones_aside(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path / f"iter-{step}-loss-1.0000.pt", make(step))
    chosen = tmp_path / "iter-200-loss-1.0000.pt"
    assert find(tmp_path, str(chosen)) == chosen
    assert newest(tmp_path)[0] == chosen
    assert (tmp_path / "earlier-1" / "iter-300-loss-1.0000.pt").exists()
    with pytest.raises(CheckpointError, match="no such file"):
        find(tmp_path, str(tmp_path / "missing.pt"))


@pytest.mark.parametrize("resume", ["never", "old"])
def test_a_restart_by_torchrun_goes_on_where_the_run_was(tmp_path, monkeypatch, resume):
    save(tmp_path / "old.pt", make(10))
    save(tmp_path / "resume.pt", make(20))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (
        find(tmp_path, resume if resume == "never" else str(tmp_path / "old.pt")).name
        == "resume.pt"
    )


def test_all_that_differs_between_two_runs_is_named_at_once():
    saved = {"n_layer": 12, "data": "abc", "seed": 1}
    checkpoints.refuse_other_run("a.pt", saved, dict(saved))
    with pytest.raises(
        CheckpointError,
        match=r"a\.pt belongs(.|\n)*n_layer: 12 .* 6 now\n  data: abc .* xyz now\nGive",
    ):
        checkpoints.refuse_other_run("a.pt", saved, {"n_layer": 6, "data": "xyz", "seed": 1})


def test_one_folder_serves_one_run_at_a_time(tmp_path):
    with (
        checkpoints.lock(tmp_path / "new"),
        pytest.raises(Locked, match="another run is writing"),
    ):
        checkpoints.lock(tmp_path / "new")
    checkpoints.lock(tmp_path / "new").close()


def test_restored_moments_keep_the_settings_of_the_new_flags():
    def trained(learning_rate, beta2):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, betas=(0.9, beta2))
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return optimizer

    old, new = trained(1e-3, 0.95), trained(5e-4, 0.99)
    for state in new.state.values():
        state["exp_avg"].zero_()
    checkpoints.restore_optimizer(new, old.state_dict())
    assert new.param_groups[0]["lr"] == 5e-4 and new.param_groups[0]["betas"] == (0.9, 0.99)
    for mine, theirs in zip(new.state.values(), old.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"]) and mine["step"] == theirs["step"]


def test_a_run_is_finished_when_its_last_step_has_its_final_model(tmp_path):
    assert not checkpoints.is_finished(tmp_path, 5)
    save(tmp_path / "final_model.pt", make(5))
    assert checkpoints.is_finished(tmp_path, 5) and not checkpoints.is_finished(tmp_path, 6)


def test_what_is_not_saved_says_whether_something_else_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"not saved .*; so far nothing of the run is$"):
        save(tmp_path / "a" / "resume.pt", {"step": 1})
    save(tmp_path / "iter-2-loss-1.0000.pt", {"step": 2})
    (tmp_path / "resume.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"not saved .*; earlier checkpoints are untouched$"):
        save(tmp_path / "resume.pt", {"step": 3})
