"""Shards that are published to a store: the bytes of a folder, whatever stops the build."""

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import forked
import pytest

import fineweb
from pretrain.text import ranges, stores
from pretrain.text.documents import Patience, local_source
from pretrain.tokens import destination, engines, staged
from pretrain.tokens.build import Settings, Work
from pretrain.tokens.destination import StoreDestination
from pretrain.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
OUT = "s3://acme/tokens/web"
FLAGS = ["--shard_size", "3000", "--tokenizer_backend", "tiktoken", "--num_proc", "1"]


@pytest.fixture
def corpus(s3, tmp_path, monkeypatch):
    """Documents in a store, read from there; some four shards."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(5)
    for number in range(3):
        texts = (" ".join(chance.choices(["mill", "river", "the"], k=80)) for _ in range(40))
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        s3.put(f"s3://acme/corpus/{number}.jsonl", lines.encode())
    return "s3://acme/corpus/"


def run(corpus, *flags, out=OUT):
    return fineweb.main(["--source", corpus, "--out_dir", str(out), *FLAGS, *flags])


pytestmark = pytest.mark.usefixtures("no_fsync")


_EXPECTED = {}


@pytest.fixture
def expected(corpus, tmp_path):
    """What the same command writes into a folder; the corpus of all tests is the same."""
    if not _EXPECTED:
        assert run(corpus, "--shard_name", "web", out=tmp_path / "here") == 0
        found = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
        _EXPECTED.update((name, data) for name, data in found.items() if name[0] != ".")
    return dict(_EXPECTED)


def content(s3):
    keys = [key for key in s3.keys("acme") if key.startswith("tokens/web/")]
    return {key.rpartition("/")[2]: s3.get(f"s3://acme/{key}") for key in keys}


def build(corpus, *flags):
    return run(corpus, "--shard_name", "web", *flags)


def test_a_store_gets_the_bytes_that_a_folder_gets(s3, corpus, expected, tmp_path, capsys):
    assert build(corpus, "--dry_run") == 0 and content(s3) == {}
    assert build(corpus) == 0
    said = capsys.readouterr().out
    assert content(s3) == expected and len(expected) > 4
    assert f"next: python train_gpt2.py --data_dir {OUT}" in said
    assert not any((tmp_path / "data/.stores").iterdir())
    assert build(corpus) == 0
    assert f"{OUT}: finished before" in capsys.readouterr().out
    assert build(corpus, "--max_tokens", "5000") == 1
    error = capsys.readouterr().err
    assert f"{OUT}: holds shards made with other settings" in error and ".stores" not in error


def test_through_faults_of_the_store_the_bytes_are_the_same(s3, corpus, expected, monkeypatch):
    monkeypatch.setattr(ranges.random, "uniform", lambda *_: 0.01)  # of the usual waits
    s3.faults(fail_every=4)
    assert build(corpus) == 0
    assert s3.faulty > 5
    s3.faults(cut_every=5)
    assert run(corpus, "--verify") == 0
    assert content(s3) == expected


def test_a_store_is_verified_in_place(s3, corpus, expected, capsys):
    assert build(corpus) == 0
    assert fineweb.main(["--verify", "--out_dir", OUT]) == 0
    said = capsys.readouterr().out
    assert "documents encoded again" in said and "no problems" in said
    shard = bytearray(expected["web_train_000001.npy"])
    shard[-1] ^= 1
    s3.put(f"{OUT}/web_train_000001.npy", bytes(shard))
    s3.delete(f"{OUT}/web_train_000002.npy")
    assert fineweb.main(["--verify", "--out_dir", OUT]) == 1
    said = capsys.readouterr().out
    assert f"{OUT}/web_train_000001.npy: its SHA-256" in said
    assert f"{OUT}/web_train_000002.npy: no such shard" in said
    s3.delete("s3://acme/corpus/1.jsonl")  # the documents have changed: shards are not compared
    s3.put(f"{OUT}/web_train_000001.npy", expected["web_train_000001.npy"])
    s3.put(f"{OUT}/web_train_000002.npy", expected["web_train_000002.npy"])
    assert fineweb.main(["--verify", "--out_dir", OUT]) == 0
    assert "corpus/1.jsonl: no such object" in capsys.readouterr().out


def test_a_shard_that_is_gone_from_a_store_is_made_again(s3, corpus, expected):
    assert build(corpus) == 0
    s3.delete(f"{OUT}/web_train_000001.npy")
    s3.put(f"{OUT}/web_train_000002.npy", expected["web_train_000002.npy"][:-10])
    assert build(corpus) == 0
    assert content(s3) == expected


def listed(s3):
    """Shards in the store's manifest, which must all be there and right."""
    with contextlib.suppress(KeyError):
        stored = content(s3)
        names = [shard["file"] for shard in json.loads(stored["manifest.json"])["shards"]]
        assert not any(name not in stored for name in names)
        return {name: stored[name] for name in names}
    return {}


def test_a_build_that_ends_at_any_write_leaves_nothing_half_published(
    s3, corpus, expected, monkeypatch
):
    """One run after the other is cut off from the store: at its first write, its second, ..."""
    impatient = Patience(give_up_seconds=20, first_wait_seconds=100, longest_wait_seconds=100)
    monkeypatch.setattr(destination, "Patience", lambda: impatient)
    for number in range(len(expected) + 1):
        writes = []

        def before(what, number=number, writes=writes):
            writes.append(what) if what.startswith("PUT") else None
            assert len(writes) <= number  # else the connection is closed

        s3.before = before
        status = build(corpus)
        s3.faults()
        assert listed(s3).items() <= expected.items()
        if status == 0:
            break
    assert number > 1 and content(s3) == expected


KILLED = """
import os, signal, sys
import fineweb
from pretrain.text import stores
from pretrain.text.documents import Patience, local_source
send, number = stores.upload, int(sys.argv[1])
def upload(*args):
    global number
    number -= 1
    if number < 0: os.kill(os.getpid(), signal.SIGKILL)
    send(*args)
stores.upload = upload
sys.exit(fineweb.main(sys.argv[2:]))
"""


def test_a_killed_build_goes_on_from_the_store_on_another_machine(s3, corpus, expected, tmp_path):
    flags = ["--source", corpus, "--out_dir", OUT, "--shard_name", "web", *FLAGS]
    command = [sys.executable, "-c", KILLED, "2", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = forked.run(command, cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len(listed(s3)) == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    s3.faults()
    assert build(corpus) == 0
    assert content(s3) == expected
    sent = [what for what in s3.requests if what.startswith("PUT") and ".npy" in what]
    assert len(sent) == len(expected) - 3  # two shards were there, and the manifest is none


def test_the_second_of_two_builders_stops_with_a_line(s3, corpus, expected, tmp_path, capsys):
    """Another machine publishes while this one is at its second shard."""
    other = tmp_path / "other"
    other.mkdir()
    puts = []

    def before(what):
        if what.startswith("PUT") and "web_train_000001" in what and not puts:
            puts.append(what)
            code = "import sys, fineweb; sys.exit(fineweb.main(sys.argv[1:]))"
            flags = ["--source", corpus, "--out_dir", OUT, "--shard_name", "web", *FLAGS]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", code, *flags]
            forked.run(command, cwd=other, env=environment, check=True)

    s3.before = before
    assert build(corpus) == 1
    assert "another process has published there since this one began" in capsys.readouterr().err
    assert content(s3) == expected


def test_two_builders_on_one_machine_are_told_apart_at_the_start(s3, corpus, capsys):
    with StoreDestination(OUT).opened():
        assert build(corpus) == 1
    assert f"{OUT}: another process of this machine is writing there" in capsys.readouterr().err


def test_a_write_whose_answer_was_lost_is_no_other_builder(s3):
    s3.put("s3://acme/x", b"before")
    tag = stores.look("s3://acme/x").tag
    s3.faults(match="^PUT", lose_every=2)
    stores.replace("s3://acme/y", b"", None)
    new = stores.replace("s3://acme/x", b"after", tag)
    assert s3.get("s3://acme/x") == b"after" and new == stores.look("s3://acme/x").tag
    s3.faults()
    with pytest.raises(stores.Replaced):
        stores.replace("s3://acme/x", b"third", tag)
    with pytest.raises(stores.Replaced):
        stores.replace("s3://acme/x", b"third", None)


def test_a_place_with_foreign_shards_and_an_unknown_store_are_refused(s3, corpus, capsys):
    s3.put(f"{OUT}/other_train_000001.npy", b"x")
    assert build(corpus) == 1
    assert f"{OUT}: holds other_train_000001.npy but no manifest" in capsys.readouterr().err
    assert run(corpus, out="s3://nobucket/x") == 1
    assert "s3://nobucket/x/manifest.json: no such object, or no such" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(corpus, out="ftp://host/x")
    assert "shards are written to a folder, or to s3://" in capsys.readouterr().err


def test_steps_of_a_cluster_publish_the_same_bytes(s3, corpus, expected, monkeypatch):
    monkeypatch.setattr(staged, "UNIT_BYTES", 4000)
    monkeypatch.setattr(staged, "AHEAD_SHARDS", 1)
    with StoreDestination(OUT).opened() as store:
        work = Work(Tokenizer("tiktoken"), destination=store)
        engine, settings = engines.DirectEngine(), Settings(shard_size=3000)
        source = local_source([corpus])
        staged.build_staged(
            source, store.folder, settings, work, engine, name="web", expected_tokens=10**6
        )
    assert content(s3) == expected
