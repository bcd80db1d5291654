"""Ranks of the three frameworks' trainers whose torchrun is killed: none trains on alone."""

import os
import signal
import sys
from pathlib import Path

import forked
import pytest
from tiny_runs import flags
from waiting import is_alive, wait_for

from pretrain.rendezvous import ORPHAN_SECONDS

ROOT = Path(__file__).parents[2]
RANK = """
import importlib, os, sys
sys.path.insert(0, {root!r})
with open(os.path.join({folder!r}, f"pid-{{os.environ['RANK']}}"), "w") as file:
    file.write(str(os.getpid()))
sys.exit(importlib.import_module("adapters." + sys.argv.pop(1)).main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate_loop", "hf_trainer", "lightning_module"])
def test_ranks_do_not_outlive_a_torchrun_that_was_killed(name, data_dir, tmp_path):
    script, out, errors = tmp_path / "rank.py", tmp_path / "out", tmp_path / "errors"
    script.write_text(RANK.format(root=str(ROOT), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), name, "--cpu"]
    command += flags(data_dir, out, max_iters=10**6, lr_decay_iters=10**6, eval_interval=0)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pids = [tmp_path / f"pid-{rank}" for rank in range(2)]
    with errors.open("w") as stderr, (tmp_path / "output").open("w") as stdout:
        agent = forked.AdapterPopen(command, cwd=tmp_path, env=env, stdout=stdout, stderr=stderr)
    log = out / "metrics.jsonl"
    try:
        wait_for(lambda: log.exists() and '"event": "train"' in log.read_text(), 120)
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    ranks = [int(path.read_text()) for path in pids]
    try:
        # A second or so; where a rank is stuck in a collective, its Watch ends it by force.
        wait_for(lambda: not any(map(is_alive, ranks)), ORPHAN_SECONDS + 30)
    finally:
        for rank in filter(is_alive, ranks):
            os.kill(rank, signal.SIGKILL)
    assert "torchrun is gone" in errors.read_text()
