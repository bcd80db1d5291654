"""Shards made in published steps have the bytes of those made in one go, whatever dies."""

import itertools
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.text.documents import local_source
from pretrain.tokens import scratch, staged
from pretrain.tokens.build import BuildRefused, Settings, Work, build_shards
from pretrain.tokens.engines import DirectEngine
from pretrain.tokens.manifest import Manifest
from pretrain.tokens.staged import build_staged
from pretrain.tokens.tokenizer import Tokenizer, load_encoding

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Stands for the end of a process."""


class MortalEngine:
    """Runs tasks in a wild order, some of them twice, and dies after some of them."""

    workers = 2

    def __init__(self, seed, lives=None):
        self.random, self.lives = random.Random(seed), lives

    def map(self, function, tasks):
        tasks = iter(tasks)
        handed_over = []
        while True:
            for task in itertools.islice(tasks, 6 - len(handed_over)):
                if task is None:
                    break
                handed_over.append(task)
            if not handed_over:
                return
            task = handed_over.pop(self.random.randrange(len(handed_over)))
            if self.lives is not None:
                self.lives -= 1
                if self.lives < 0:
                    raise Killed
            result = function(task)
            if self.random.random() < 0.3:
                assert function(task) == result
            yield task, result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of all kinds: with nulls, empty ones, bad lines, one huge document."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(5)
    words = ["the", "mill", "river", "over", "stone", "häuser", "東京", "ran", "1234", "\n\n"]

    def text(most):
        return " ".join(chance.choices(words, k=chance.randint(1, most)))

    texts = [text(60) if chance.random() < 0.8 else chance.choice([None, ""]) for _ in range(400)]
    pq.write_table(
        pa.table({"text": texts, "token_count": [len(t or "") for t in texts]}),
        folder / "a.parquet",
        row_group_size=30,
    )
    nothing = pa.table({"text": pa.array([None] * 7, pa.string())})
    pq.write_table(nothing, folder / "b.parquet")
    lines = [json.dumps({"text": text(40)}) for _ in range(300)]
    for place in (0, 17, 133, 299):
        lines[place] = "not json"
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "d.txt").write_text("\n<|endoftext|>\n".join(text(50) for _ in range(100)))
    (folder / "e.txt").write_text(text(3) + " huge" * 9000)
    (folder / "f.jsonl").write_text("bad\n\n" * 3)
    return folder


def work():
    return Work(Tokenizer("tiktoken"), unit_bytes=3000, on_bad_document="skip")


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".json")}


pytestmark = pytest.mark.usefixtures("no_fsync")


_EXPECTED = {}


def expected(source, settings, folder, tokens):
    """What is made in one go: once for a source and settings."""
    key = (json.dumps(source.description), settings, tokens)
    if key not in _EXPECTED:
        build_shards(source, folder, settings, work(), expected_tokens=tokens)
        _EXPECTED[key] = content(folder)
    return _EXPECTED[key]


SETTINGS = [
    Settings(shard_size=1500),
    Settings(shard_size=700, val_tokens=111, max_tokens=9000),
    Settings(shard_size=4000, val_fraction=0.1),
    Settings(shard_size=10**8),
    Settings(shard_size=200_000),  # the estimate below says five shards: it takes everything
    Settings(shard_size=5000, val_fraction=0.25, max_tokens=12_345),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_steps_in_any_order_give_the_bytes_of_one_go(corpus, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(staged, "UNIT_BYTES", 2000)
    monkeypatch.setattr(staged, "AHEAD_SHARDS", 1)
    source = local_source([corpus])
    want = expected(source, settings, tmp_path / "one", 10**6 if settings.default_val else 0)
    tokens = 10**6 if settings.default_val else 0
    build_staged(
        source, tmp_path / "steps", settings, work(), MortalEngine(3), expected_tokens=tokens
    )
    assert content(tmp_path / "steps") == want
    assert not (tmp_path / "steps" / staged.SCRATCH).exists()


@pytest.mark.parametrize("lives", [0, 7, 30, 61])
def test_a_build_that_dies_again_and_again_ends_in_the_same_bytes(
    corpus, tmp_path, lives, monkeypatch
):
    monkeypatch.setattr(staged, "UNIT_BYTES", 2000)
    monkeypatch.setattr(staged, "AHEAD_SHARDS", 1)
    source, settings = local_source([corpus]), Settings(shard_size=1500)
    want = expected(source, settings, tmp_path / "one", 10**6)
    for attempt in range(60):
        engine = MortalEngine(attempt, lives=lives + 5 * attempt)
        try:
            build_staged(
                source, tmp_path / "steps", settings, work(), engine, expected_tokens=10**6
            )
            break
        except Killed:
            pass
    assert attempt > 0 and content(tmp_path / "steps") == want


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_source_about_as_long_as_a_shard_or_two_is_cut_alike(corpus, tmp_path, more):
    source = local_source([corpus / "d.txt"])
    build_shards(source, tmp_path / "all", Settings(), work(), expected_tokens=0)
    total = sum(len(np.load(path)) for path in (tmp_path / "all").glob("*.npy"))
    for number, size in enumerate((total + more, total // 2 + more)):
        settings = Settings(shard_size=size)
        want = expected(source, settings, tmp_path / f"one{number}", 10**6)
        folder = tmp_path / f"steps{number}"
        build_staged(source, folder, settings, work(), MortalEngine(4), expected_tokens=10**6)
        assert content(folder) == want


def test_a_manifest_that_takes_long_to_write_is_not_written_after_each_shard(
    corpus, tmp_path, monkeypatch
):
    saved, save = [], Manifest.save

    def slow(manifest, folder):
        saved.append(len(manifest.shards))
        time.sleep(0.2)
        save(manifest, folder)

    monkeypatch.setattr(Manifest, "save", slow)
    source, settings = local_source([corpus]), Settings(shard_size=700)
    build_staged(source, tmp_path, settings, work(), DirectEngine(), expected_tokens=10**6)
    shards = len(list(tmp_path.glob("*.npy")))
    assert saved[0] == 0 and saved[-1] == shards and len(saved) < shards / 2


def test_a_rerun_tokenizes_no_unit_that_is_published(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "UNIT_BYTES", 2000)
    source, settings = local_source([corpus]), Settings(shard_size=1500)
    with pytest.raises(Killed):
        engine = MortalEngine(1, lives=20)
        build_staged(source, tmp_path / "s", settings, work(), engine, expected_tokens=10**6)
    there = {p.name for p in (tmp_path / "s" / staged.SCRATCH).glob("unit-*.json")}
    assert len(there) >= 5
    made = []
    tokenize = scratch.tokenize_unit
    monkeypatch.setattr(
        scratch,
        "tokenize_unit",
        lambda task, *rest: made.append(scratch.unit_key(task[0])) or tokenize(task, *rest),
    )
    build_staged(source, tmp_path / "s", settings, work(), DirectEngine(), expected_tokens=10**6)
    assert made and not {f"{key}.json" for key in made} & there


PROGRAM = """
import os, signal, sys
from pathlib import Path
from pretrain import files
from pretrain.text.documents import local_source
from pretrain.tokens import engines, scratch, staged
from pretrain.tokens.build import Settings, Work
from pretrain.tokens.tokenizer import Tokenizer

lives, publish = int(sys.argv[3]), os.replace
def mortal(*names):
    global lives
    lives -= 1
    if lives == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # before what was written has its name
    publish(*names)
os.replace = mortal
staged.UNIT_BYTES, staged.AHEAD_SHARDS = 9000, 1
work = Work(Tokenizer("tiktoken"), on_bad_document="skip")
source, settings = local_source([sys.argv[1]]), Settings(shard_size=1500)
staged.build_staged(
    source, Path(sys.argv[2]), settings, work, engines.DirectEngine(), expected_tokens=10**6
)
"""


@pytest.mark.parametrize("lives", [1, 20, 42])
def test_a_process_killed_before_a_publication_goes_on_to_the_same_bytes(
    corpus, tmp_path, lives, monkeypatch
):
    command = [sys.executable, "-c", PROGRAM, str(corpus), str(tmp_path / "s")]
    assert forked.run([*command, str(lives)], cwd=ROOT).returncode == -signal.SIGKILL
    monkeypatch.setattr(staged, "UNIT_BYTES", 9000)
    monkeypatch.setattr(staged, "AHEAD_SHARDS", 1)
    source, settings = local_source([corpus]), Settings(shard_size=1500)
    again = Work(Tokenizer("tiktoken"), on_bad_document="skip")
    build_staged(
        source, tmp_path / "s", settings, again, DirectEngine(), expected_tokens=10**6
    )  # by another process, this one
    assert content(tmp_path / "s") == expected(source, settings, tmp_path / "one", 10**6)


def test_scratch_holds_no_more_than_is_said_and_the_units_under_way(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "UNIT_BYTES", 500)
    monkeypatch.setattr(staged, "AHEAD_SHARDS", 2)
    source, settings, held = local_source([corpus / "a.parquet"]), Settings(shard_size=1000), []

    class Watching(DirectEngine):
        def map(self, function, tasks):
            for pair in super().map(function, tasks):
                units = (tmp_path / "s" / staged.SCRATCH).glob("*.tokens")
                held.append([unit.stat().st_size for unit in units])
                yield pair

    build_staged(source, tmp_path / "s", settings, work(), Watching(), expected_tokens=10**6)
    most = staged.scratch_bytes(settings, 1)
    largest = max(size for sizes in held for size in sizes)
    assert most == 4000 and max(map(sum, held)) <= most + largest
    whole = sum(len(data) for name, data in content(tmp_path / "s").items() if "npy" in name)
    assert whole > 3 * most


def test_another_plan_in_the_same_folder_is_refused(corpus, tmp_path):
    source = local_source([corpus])
    with pytest.raises(Killed):
        engine = MortalEngine(1, lives=0)
        build_staged(source, tmp_path, Settings(), work(), engine, expected_tokens=10)
    with pytest.raises(BuildRefused, match="another plan is under way"):
        other = Settings(shard_size=99)
        build_staged(source, tmp_path, other, work(), DirectEngine(), expected_tokens=10)


@pytest.mark.parametrize(("ending", "place"), [(".tokens", 10), (".tokens", -1), (".npz", -99)])
def test_a_damaged_unit_is_noticed_before_it_is_packed(corpus, tmp_path, ending, place):
    source, settings = local_source([corpus]), Settings(shard_size=1500)

    class Damaging(DirectEngine):
        def map(self, function, tasks):
            yield from super().map(function, map(self.damage, tasks))

        def damage(self, job):
            if isinstance(job, staged.ShardJob):
                victim = min((tmp_path / "s" / staged.SCRATCH).glob(f"*{ending}"))
                data = bytearray(victim.read_bytes())
                data[place] ^= 1
                victim.write_bytes(data)
            return job

    with pytest.raises(scratch.ScratchError, match="damaged"):
        build_staged(source, tmp_path / "s", settings, work(), Damaging(), expected_tokens=10**6)
    assert not list((tmp_path / "s").glob("*.npy*"))
    shutil.rmtree(tmp_path / "s" / staged.SCRATCH)
    build_staged(source, tmp_path / "s", settings, work(), DirectEngine(), expected_tokens=10**6)
    assert content(tmp_path / "s") == expected(source, settings, tmp_path / "one", 10**6)


@pytest.mark.parametrize("ending", ["json", "npz", "tokens"])
@pytest.mark.parametrize("damage", [b"", b"\0" * 50, None])
def test_units_that_a_power_cut_has_damaged_are_made_again(corpus, tmp_path, ending, damage):
    source, settings = local_source([corpus]), Settings(shard_size=1500)
    with pytest.raises(Killed):
        engine = MortalEngine(1, lives=5)
        build_staged(source, tmp_path / "s", settings, work(), engine, expected_tokens=10**6)
    units = list((tmp_path / "s" / staged.SCRATCH).glob(f"unit-*.{ending}"))
    assert units
    for unit in units:
        unit.unlink() if damage is None else unit.write_bytes(damage)
    build_staged(source, tmp_path / "s", settings, work(), DirectEngine(), expected_tokens=10**6)
    assert content(tmp_path / "s") == expected(source, settings, tmp_path / "one", 10**6)


def test_a_source_without_a_document_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(staged.SourceError, match="no document"):
        build_staged(
            local_source([tmp_path / "a.jsonl"]),
            tmp_path / "s",
            Settings(),
            work(),
            DirectEngine(),
            expected_tokens=0,
        )


def test_the_tokens_of_a_shard_are_those_of_the_documents(corpus, tmp_path, monkeypatch):
    """Against tiktoken and a plain loop."""
    monkeypatch.setattr(staged, "UNIT_BYTES", 2000)
    source = local_source([corpus / "d.txt"])
    settings = Settings(shard_size=300, val_tokens=50)
    build_staged(source, tmp_path, settings, work(), MortalEngine(2), expected_tokens=0)
    encode = load_encoding().encode_ordinary
    documents = (corpus / "d.txt").read_text().split("<|endoftext|>\n")
    want = [token for text in documents for token in (50256, *encode(text))]
    shards = [np.load(path) for path in sorted(tmp_path.glob("*.npy"), key=lambda p: p.name[-10:])]
    assert np.concatenate(shards).tolist() == want
