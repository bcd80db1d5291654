import io
import json
import os
import time

import pytest

from pretrain.errors import UserError
from pretrain.report import runlog
from pretrain.report.lines import eval_line, train_line
from pretrain.report.runlog import RunLog, Stopwatch, last_per_step, read_log

TRAIN = {
    "step": 10,
    "loss": 9.7,
    "learning_rate": 3e-6,
    "grad_norm": 2.5,
    "tokens_per_second": 123456.7,
    "milliseconds_per_step": 265.4,
    "mfu": None,
    "memory_bytes": 12_300_000_000,
}


def test_what_is_written_is_read_back_in_order(tmp_path):
    log = RunLog(tmp_path)
    log.write("start", flags={"seed": 1337}, files=["a", "b"])
    log.write("train", step=1, loss=0.1 + 0.2)
    records = read_log(tmp_path / "metrics.jsonl")
    assert [r["event"] for r in records] == ["start", "train"]
    assert records[0]["flags"] == {"seed": 1337} and records[1]["loss"] == 0.1 + 0.2
    assert all(abs(r["time"] - time.time()) < 60 for r in records)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_under_the_logs_name_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    makers = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/full")}
    makers.get(kind, os.mkdir)(path)
    for use in (RunLog, lambda folder: read_log(folder / "metrics.jsonl")):
        with pytest.raises(UserError, match=r"metrics\.jsonl: not a regular file; move it away"):
            use(tmp_path)


def test_a_second_writer_continues_the_file(tmp_path):
    RunLog(tmp_path).write("train", step=1)
    RunLog(tmp_path).write("train", step=2)
    assert [r["step"] for r in read_log(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_by_a_kill_costs_that_line_alone(tmp_path, cut):
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.write("train", step=step)
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert [r["step"] for r in read_log(path)] == ([1, 2] if cut == 1 else [1])
    before = path.read_bytes()
    RunLog(tmp_path).write("train", step=3)
    assert path.read_bytes().startswith(before), "the file is only ever appended to"
    assert [r["step"] for r in read_log(path)] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_of_repeated_steps_the_last_is_kept(tmp_path):
    log = RunLog(tmp_path)
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 8.5), (3, 7.5)):
        log.write("train", step=step, loss=loss)
    log.write("eval", step=2, val_loss=1.0)
    kept = last_per_step(read_log(tmp_path / "metrics.jsonl"), "train")
    assert [(r["step"], r["loss"]) for r in kept] == [(1, 9.0), (2, 8.5), (3, 7.5)]


def test_numbers_that_json_lacks_become_strings(tmp_path):
    RunLog(tmp_path).write("stop", loss=float("nan"), grad_norm=float("inf"))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == "nan"


def test_lines_wait_while_the_disk_is_full_and_follow_later(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path)
    log.write("train", step=1)
    room = [7, 0, 0]  # bytes that the disk takes from the next writes

    class FullDisk(io.FileIO):
        def write(self, data):
            if room and not room[0]:
                room.pop(0)
                raise OSError(28, "No space left on device")
            return super().write(data[: room.pop(0)] if room else data)

    monkeypatch.setattr(
        runlog, "open", lambda path, mode, buffering: FullDisk(path, mode), raising=False
    )
    for step in (2, 3, 4):
        log.write("train", step=step)
    assert capsys.readouterr().err.count("No space left") == 1, "said once, not at every line"
    log.write("train", step=5)
    assert [r["step"] for r in read_log(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_lines_that_never_found_room_are_said_at_the_end(tmp_path, capsys):
    log = RunLog(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.write("train", step=1)
    log.close(1, ValueError("a fault"))
    first, last = capsys.readouterr().err.splitlines()
    assert "No space left on device" in first
    assert last == f"warning: {tmp_path}/metrics.jsonl: no room for its last 2 lines"


def test_the_stopwatch_leaves_out_what_happens_while_it_is_paused(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    now[0] = 3.0
    watch.pause()
    now[0] = 100.0
    watch.pause()  # a pause within a pause is one pause
    watch.resume()
    now[0] = 102.0
    assert watch.lap() == 5.0
    now[0] = 102.5
    assert watch.lap() == 0.5


def test_console_lines_have_one_width_whatever_the_numbers():
    small = train_line(TRAIN, 600_000)
    large = train_line(
        {**TRAIN, "step": 599_999, "loss": 10.98, "tokens_per_second": 1_234_567.0}, 600_000
    )
    assert len(small) == len(large) and "mfu" not in small
    assert "mfu 41.2%" in train_line({**TRAIN, "mfu": 0.412}, 600_000)
    assert "9.7000" in small and "123,457 tok/s" in small and "12.3 GB" in small


def test_the_evaluation_line_shows_hellaswag_only_where_there_is_one():
    record = {
        "step": 5,
        "val_loss": 3.29,
        "train_loss": 3.25,
        "perplexity": 26.87,
        "accuracy": 0.381,
    }
    assert "hellaswag" not in eval_line(record, 10)
    record["hellaswag"] = {"acc_norm": 0.2955, "n": 10042}
    assert "hellaswag 29.5% (10042)" in eval_line(record, 10)
