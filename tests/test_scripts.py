"""What lies in scripts/: job scripts run under a stand-in for Slurm, and the rest is read."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.report.runlog import read_log

ROOT = Path(__file__).parent.parent
SBATCH = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))

# One node: `srun COMMAND` runs the command; `scontrol` answers and writes down what it was asked.
# torchrun's rank is a fork of it: torch is imported once for both.
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_STAND_IN_LOG"
if [ "$1" = show ]; then echo 127.0.0.1; fi
"""
TORCHRUN = f"""#!/bin/bash
exec "{sys.executable}" -c '
import sys
sys.path.insert(0, "{Path(__file__).parent}")
import forked
import torch._dynamo
del sys.path[0]
forked.serve_below()
forked.execute([*forked.LAUNCHER, *sys.argv[1:]])
' "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """Environment of a job on one node, in which Slurm's commands are stand-ins."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_STAND_IN_LOG": str(tmp_path / "asked"),
        "GPUS_PER_NODE": "1",
        "RDZV_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_job_scripts_are_shell_and_ask_slurm_for_what_it_knows():
    assert len(SBATCH) == 2
    for path in SBATCH:
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
        options = re.findall(r"^#SBATCH (--[a-z-]+)", path.read_text(), re.MULTILINE)
        assert {"--requeue", "--open-mode", "--time", "--nodes"} <= set(options)
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", *SBATCH], check=False).returncode == 0


def test_a_preempted_job_saves_asks_for_the_queue_and_goes_on_where_it_was(slurm, tmp_path):
    flags = ["--data", ROOT / "input.txt", "--out_dir", tmp_path / "run", "--n_layer", "1"]
    flags += ["--n_head", "1", "--n_embd", "8", "--block_size", "32", "--batch_size", "1"]
    flags += ["--gradient_accumulation_steps", "1", "--warmup_iters", "2", "--device", "cpu"]
    flags += ["--eval_interval", "0", "--no-hellaswag", "--log_interval", "1"]
    command = ["bash", ROOT / "scripts" / "slurm" / "train.sbatch", *map(str, flags)]
    log = tmp_path / "run" / "metrics.jsonl"

    job = subprocess.Popen([*command, "--max_iters", "100000"], env=slurm, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (log.exists() and b'"event": "train"' in log.read_bytes()):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    asked = Path(slurm["SLURM_STAND_IN_LOG"]).read_text()
    assert "requeue 17" in asked
    stopped = read_log(log)[-1]
    assert stopped["event"] == "stop" and "signal" in stopped["reason"]

    last = stopped["step"] + 2
    done = subprocess.run([*command, "--max_iters", str(last)], env=slurm, cwd=ROOT, check=False)
    assert done.returncode == 0
    records = read_log(log)
    starts = [record["step"] for record in records if record["event"] == "start"]
    assert starts == [0, stopped["step"]]
    assert records[-1] == records[-1] | {"event": "stop", "step": last, "reason": "finished"}


def test_a_job_whose_training_fails_fails_too(slurm, tmp_path):
    (tmp_path / "programs" / "torchrun").write_text("#!/bin/bash\nexit 3\n")
    command = ["bash", ROOT / "scripts" / "slurm" / "train.sbatch", "--no_such_flag"]
    done = subprocess.run(command, env=slurm, cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 3
    assert "requeue" not in Path(slurm["SLURM_STAND_IN_LOG"]).read_text()


def test_the_image_installs_what_the_requirements_pin_and_the_cloud_file_is_whole():
    image = (ROOT / "scripts" / "Dockerfile").read_text()
    steps = re.findall(r"^([A-Z]+) ", image, re.MULTILINE)
    assert steps[0] == "FROM" and steps[-1] == "CMD"
    assert "^torch==" in image
    pinned = re.findall(r"^torch==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(pinned) == 1
    task = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
    assert {"resources", "setup", "run", "num_nodes"} <= set(task)
    for part in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n", "-c", part], check=False).returncode == 0
