"""Two torchrun agents on loopback stand for two machines, with one disk between them or with a disk
each (a folder of their own to run in)."""

import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from free_port import free_port
from tiny_runs import logged

import train_gpt2
from pretrain.report.runlog import read_log

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TEXT = "\n<|endoftext|>\n".join(
    f"The mill by the river has {n} wheels, and each of them turns {n * n} times."
    for n in range(40)
)
FLAGS = [
    *("--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16"),
    *("--batch_size", "2", "--learning_rate", "3e-2", "--min_lr", "3e-3", "--warmup_iters", "2"),
    *("--lr_decay_iters", "8", "--eval_interval", "2", "--eval_iters", "2", "--log_interval", "1"),
    *("--device", "cpu", "--dtype", "float32", "--no-hellaswag", "--sample_interval", "0"),
    *("--data", "mills.txt", "--out_dir", "run"),
]


@pytest.fixture
def nodes(request, tmp_path):
    """The folders in which the two machines run: the same, or one each."""
    names = ["disk", "disk"] if request.param == "shared" else ["disk0", "disk1"]
    for name in set(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mills.txt").write_text(TEXT, encoding="utf-8")
    return [tmp_path / name for name in names]


def run_on(folders, *flags, script=train_gpt2.__file__):
    """Both machines' (exit status, stdout, stderr)."""
    endpoint = f"127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=mills"),
        *("--local_addr=127.0.0.1", str(script), *FLAGS, *flags),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [forked.Popen(command, cwd=folder, env=environment(), **pipes) for folder in folders]
    try:
        outputs = [agent.communicate(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, *output) for agent, output in zip(agents, outputs, strict=True)]


def environment():
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PRETRAIN_START_SECONDS": "120"}


def folder_of_rank_0(folders):
    """torchrun decides which agent comes first; with a disk each, only that one has the run."""
    return next(folder for folder in folders if (folder / "run" / "metrics.jsonl").exists())


@pytest.mark.parametrize("nodes", ["shared", "apart"], indirect=True)
def test_two_machines_train_and_go_on_as_one_process_does(nodes, tmp_path, monkeypatch):
    two = ("--gradient_accumulation_steps", "1")
    for end in ("4", "8"):
        for status, _, errors in run_on(nodes, *two, "--max_iters", end):
            assert status == 0, errors
        if end == "4":
            first = folder_of_rank_0(nodes)
    log = read_log(first / "run" / "metrics.jsonl")
    assert [r["step"] for r in log if r["event"] == "start"] == [0, 4]

    assert_same_as_one_process(first / "run", tmp_path, monkeypatch)


def assert_same_as_one_process(run, tmp_path, monkeypatch):
    """The losses of this run of two machines are those of one process, on the same text."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "mills.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "alone")
    last = max(logged(run))
    one = ("--gradient_accumulation_steps", "2", "--max_iters", str(last))
    assert train_gpt2.main([*FLAGS, *one]) == 0
    for event, name in (("train", "loss"), ("eval", "val_loss")):
        mine = logged(run, event, name)
        assert mine == pytest.approx(logged(Path("run"), event, name), abs=1e-4), name


LOST = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt2
from pretrain.train import stopping

def lose_this_machine():
    os.kill(os.getppid(), signal.SIGKILL)  # torchrun
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "0" and {when!r} == "in its text":
    replace = os.replace
    def replace_or_die(source, target, *more, **named):
        if str(target).endswith("_train_000001.npy"):
            lose_this_machine()
        return replace(source, target, *more, **named)
    os.replace = replace_or_die

if os.environ["RANK"] == "1" and {when!r} == "in a step":
    check = stopping.FiniteGuard.check
    def check_or_die(self, step, *numbers):
        if step == 3:
            lose_this_machine()
        return check(self, step, *numbers)
    stopping.FiniteGuard.check = check_or_die

sys.exit(train_gpt2.main())
"""


@pytest.mark.parametrize(
    ("nodes", "when"), [("shared", "in its text"), ("apart", "in a step")], indirect=["nodes"]
)
def test_when_a_machine_is_lost_the_other_ends_and_the_same_command_goes_on(
    nodes, when, tmp_path, monkeypatch
):
    script = tmp_path / "lost.py"
    script.write_text(LOST.format(root=str(ROOT), when=when))
    flags = ("--gradient_accumulation_steps", "1", "--max_iters", "4")
    statuses = [status for status, *_ in run_on(nodes, *flags, script=script)]
    assert -signal.SIGKILL in statuses and all(statuses), statuses
    for status, _, errors in run_on(nodes, *flags):
        assert status == 0, errors
    run = folder_of_rank_0(nodes) / "run"
    starts = [r["step"] for r in read_log(run / "metrics.jsonl") if r["event"] == "start"]
    assert starts == ([0, 2] if when == "in a step" else [0])
    assert_same_as_one_process(run, tmp_path, monkeypatch)


@pytest.mark.parametrize("nodes", ["apart"], indirect=True)
def test_a_run_that_lies_on_the_second_machine_is_not_begun_anew_on_the_first(nodes):
    (nodes[1] / "run").mkdir()
    (nodes[1] / "run" / "resume.pt").write_bytes(b"of an earlier part")
    # Of agents at one address torchrun takes the one that was started first as the first.
    outcomes = run_on(nodes, "--max_iters", "4")
    assert [status != 0 for status, *_ in outcomes] == [True, True]
    errors = "".join(errors for *_, errors in outcomes)
    assert "run/resume.pt: on the disk of rank 1's machine" in errors
    assert errors.count("train_gpt2.py: error:") == 1
    assert not (nodes[0] / "run" / "metrics.jsonl").exists()
