"""Which checkpoint is the best, after kills, deletions and resumes: the record in a checkpoint and
the name best_val_loss.pt say the same."""

import math
import os

import pytest
import torch

from pretrain.train.best import Record, reconcile
from pretrain.train.checkpoint import CheckpointError, Unreadable, find, link, load, newest, save

RUN = {"n_layer": 1}


def write(folder, step, val_loss, record, *, evaluated=True, name=None):
    """A checkpoint as a run saves it: at an evaluation, or between two of them."""
    path = folder / (name or f"iter-{step}-loss-{val_loss:.4f}.pt")
    weights = {"weight": torch.full((3, 3), float(step))}
    numbers = {"step": step, "val_loss": val_loss, "last_eval_step": step if evaluated else 0}
    optimizer = {"state": {}, "param_groups": []}
    rest = {"model": weights, "optimizer": optimizer, "scaler": {}, "run": RUN, "model_config": {}}
    save(path, {"format": 1, **numbers, **vars(record), **rest})
    return path


def run_of(folder, *losses):
    """(path of the last checkpoint, its record) of a run that was evaluated so, at steps 0, 4, ...,
    with best_val_loss.pt never linked, as if every link had been killed."""
    record = Record()
    for number, loss in enumerate(losses):
        record = record.after(4 * number, loss)
        path = write(folder, 4 * number, loss, record)
    return path, record


def test_a_record_is_the_lowest_loss_its_step_and_the_evaluations_since():
    record = Record()
    for step, loss in ((0, 5.0), (4, 4.0), (8, 4.5), (12, math.nan), (16, 4.0)):
        record = record.after(step, loss)
    assert record == Record(4.0, 4, 3)


@pytest.mark.parametrize("losses", [(5.0, 4.0), (5.0, 6.0), (5.0, 4.0, 4.5), (3.0, 4.0, 5.0)])
def test_a_link_that_a_kill_prevented_is_made_when_the_run_goes_on(tmp_path, losses):
    path, record = run_of(tmp_path, *losses)
    found, problem = reconcile(tmp_path, path, load(path))
    assert (found, problem) == (record, None)
    best = load(tmp_path / "best_val_loss.pt")
    assert best["val_loss"] == min(losses) == found.best_val_loss
    assert best["step"] == found.best_step == 4 * losses.index(min(losses))


def test_an_older_best_gives_way_to_the_one_that_the_record_names(tmp_path):
    path, record = run_of(tmp_path, 5.0, 4.0)
    link(tmp_path / "iter-0-loss-5.0000.pt", tmp_path / "best_val_loss.pt")
    assert reconcile(tmp_path, path, load(path)) == (record, None)
    assert load(tmp_path / "best_val_loss.pt")["step"] == 4


def test_where_the_best_is_lost_the_next_best_takes_its_place_and_patience_goes_on(tmp_path):
    path, record = run_of(tmp_path, 3.0, 4.0, 4.5)
    (tmp_path / "iter-0-loss-3.0000.pt").unlink()
    found, problem = reconcile(tmp_path, path, load(path))
    assert found == Record(4.0, 4, record.evals_since_best) and "is in no file here" in problem
    assert load(tmp_path / "best_val_loss.pt")["step"] == 4


def test_a_checkpoint_between_evaluations_is_nobodys_best(tmp_path):
    _, record = run_of(tmp_path, 5.0)
    path = write(tmp_path, 3, 5.0, record, evaluated=False, name="resume.pt")
    assert reconcile(tmp_path, path, load(path)) == (record, None)
    assert load(tmp_path / "best_val_loss.pt")["step"] == 0


def test_a_run_that_goes_on_in_another_folder_takes_its_best_along(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path, record = run_of(tmp_path / "a", 5.0, 4.0, 4.5)
    assert reconcile(tmp_path / "b", path, load(path)) == (record, None)
    assert load(tmp_path / "b" / "best_val_loss.pt")["val_loss"] == 4.0


def test_another_runs_checkpoint_in_the_folder_is_not_taken_for_the_best(tmp_path):
    path, _ = run_of(tmp_path, 3.0, 4.0)
    stranger = load(tmp_path / "iter-0-loss-3.0000.pt") | {"run": {"n_layer": 2}}
    save(tmp_path / "iter-0-loss-3.0000.pt", stranger)
    found, _ = reconcile(tmp_path, path, load(path))
    assert (found.best_val_loss, found.best_step) == (4.0, 4)


# ---- what the system says is no damage


@pytest.mark.parametrize("name", ["EACCES", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "EPERM"])
def test_what_the_system_does_not_hand_out_is_not_damaged_and_stays(tmp_path, monkeypatch, name):
    import builtins
    import errno
    import os

    run_of(tmp_path, 5.0, 4.0, 3.0)
    before, real = sorted(path.name for path in tmp_path.iterdir()), builtins.open

    def refusing(file, *arguments, **named):
        if "iter-8" in str(file):
            number = getattr(errno, name)
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *arguments, **named)

    monkeypatch.setattr(builtins, "open", refusing)
    for ask in (newest, lambda folder: find(folder, "auto"), lambda folder: find(folder, "never")):
        with pytest.raises(Unreadable, match=os.strerror(getattr(errno, name))) as caught:
            ask(tmp_path)
        assert "iter-8" in str(caught.value) and "damaged" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["iter-12-loss-2.0000.pt", "iter-12.pt", "resume.pt", "final_model.pt"]
)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_under_a_checkpoints_name_is_said_and_left_alone(tmp_path, name, make):
    run_of(tmp_path, 5.0, 4.0)
    make(tmp_path / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    for ask in (newest, lambda folder: find(folder, "auto"), lambda folder: find(folder, "never")):
        with pytest.raises(Unreadable, match=name):
            ask(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_of_ones_own_among_the_checkpoints_is_left_alone(tmp_path):
    run_of(tmp_path, 5.0)
    (tmp_path / "mine.pt").mkdir()
    (tmp_path / ".x.tmp").mkdir()
    (tmp_path / ".y.pt.tmp").mkdir()
    (tmp_path / ".mine.tmp").write_text("mine")
    (tmp_path / ".best_val_loss.pt.tmp").write_text("of a save that was killed")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "gone")
    (tmp_path / "dangling.pt").unlink()
    assert find(tmp_path, "auto").name == "iter-0-loss-5.0000.pt"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"mine.pt", ".x.tmp", ".y.pt.tmp", ".mine.tmp"} <= names
    assert ".best_val_loss.pt.tmp" not in names and "earlier-1" not in names


def test_an_untrained_checkpoint_of_other_flags_makes_room_for_a_new_run(tmp_path):
    path, _ = run_of(tmp_path, 5.0)
    save(path, load(path) | {"config": {"batch_size": 8}, "processes": 1})
    assert find(tmp_path, "auto", {"batch_size": 8, "processes": 1}) == path
    assert find(tmp_path, "auto", {"batch_size": 4, "processes": 1}) is None
    assert (tmp_path / "earlier-1" / path.name).exists()


ODD = {
    "format": [torch.zeros(2), torch.zeros(9, 9), [1], "1", True],
    "processes": [torch.zeros(2), [2], "2", -1],
    "step": [-1, 2**70, True, 1.5],
    "last_eval_step": [-2, "4"],
    "evals_since_best": [-1, None],
    "val_loss": ["3.2", None, True],
    "best_val_loss": [[], {}],
    "model": [[], {1: 2}, {"weight": "tensor"}],
    "model_config": [[], {"n_layer": [12]}, "gpt2"],
    "run": [None, 3, {"": torch.zeros(2)}, {"n_layer": [torch.zeros(2)]}],
    "config": [[1]],
    "scaler": [7],
    "architecture": [5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in ODD for value in ODD[key]])
def test_a_checkpoint_of_another_form_is_one_line_that_names_the_file(tmp_path, key, value):
    path, _ = run_of(tmp_path, 5.0)
    save(path, load(path) | {key: value})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 500
