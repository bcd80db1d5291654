"""Ranks that find each other, miss each other, or are left behind: real processes and real stores
on loopback, with waiting times of seconds."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from free_port import free_port
from tiny_runs import flags, logged, write_shards
from waiting import is_alive, wait_for

import train_gpt2
from pretrain import rendezvous
from pretrain.rendezvous import Place, RankError, environment, in_words, meeting_point

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "first"}, "RANK='first': not what torchrun sets"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "2"}, "RANK=2: not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "1e3"}, "WORLD_SIZE='1e3'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http': not a port from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536': not a port from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0': not a port from 1 to 65535"),
        ({"MASTER_PORT": "29 500"}, "MASTER_PORT='29 500': not a port from 1 to 65535"),
        ({"MASTER_PORT": ""}, "needs MASTER_PORT, which is not set"),
        ({"MASTER_ADDR": " "}, "needs MASTER_ADDR, which is not set"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_named(variables, message, monkeypatch):
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (usual | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError) as error:
        Place.from_environment()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "1.5", "9" * 5000])
def test_a_limit_in_seconds_that_is_none_is_named(text, monkeypatch):
    monkeypatch.setenv("PRETRAIN_HANG_SECONDS", text)
    with pytest.raises(RankError, match=r"PRETRAIN_HANG_SECONDS='.*': not a whole number of sec"):
        rendezvous.hang_seconds()


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "")
    assert environment("LOCAL_RANK", 0) == 0
    assert Place.from_environment() == Place()


def test_of_many_ranks_a_message_names_the_first():
    assert in_words({3}) == "rank 3" and in_words([2, 1]) == "ranks 1, 2"
    assert in_words(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"


waiting = []  # threads of meet, of which some may wait still


def meet(*places):
    """What meeting_point gives or raises for each place, called at the same time; None for those
    that still wait when the first has ended."""
    outcomes = [None] * len(places)

    def work(number, place):
        try:
            outcomes[number] = meeting_point(place)
        except RankError as error:
            outcomes[number] = str(error)

    threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(places)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)  # those that come first are at an advantage
    waiting.extend(threads)
    threads[-1].join(60)
    return outcomes


@pytest.fixture
def alone(monkeypatch):
    """A place for two ranks of one machine, and starts that are over after three seconds."""
    monkeypatch.setenv("PRETRAIN_START_SECONDS", "3")
    yield Place(0, 2, "node0", "/tmp/start_b/attempt_0", "127.0.0.1", free_port())
    while waiting:  # what torch writes for them is not to come in the middle of the next test
        waiting.pop().join(30)


def test_a_rank_of_an_earlier_start_is_not_taken_for_one_of_this(alone):
    ghost = replace(alone, rank=1, start="/tmp/start_a/attempt_0")
    first, met_ghost, met = meet(alone, ghost, replace(alone, rank=1))
    first.set("said", "by 0")
    assert met.get("said") == b"by 0"
    assert met_ghost is None or "rank 0 did not answer" in met_ghost


def test_ranks_of_other_machines_meet_though_their_torchrun_has_other_folders(alone):
    first, far = meet(alone, replace(alone, rank=1, node="node1", start="/tmp/far/attempt_1"))
    first.set("said", "by 0")
    assert far.get("said") == b"by 0"


def test_a_start_that_lacks_ranks_ends_in_time_and_names_them(alone):
    world = replace(alone, world_size=4)
    t0 = time.monotonic()
    waiting, first = meet(replace(world, rank=2), world)
    assert time.monotonic() - t0 < 20
    assert "ranks 1, 3 of 4 did not come within 3 s" in first
    assert waiting is None or "rank 2: " in waiting


def test_without_rank_0_the_others_end_in_time(alone, monkeypatch):
    monkeypatch.setenv("PRETRAIN_START_SECONDS", "1")
    (outcome,) = meet(replace(alone, rank=1))
    assert "rank 1: nobody answers at 127.0.0.1:" in outcome and "is rank 0 started?" in outcome


def test_a_port_that_is_taken_is_one_line(alone):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", alone.port))
        other.listen()
        (outcome,) = meet(alone)
    assert "rank 0: cannot listen on" in outcome and "take another MASTER_PORT" in outcome


@pytest.mark.parametrize("address", ["nowhere.invalid", "a" * 64, "256.1.1.1", "two words"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_address_that_is_none_is_named_soon(alone, rank, address, monkeypatch, capfd):
    monkeypatch.setenv("PRETRAIN_START_SECONDS", "1")
    t0 = time.monotonic()
    (outcome,) = meet(replace(alone, rank=rank, address=address))
    assert f"rank {rank}: MASTER_ADDR='{address}' is no name or address" in outcome
    assert time.monotonic() - t0 < 15
    assert "frame" not in capfd.readouterr().err  # torch's calls


def test_a_rank_that_comes_before_rank_0_finds_it(alone, capfd):
    early, first = meet(replace(alone, rank=1), alone)
    first.set("said", "by 0")
    assert early.get("said") == b"by 0"
    assert not capfd.readouterr().err


def test_when_torchruns_store_is_gone_nobody_waits_for_it(alone, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("PRETRAIN_START_SECONDS", "600")
    t0 = time.monotonic()
    (outcome,) = meet(alone)
    assert time.monotonic() - t0 < 10
    assert "the torchrun that listened on 127.0.0.1:" in outcome and "is gone" in outcome


# ---- Processes

WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
open(os.path.join({folder!r}, f"pid-{{os.environ['RANK']}}"), "w").write(str(os.getpid()))
from pretrain.distributed import Ranks, leave
from pretrain.errors import program
from pretrain.train.stopping import StopSignal

def note(what):
    open(os.path.join({folder!r}, f"{{what}}-{{os.environ['RANK']}}"), "w").close()

with program("worker") as outcome:
    if {when!r} == "start" and os.environ["RANK"] == "1":
        time.sleep(10**6 if {hangs} else 3)
    ranks = Ranks.start("cpu")
    with StopSignal(ranks) as stop:
        stop.at_once = False
        for step in range(10**6):
            if number := stop.agreed():
                note("saved")
                outcome.status = 128 + number
                break
            note("training")
            if {hangs} and ranks.rank == 1 and step == 20:
                time.sleep(10**6)
            time.sleep(0.01)
leave(outcome.status)
"""


def write_worker(folder, when, hangs=False):
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), folder=str(folder), when=when, hangs=hangs))
    return script


@pytest.mark.parametrize("when", ["start", "training"])
def test_ranks_do_not_outlive_a_torchrun_that_was_killed(tmp_path, when):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(write_worker(tmp_path, when))]
    agent = forked.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    pids = [tmp_path / f"pid-{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
    if when == "training":
        wait_for((tmp_path / "training-1").exists)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    numbers = [int(path.read_text()) for path in pids]
    wait_for(lambda: not any(map(is_alive, numbers)), 30)
    saved = [(tmp_path / f"saved-{rank}").exists() for rank in range(2)]
    assert saved == ([True, True] if when == "training" else [False, False])


AWAITED = """
import os, sys, time
sys.path.insert(0, {root!r})
folder = {folder!r}
open(os.path.join(folder, f"{{os.getpid()}}"), "w").close()
while len(os.listdir(folder)) < 4:  # until the ranks of the next start are there too
    time.sleep(0.05)
import train_gpt2
sys.exit(train_gpt2.main())
"""


def test_a_torchrun_killed_while_its_ranks_start_does_not_disturb_the_same_command(tmp_path):
    """At the same port, with the ranks of the first start still there: both try to join."""
    data, folder = write_shards(tmp_path / "shards", train_tokens=1000), tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "awaited.py"
    script.write_text(AWAITED.format(root=str(ROOT), folder=str(folder)))
    quiet = {"hellaswag": False, "sample_interval": 0, "device": "cpu", "max_iters": 2}
    two = flags(data, tmp_path / "two", gradient_accumulation_steps=1, **quiet)
    command = [*TORCHRUN, "--nproc_per_node=2", f"--master_port={free_port()}", str(script), *two]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = forked.Popen(command, env=environment, **silent)
    wait_for(lambda: len(os.listdir(folder)) == 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    left_behind = [int(pid) for pid in os.listdir(folder)]
    assert all(map(is_alive, left_behind))
    second = forked.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert second.returncode == 0, second.stderr
    wait_for(lambda: not any(map(is_alive, left_behind)), 30)

    assert train_gpt2.main(flags(data, tmp_path / "one", **quiet)) == 0
    for event, name in (("train", "loss"), ("eval", "val_loss")):
        mine, expected = (logged(tmp_path / run, event, name) for run in ("two", "one"))
        assert mine == pytest.approx(expected, abs=1e-4), name
    assert (tmp_path / "two" / "metrics.jsonl").read_text().count('"event": "start"') == 1


def start_by_hand(script, **variables):
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return [
        forked.Popen(
            [sys.executable, str(script)],
            env={**shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_port_where_another_program_listens_ends_every_rank_in_time(tmp_path):
    import socket

    with socket.socket() as other:  # takes connections and never answers
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        script = write_worker(tmp_path, "start")
        processes = start_by_hand(script, MASTER_PORT=port, PRETRAIN_START_SECONDS="2")
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for rank, what in enumerate(["cannot listen on", "what listens on"]):
        assert f"rank {rank}: {what} 127.0.0.1:{port}" in said[rank]
        assert "take another MASTER_PORT" in said[rank] and said[rank].count("\n") == 1


@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_a_rank_that_hangs_ends_the_run_in_time_and_is_named(tmp_path, how):
    script = write_worker(tmp_path, "training", hangs=how == "sleeps")
    first, second = start_by_hand(script, PRETRAIN_HANG_SECONDS="3")
    if how == "stopped":
        wait_for((tmp_path / "training-1").exists)
        second.send_signal(signal.SIGSTOP)
    try:
        _, message = first.communicate(timeout=60)
        assert first.returncode == 1
        assert "error: nothing went on for 3 s: rank 1 did not come" in message
        assert ("rank 1 is silent" if how == "stopped" else "rank 1 is at worker.py:") in message
        if how == "sleeps":
            assert second.wait(timeout=30) == 1
    finally:
        second.kill()
        second.communicate()


def test_a_run_that_goes_on_is_never_taken_for_one_that_hangs(tmp_path):
    script = write_worker(tmp_path, "training")
    processes = start_by_hand(script, PRETRAIN_HANG_SECONDS="2")
    wait_for((tmp_path / "training-1").exists)
    time.sleep(4)
    assert [process.poll() for process in processes] == [None, None]
    processes[0].send_signal(signal.SIGUSR1)
    assert [process.wait(timeout=30) for process in processes] == [128 + signal.SIGUSR1] * 2
    for process in processes:
        process.communicate()


def test_a_rank_of_which_nothing_is_known_is_not_taken_for_an_orphan(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(rendezvous.os, "getppid", lambda: 1)
    monkeypatch.setattr(rendezvous.Watch, "_run", lambda watch: None)
    monkeypatch.setattr(rendezvous, "_first_process_is_python", lambda: True)
    rendezvous.Watch(0)  # torchrun is the first process of a container
    monkeypatch.setattr(rendezvous, "_first_process_is_python", lambda: False)
    with pytest.raises(RankError, match="rank 3: the torchrun that started it is gone"):
        rendezvous.Watch(3)
