"""Shards from a Ray cluster: the bytes of one machine, whichever worker or machine dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fineweb
from pretrain.text.documents import SourceError, local_source
from pretrain.tokens import staged
from pretrain.tokens.build import Settings, Work, build_shards
from pretrain.tokens.ray_engine import RayEngine, RayError
from pretrain.tokens.tokenizer import Tokenizer

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
ROOT = Path(__file__).parents[2]
SETTINGS = Settings(shard_size=3000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(5)
    for number in range(6):
        texts = (" ".join(chance.choices(["mill", "river", "the"], k=80)) for _ in range(40))
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    build_shards(local_source([corpus]), folder, SETTINGS, work(), expected_tokens=10**6)
    return content(folder)


def work():
    return Work(Tokenizer("tiktoken"))


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".json")}


# Parts of a head that no build needs: its autoscaler, its usage statistics, and who passes on what
# workers print. Each is a process that imports Ray: half of what a cluster costs. The test of
# `fineweb.py --engine ray` starts a head with all of them.
SPARED = ("start_monitor", "start_api_server", "start_log_monitor")


@pytest.fixture
def spare_heads(monkeypatch):
    """Heads that this test starts are without SPARED."""
    for name in SPARED:
        monkeypatch.setattr(ray._private.node.Node, name, lambda *_, **__: None)


@pytest.fixture
def cluster(spare_heads):
    """Two machines of one core each, and the second of them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


class Watched(RayEngine):
    """Calls `act` when the first results are there."""

    def __init__(self, address, act):
        super().__init__(address)
        self.act = act

    def map(self, function, tasks):
        self.seen = 0
        for pair in super().map(function, tasks):
            self.seen += 1
            if self.seen == 2:
                self.act()
            yield pair


def kill_a_worker():
    """SIGKILL to a process of this test's cluster that runs a task; returns how many there were."""
    command = ["ps", "-eo", "pid=,ppid=,args="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    processes = {
        int(pid): (int(ppid), args) for pid, ppid, args in (x.split(None, 2) for x in lines)
    }

    def is_ours(pid):
        while pid in processes and pid != os.getpid():
            pid = processes[pid][0]
        return pid == os.getpid()

    workers = [pid for pid, (_, args) in processes.items() if "ray::do" in args]
    workers = [pid for pid in workers if is_ours(pid)]
    for pid in workers[:1]:
        os.kill(pid, signal.SIGKILL)
    return len(workers)


def test_a_worker_or_a_machine_that_dies_changes_no_byte_and_a_unit_that_fails_is_named(
    cluster, corpus, expected, tmp_path, monkeypatch
):
    machines, second = cluster
    monkeypatch.setattr(staged, "UNIT_BYTES", 2000)

    def build(source, out):
        staged.build_staged(
            local_source([source]), out, SETTINGS, work(), engine, expected_tokens=10**6
        )

    killed = []
    with Watched(machines.address, lambda: killed.append(kill_a_worker())) as engine:
        assert engine.workers == 2
        build(corpus, tmp_path / "a")
        assert content(tmp_path / "a") == expected and killed[0] > 0

        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"text": "fine"}\n' * 300 + "{broken\n" + '{"text": "fine"}\n' * 300)
        engine.act = lambda: None
        with pytest.raises(SourceError, match=r"bad\.jsonl, line 301"):
            build(bad, tmp_path / "b")
        assert not list((tmp_path / "b").glob("*.npy"))

        engine.act = lambda: machines.remove_node(second)
        build(corpus, tmp_path / "c")
        assert content(tmp_path / "c") == expected and second not in machines.list_all_nodes()


DRIVER = f"""
import sys
from pathlib import Path

import ray._private.node

from pretrain.text.documents import local_source
from pretrain.tokens import staged
from pretrain.tokens.build import Settings, Work
from pretrain.tokens.ray_engine import RayEngine
from pretrain.tokens.tokenizer import Tokenizer

for name in {SPARED}:
    setattr(ray._private.node.Node, name, lambda *_, **__: None)
staged.AHEAD_SHARDS = 1
with RayEngine(num_cpus=1) as engine:
    staged.build_staged(
        local_source([sys.argv[1]]), Path(sys.argv[2]), Settings(shard_size=3000),
        Work(Tokenizer("tiktoken")), engine, expected_tokens=10**6,
    )
"""


def test_a_killed_driver_leaves_what_the_same_build_goes_on_from(
    spare_heads, corpus, expected, tmp_path, monkeypatch
):
    # A cluster elsewhere is not for a build that starts one of its own.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    out = tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(corpus), str(out)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(out.rglob("unit-000000-0.json")) and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    driver.kill()
    driver.wait()
    made = content(out)
    assert len(made) < len(expected)
    monkeypatch.setattr(staged, "AHEAD_SHARDS", 1)
    with RayEngine(num_cpus=1) as engine:
        staged.build_staged(
            local_source([corpus]), out, SETTINGS, work(), engine, expected_tokens=10**6
        )
    assert content(out) == expected


def test_a_cluster_reads_from_a_store_and_publishes_to_one(
    s3, corpus, expected, tmp_path, monkeypatch
):
    for path in corpus.iterdir():
        s3.put(f"s3://acme/corpus/{path.name}", path.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(staged, "UNIT_BYTES", 8000)
    flags = ["--source", "s3://acme/corpus", "--out_dir", "s3://acme/out", "--num_proc", "1"]
    flags += ["--engine", "ray", "--shard_size", "3000", "--tokenizer_backend", "tiktoken"]
    assert fineweb.main([*flags, "--shard_name", corpus.name]) == 0
    shards = {name: data for name, data in expected.items() if name.endswith(".npy")}
    assert {name: s3.get(f"s3://acme/out/{name}") for name in shards} == shards
    assert len(s3.keys("acme")) == len(shards) + 1 + len(list(corpus.iterdir()))


def test_no_cluster_and_no_ray_are_said_in_a_line(monkeypatch):
    with pytest.raises(RayError, match=r"--ray_address 127\.0\.0\.1:1: no cluster there"):
        RayEngine("127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=r"requirements-ray\.txt"):
        RayEngine()
