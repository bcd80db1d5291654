"""fineweb.py as its users run it, against a plain loop with tiktoken: kills, signals, faults,
damage."""

import functools
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import LoopbackHub

import fineweb
from pretrain.files import lock
from pretrain.text.documents import Patience, SourceError, hub_source, local_source
from pretrain.tokens import build
from pretrain.tokens.build import BuildRefused, Settings, Work, build_shards
from pretrain.tokens.shards import Manifest, ShardWriter, find_shards
from pretrain.tokens.tokenizer import Tokenizer, load_encoding

ROOT = Path(__file__).parent.parent
DATASET = "HuggingFaceFW/fineweb-edu"


# ---- documents, and what must become of them


@pytest.fixture(scope="session")
def texts():
    """Some hundred documents: paragraphs of input.txt, and things that are easily got wrong."""
    prose = (ROOT / "input.txt").read_text(encoding="utf-8").replace("<|endoftext|>\n", "\n")
    prose = re.split(r"\n\n+", prose)
    odd = [
        "a literal <|endoftext|> is ordinary text",
        " ",
        "\n\n",
        "\x00\x01\ttabs\x85and\u2003spaces \u200b\ufeff",
        "crlf\r\nand cr\rin here",
        "naïve 日本語 한국어 العربية हिन्दी 👩‍👩‍👧‍👦🏳️‍🌈",
        "\U000323b0't \u088f1 \u0c5c",
        "a" * 5000,
        "12345" * 400,
        "long " + " ".join(prose[:60]),
    ]
    documents = prose + odd
    random.Random(0).shuffle(documents)
    return documents


@pytest.fixture(scope="session")
def stream(texts):
    return encode(texts)


def encode(texts) -> np.ndarray:
    encoding = load_encoding()
    return np.array(
        [i for text in texts for i in [50256, *encoding.encode_ordinary(text)]], np.uint16
    )


def write_parquet(path: Path, texts, row_group_size=20) -> None:
    """As FineWeb has it; rows without text between the documents."""
    rows = []
    for i, text in enumerate(texts):
        rows += [text, None] if i % 31 == 0 else [text, ""] if i % 17 == 0 else [text]
    encoding = load_encoding()
    counts = [len(encoding.encode_ordinary(row or "")) for row in rows]
    table = pa.table(
        {"id": [str(i) for i in range(len(rows))], "text": rows, "token_count": counts}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def jsonl(texts) -> bytes:
    lines = [
        json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)
    ]
    return ("\n".join([*lines[:5], "", '{"text": null}', *lines[5:]]) + "\n").encode()


def txt(texts) -> bytes:
    return "<|endoftext|>\n".join(texts).encode()


def write_source(folder: Path, kind: str, texts) -> list:
    """Files of a kind with these documents; returns the documents that a .txt file makes of
    them."""
    folder.mkdir(parents=True, exist_ok=True)
    half = len(texts) // 2
    if kind == "parquet":
        write_parquet(folder / "a.parquet", texts[:half])
        write_parquet(folder / "b.parquet", texts[half:], row_group_size=1000)
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(jsonl(texts[:half]))
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[half:])))
    elif kind == "txt":
        texts = [text.strip() + "\n" for text in texts if text.strip()]
        half = len(texts) // 2
        (folder / "a.txt").write_bytes(txt(texts[:half]))
        (folder / "b.txt").write_bytes(txt(texts[half:]))
    else:
        texts = [
            text
            for i, each in enumerate(("parquet", "jsonl", "txt"))
            for text in write_source(folder / f"{i}", each, texts[i::3])
        ]
    return texts


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, texts):
    """A folder with files of all kinds, and the tokens of their documents."""
    folder = tmp_path_factory.mktemp("source") / "mixed"
    return folder, encode(write_source(folder, "mixed", texts))


def saved(tokens, path: Path) -> bytes:
    with open(path, "wb") as file:
        np.save(file, tokens)
    return path.read_bytes()


def check_folder(
    folder: Path, tokens, shard_size: int, val_tokens: int | None = None, name=None
) -> None:
    """The folder holds exactly the shards that numpy makes of these tokens, and a manifest."""
    edges = [0, val_tokens or shard_size]
    while edges[-1] < len(tokens):
        edges.append(edges[-1] + shard_size)
    name = name or Manifest.load(folder).name
    expected = {}
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        expected[f"{name}_{'train' if i else 'val'}_{i:06d}.npy"] = saved(
            tokens[a:b], folder.parent / "expected"
        )
    found = {path.name: path.read_bytes() for path in folder.glob("*.np*")}
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert {path.name for path in folder.iterdir()} - set(expected) <= {"manifest.json", ".lock"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(check_every=7)


def work(**options) -> Work:
    return Work(tokenizer(), **options)


pytestmark = pytest.mark.usefixtures("no_fsync")


# ---- the program


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]


def run(*args, code=0, cwd=None, **env) -> str:
    """Run fineweb.py to its end; returns what it printed, errors last."""
    done = subprocess.run(
        command(*args),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        check=False,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def main(*args) -> int:
    """Run fineweb.py in this process."""
    return fineweb.main([str(arg) for arg in args])


# ---- the same shards


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_shards_are_those_of_a_plain_loop_for_any_unit_and_shard_size(tmp_path, texts, kind):
    tokens = encode(write_source(tmp_path / "in", kind, texts))
    manifests = set()
    for unit_bytes in (200, 20_000, 1 << 24):
        for shard_size in (1_000, 4_321):
            out = tmp_path / f"{unit_bytes}-{shard_size}"
            source = local_source([tmp_path / "in"])
            manifest = build_shards(source, out, Settings(shard_size), work(unit_bytes=unit_bytes))
            check_folder(out, tokens, shard_size)
            assert manifest.complete and manifest.tokens == len(tokens)
            manifests.add((shard_size, (out / "manifest.json").read_text()))
    assert (
        len(manifests) == 2
    )  # neither the shards nor what is said about them depends on the units


@pytest.mark.parametrize("num_proc", [1, 2, 3])
def test_shards_are_those_of_a_plain_loop_for_any_number_of_processes(tmp_path, mixed, num_proc):
    folder, tokens = mixed
    options = {"num_proc": num_proc, "unit_bytes": 5_000}
    manifest = build_shards(
        local_source([folder]), tmp_path / "out", Settings(3_000), work(**options)
    )
    check_folder(tmp_path / "out", tokens, 3_000, name="mixed")
    assert manifest.documents == np.count_nonzero(tokens == 50256)


def test_the_command_makes_these_shards_with_either_backend_and_says_the_same_of_them(
    tmp_path, mixed
):
    folder, tokens = mixed
    for out, options in {
        "a": [],
        "b": ["--tokenizer_backend", "tiktoken", "--num_proc", 2],
    }.items():
        printed = run(
            "--source", folder, "--shard_size", 10_000, "--out_dir", tmp_path / out, *options
        )
        check_folder(tmp_path / out, tokens, 10_000, name="mixed")
        assert (
            f"{len(tokens):,} tokens" in printed
            and f"train_gpt2.py --data_dir {tmp_path / out}" in printed
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_max_tokens_val_tokens_and_shard_name_do_what_they_say(tmp_path, mixed):
    folder, tokens = mixed
    args = [
        "--source",
        folder,
        "--max_tokens",
        "12_345",
        "--val_tokens",
        "1e3",
        "--shard_size",
        5_000,
    ]
    assert main(*args, "--shard_name", "mine", "--out_dir", tmp_path / "out") == 0
    check_folder(tmp_path / "out", tokens[:12_345], 5_000, val_tokens=1_000, name="mine")


@pytest.mark.parametrize("kept", [0, 10**9])
def test_val_fraction_is_a_share_of_all_tokens_in_memory_or_not(tmp_path, mixed, monkeypatch, kept):
    folder, tokens = mixed
    monkeypatch.setattr(build, "KEPT_BYTES", kept)
    args = ["--source", folder, "--shard_size", 3_000, "--out_dir", tmp_path / "out"]
    assert main(*args, "--val_fraction", 0.25, "--max_tokens", 30_001) == 0
    check_folder(tmp_path / "out", tokens[:30_001], 3_000, val_tokens=7_500)


def test_a_small_source_gives_a_tenth_to_validation_and_the_program_says_so(
    tmp_path, mixed, capsys
):
    folder, tokens = mixed
    assert main("--source", folder, "--out_dir", tmp_path / "out") == 0
    check_folder(tmp_path / "out", tokens, 10**8, val_tokens=len(tokens) // 10)
    assert "a tenth" in capsys.readouterr().out


def test_a_source_that_turns_out_smaller_than_it_looked_still_has_a_training_shard(tmp_path):
    (tmp_path / "dashes.txt").write_text("-" * 64_000)  # 64 of them are one token
    source, expected = local_source([tmp_path / "dashes.txt"]), 16_000
    build_shards(source, tmp_path / "out", Settings(5_000), work(), expected_tokens=expected)
    check_folder(tmp_path / "out", encode(["-" * 64_000]), 5_000, val_tokens=100)


def test_one_process_and_worker_processes_report_a_bad_document_alike(tmp_path, texts):
    write_parquet(tmp_path / "a.parquet", texts[:50])
    lines = jsonl(texts[50:100]).splitlines()
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([*lines[:20], b'{"text": 3}', *lines[20:]]))
    source = local_source([tmp_path / "a.parquet", tmp_path / "b.jsonl"])
    for num_proc in (1, 2):
        with pytest.raises(SourceError, match=r"b\.jsonl, line 21"):
            build_shards(
                source, tmp_path / f"out{num_proc}", Settings(2_000), work(num_proc=num_proc)
            )
    manifest = build_shards(
        source, tmp_path / "out1", Settings(2_000), work(on_bad_document="skip")
    )
    check_folder(tmp_path / "out1", encode(texts[:100]), 2_000)
    assert sum(shard.skipped.get("bad", 0) for shard in manifest.shards) == 1


def test_a_disagreement_of_the_backends_stops_the_run_and_names_the_document(tmp_path, texts):
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:100]))

    class Wrong(Tokenizer):
        def encode(self, text):
            return [*super().encode(text), 0] if text == texts[70] else super().encode(text)

    with pytest.raises(SourceError, match=r"a\.jsonl, line 73: gigatoken"):
        build_shards(
            local_source([tmp_path / "a.jsonl"]),
            tmp_path / "out",
            Settings(2_000),
            Work(Wrong(check_every=1)),
        )


# ---- interruptions


@pytest.fixture(scope="session")
def finished(tmp_path_factory, mixed):
    """The folder that an uninterrupted run makes, in many small shards."""
    folder, tokens = mixed
    out = tmp_path_factory.mktemp("finished") / "out"
    args = ["--source", folder, "--shard_size", 200, "--out_dir", out]
    with patch("os.fsync"):
        assert main(*args) == 0
    check_folder(out, tokens, 200)
    return args[:-1], contents(out)


def count_shards(out: Path) -> int:
    return len(list(out.glob("*.npy")))


class Fork(forked.Popen):
    """fineweb.py without the half second in which it imports what it needs."""

    imports = ("pretrain.tokens.command",)


def start_and_wait(args, out: Path, shards: int, popen=subprocess.Popen) -> subprocess.Popen:
    """Start the program and return when it has written so many shards."""
    process = popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    goal = count_shards(out) + shards
    while count_shards(out) < goal and process.poll() is None:
        time.sleep(0.001)
    return process


def test_sigkill_at_twenty_random_moments_changes_nothing(tmp_path, finished):
    args, expected = finished
    out, rng, killed_at = tmp_path / "out", random.Random(os.getpid()), []
    args = [*args, out]
    for i in range(20):
        if i % 4:
            process = start_and_wait(args, out, rng.randrange(0, len(expected) // 40), Fork)
            time.sleep(rng.uniform(0, 0.02))
        else:  # while it starts
            process = start_and_wait(args, out, 0)
            time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed_at.append(count_shards(out))
        if manifest := Manifest.load(out):
            assert all(
                (out / shard.file).read_bytes() == expected[shard.file] for shard in manifest.shards
            )
    assert len(set(killed_at)) > 5, killed_at  # they did come in the middle
    assert killed_at[-1] < len(expected) - 1
    run(*args)
    assert contents(out) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_signal_ends_cleanly_and_the_same_command_continues(tmp_path, finished, number, num_proc):
    args, expected = finished
    args = [*args, tmp_path / "out", "--num_proc", num_proc]
    process = start_and_wait(args, tmp_path / "out", 20)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, printed
    assert "Traceback" not in printed and "the same command continues" in printed
    assert not list((tmp_path / "out").glob("*.tmp"))
    manifest = Manifest.load(tmp_path / "out")
    assert len(manifest.shards) >= 19 and not manifest.complete
    if number == signal.SIGTERM:
        assert "going on" in run(*args)
        assert contents(tmp_path / "out") == expected


def children(pid: int) -> list[int]:
    """Worker processes, not the resource tracker of multiprocessing."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {each: Path(f"/proc/{each}/cmdline").read_bytes() for each in pids}
    return [int(each) for each, line in lines.items() if b"resource_tracker" not in line]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes through /proc"
)


@needs_proc
def test_a_killed_worker_ends_the_run_with_an_error_and_the_same_command_continues(
    tmp_path, finished
):
    args, expected = finished
    args = [*args, tmp_path / "out", "--num_proc", 2]
    process = start_and_wait(args, tmp_path / "out", 5)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "worker process" in printed and "Traceback" not in printed
    run(*args)
    assert contents(tmp_path / "out") == expected


@needs_proc
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path, finished):
    process = start_and_wait([*finished[0], tmp_path / "out", "--num_proc", 2], tmp_path / "out", 2)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if alive(pid)]


def test_a_full_disk_loses_the_unfinished_shard_alone(tmp_path, finished, monkeypatch, capsys):
    args, expected = finished
    out, write, written = tmp_path / "out", ShardWriter.write, 0

    def write_until_full(self, tokens):
        nonlocal written
        written += len(tokens)
        if written > 5_000:
            raise OSError(28, "No space left on device")
        write(self, tokens)

    monkeypatch.setattr(ShardWriter, "write", write_until_full)
    assert main(*args, out) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "No space left on device" in error
        and "25 finished shards" in error
    )
    assert set(contents(out)) == {
        "manifest.json",
        *(shard.file for shard in Manifest.load(out).shards),
    }
    monkeypatch.undo()
    assert main(*args, out) == 0
    assert contents(out) == expected


def test_a_file_that_may_not_grow_ends_in_one_line(tmp_path, mixed):
    pytest.importorskip("resource")
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "_"]  # KiB
    args = [
        "--source",
        mixed[0],
        "--val_tokens",
        1_000,
        "--shard_size",
        20_000,
        "--out_dir",
        tmp_path / "out",
    ]
    args += [
        "--tokenizer_backend",
        "tiktoken",
        "--num_proc",
        1,
    ]  # gigatoken is built from a larger file
    done = subprocess.run([*limited, *command(*args)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "1 finished shard" in done.stderr and not list((tmp_path / "out").glob("*.tmp"))


# ---- reruns


def test_a_rerun_of_a_finished_folder_writes_nothing_and_reads_no_document(
    tmp_path, mixed, monkeypatch, capsys
):
    args = ["--source", mixed[0], "--shard_size", 9_000, "--out_dir", tmp_path / "out"]
    assert main(*args) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("pretrain.tokens.pipeline.read_unit", None)
    monkeypatch.setattr("pretrain.tokens.tokenizer.Tokenizer.__init__", None)
    assert main(*args, "--num_proc", 2, "--check_every", 0, "--tokenizer_backend", "tiktoken") == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_a_rerun_continues_without_reading_what_came_before(tmp_path, texts, kind):
    tokens = encode(write_source(tmp_path / "in", kind, texts))
    source, units = local_source([tmp_path / "in"]), []

    class Interrupted(Exception):
        pass

    class StopAfter(build.Callbacks):
        def shard(self, shard):
            if shard.file.endswith("_train_000003.npy"):
                raise Interrupted

        def batch(self, batch):
            units.append(batch.unit)

    options = {"unit_bytes": 2_000, "progress": StopAfter()}
    with pytest.raises(Interrupted):
        build_shards(source, tmp_path / "out", Settings(1_000), work(**options))
    position = Manifest.load(tmp_path / "out").next
    units.clear()
    options["progress"].shard = lambda shard: None
    build_shards(source, tmp_path / "out", Settings(1_000), work(**options))
    assert position["row"] > 40 and units[0].file == position["file"] == 0
    assert units[0].first_row == (
        position["row"] // 20 * 20 if kind == "parquet" else position["row"]
    )
    check_folder(tmp_path / "out", tokens, 1_000)


def test_other_settings_are_refused_and_each_difference_is_named(tmp_path, mixed, capsys):
    args = ["--source", mixed[0], "--out_dir", tmp_path / "out", "--shard_size"]
    assert main(*args, 9_000) == 0
    before = contents(tmp_path / "out")
    assert main(*args, 8_000, "--max_tokens", 20_000, "--shard_name", "other") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (
        "--shard_size was 9000, now 8000",
        "--max_tokens was not given, now 20000",
        "--shard_name was mixed",
    ):
        assert part in error
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["content", "size", "one more", "one less", "order"])
def test_changed_documents_are_refused_and_named(tmp_path, texts, change):
    write_source(tmp_path / "in", "jsonl", texts[:100])
    paths = [tmp_path / "in" / "a.jsonl", tmp_path / "in" / "b.jsonl.gz"]
    build_shards(local_source(paths), tmp_path / "out", Settings(2_000), work(), name="in")
    content = paths[0].read_bytes()
    if change == "content":
        paths[0].write_bytes(content.replace(b'"id": 3', b'"id": 4'))
    elif change == "size":
        paths[0].write_bytes(content + b"\n")
    elif change == "one more":
        shutil.copy(paths[0], tmp_path / "in" / "c.jsonl")
        paths.append(tmp_path / "in" / "c.jsonl")
    else:
        paths = paths[:1] if change == "one less" else paths[::-1]
    with pytest.raises(BuildRefused, match=r"a\.jsonl|2 files then"):
        build_shards(local_source(paths), tmp_path / "out", Settings(2_000), work(), name="in")


def test_documents_may_lie_elsewhere_when_a_build_goes_on(tmp_path, texts):
    write_source(tmp_path / "in", "jsonl", texts[:100])
    manifest = build_shards(
        local_source([tmp_path / "in"]), tmp_path / "out", Settings(2_000), work()
    )
    (tmp_path / "in").rename(tmp_path / "moved")
    assert (
        build_shards(
            local_source([tmp_path / "moved"]), tmp_path / "out", Settings(2_000), work(), name="in"
        )
        == manifest
    )


def test_one_process_at_a_time_writes_a_folder(tmp_path, mixed, capsys):
    with lock(tmp_path / ".lock", "locked"):
        assert main("--source", mixed[0], "--out_dir", tmp_path) == 1
    assert "another process" in capsys.readouterr().err


def test_shards_of_unknown_origin_are_left_alone(tmp_path, mixed, capsys):
    (tmp_path / "edufineweb_train_000001.npy").write_bytes(b"precious")
    assert main("--source", mixed[0], "--out_dir", tmp_path) == 1
    assert "edufineweb_train_000001.npy" in capsys.readouterr().err
    assert (tmp_path / "edufineweb_train_000001.npy").read_bytes() == b"precious"


def test_what_a_crash_left_over_is_removed_and_nothing_else(tmp_path, mixed, monkeypatch):
    folder, tokens = mixed
    out = tmp_path / "out"
    args = ["--source", folder, "--out_dir", out, "--shard_size", 9_000, "--max_tokens", 20_000]
    assert main(*args) == 0
    manifest = Manifest.load(out)
    manifest.next, manifest.complete = manifest.shards.pop().first, False
    manifest.save(out)
    (out / "mixed_train_000002.npy").write_bytes(b"half" * 1_000)
    (out / "mixed_train_000003.npy.tmp").write_bytes(b"half")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0)
    )  # but for it
    (out / "notes.txt").write_text("mine")
    (out / "other_train_000003.npy").write_text("mine")
    assert main(*args) == 0
    assert (out / "notes.txt").exists() and (out / "other_train_000003.npy").exists()
    (out / "notes.txt").unlink()
    (out / "other_train_000003.npy").unlink()
    check_folder(out, tokens[:20_000], 9_000)


# ---- before and after


def test_a_dry_run_tells_and_writes_nothing(tmp_path, mixed, capsys):
    assert main("--source", mixed[0], "--dry_run", "--out_dir", tmp_path / "a" / "b") == 0
    printed = capsys.readouterr().out
    assert "6 files" in printed and "tokens" in printed and "free" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_hold_the_shards_is_refused(tmp_path, mixed, monkeypatch, capsys):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10**4, 10**4)
    )
    assert main("--source", mixed[0], "--out_dir", tmp_path / "out") == 1
    assert "10 kB are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main("--source", mixed[0], "--out_dir", tmp_path / "out", "--max_tokens", 4_000) == 0


def test_the_sources_own_token_count_is_compared_in_sum(tmp_path, texts, capsys):
    write_parquet(tmp_path / "a.parquet", texts)
    table = pq.read_table(tmp_path / "a.parquet")
    counts = table["token_count"].to_pylist()
    first = next(i for i, text in enumerate(table["text"].to_pylist()) if text)
    counts[first] += 5
    pq.write_table(table.set_column(2, "token_count", pa.array(counts)), tmp_path / "a.parquet")
    assert (
        main("--source", tmp_path / "a.parquet", "--shard_size", 999, "--out_dir", tmp_path / "out")
        == 0
    )
    total = len(encode(texts)) - len(texts)
    assert (
        f"token_count: {total + 5:,} says the source, {total:,} were written: -5"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("args", "problems"),
    [
        (["--source", "x", "--dataset", "a/b", "--split", "c"], ["--dataset, --split"]),
        (
            ["--source", "x", "--val_fraction", "1.5", "--val_tokens", "3"],
            ["between 0 and 1", "give one of them"],
        ),
        (["--val_fraction", "0.1"], ["--source only"]),
        (
            ["--val_tokens", "10", "--max_tokens", "10", "--check_every", "-1"],
            ["nothing", "--check_every: -1 must be at least 0"],
        ),
        (["--shard_size", "0"], ["--shard_size: 0 must be at least 1"]),
        (["--shard_name", "a/b"], ["cannot begin a file name"]),
        (["--tokens", "1"], ["--tokens"]),
    ],
)
def test_wrong_arguments_are_all_named_at_once(args, problems, capsys):
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(problem in error for problem in problems), error


@pytest.mark.parametrize("case", ["no file", "no column", "all empty"])
def test_a_source_without_documents_ends_in_one_line_and_leaves_no_shard(tmp_path, case, capsys):
    path = tmp_path / "a.jsonl"
    if case != "no file":
        path.write_text('{"text": ""}\n' if case == "all empty" else '{"body": "x"}\n')
    assert main("--source", path, "--out_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fineweb.py: error: ")
    assert not list(tmp_path.rglob("*.npy*"))
    path.write_text('{"text": "now there is one"}\n' * 9)
    assert main("--source", path, "--out_dir", tmp_path / "out") == 0


def test_unreadable_parquet_files_stop_the_run_or_are_left_out_and_counted(tmp_path, texts, capsys):
    folder = tmp_path / "in"
    tokens = encode(write_source(folder, "parquet", texts))
    for name in ("a_cut.parquet", "z_cut.parquet"):
        (folder / name).write_bytes((folder / "a.parquet").read_bytes()[:-9])
    args = ["--source", folder, "--out_dir", tmp_path / "out", "--shard_size", 900]
    assert main(*args) == 1
    assert "_cut.parquet: not a whole parquet file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(*args, "--on_bad_document", "skip") == 0
    assert "left out: 2 unreadable files\n" in capsys.readouterr().out
    check_folder(tmp_path / "out", tokens, 900)


# ---- verify


@pytest.fixture
def verified(tmp_path, mixed, capsys):
    assert main("--source", mixed[0], "--shard_size", 4_000, "--out_dir", tmp_path / "out") == 0
    capsys.readouterr()
    assert main("--verify", "--out_dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "no problems" in printed and re.search(r"[1-9]\d* documents encoded again", printed)
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "id", "header"])
def test_verify_names_each_damaged_shard(verified, damage, capsys):
    paths = find_shards(verified, "train")[1:3]
    for path in paths:
        content = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
            continue
        if damage == "id":
            content[-2:] = b"\xff\xff"
        elif damage == "header":
            content[60] ^= 1
        else:
            content[-1000] ^= damage == "bit"
        path.write_bytes(content[:-2] if damage == "cut" else content)
    assert main("--verify", "--out_dir", verified) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [path.name in line for path, line in zip(paths, lines[:2], strict=True)] == [True, True]
    assert lines[2].endswith("2 problems")


def test_verify_counts_the_documents(verified, capsys):
    manifest = Manifest.load(verified)
    manifest.shards[2].documents += 1
    manifest.save(verified)
    assert main("--verify", "--out_dir", verified) == 1
    lines = capsys.readouterr().out.splitlines()
    assert manifest.shards[2].file in lines[0] and "documents begin in it" in lines[0]


def test_verify_compares_with_the_documents_themselves(verified, capsys):
    """A shard and a manifest that agree with each other are still not what the documents say."""
    path = find_shards(verified, "train")[3]
    tokens = np.load(path)
    tokens[5] = (tokens[5] + 1) % 50257
    content = saved(tokens, path)
    manifest = Manifest.load(verified)
    shard = next(shard for shard in manifest.shards if shard.file == path.name)
    shard.sha256 = hashlib.sha256(content).hexdigest()
    manifest.save(verified)
    assert main("--verify", "--out_dir", verified) == 1
    assert f"{path.name}: tokens " in capsys.readouterr().out


def test_verify_looks_at_folders_of_others_too(tmp_path, capsys):
    saved(np.arange(100, dtype=np.uint16), tmp_path / "edufineweb_train_000001.npy")
    assert main("--verify", "--out_dir", tmp_path) == 0
    assert "no manifest.json" in capsys.readouterr().out
    saved(np.full(9, 50257, np.uint16), tmp_path / "edufineweb_train_000001.npy")
    assert main("--verify", "--out_dir", tmp_path) == 1


# ---- the Hub


@pytest.fixture(scope="session")
def repo(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("repo")
    card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
    card += "    path: sample/10BT/*\n---\n"
    files = {"README.md": card.encode(), "data/other.parquet": b"never read"}
    for i in range(3):
        write_parquet(folder / "part.parquet", texts[i * 100 : (i + 1) * 100])
        files[f"sample/10BT/00{i}_00000.parquet"] = (folder / "part.parquet").read_bytes()
    return {DATASET: files}, encode(texts[:300])


FAULTS = [
    {"fail_every": 3},
    {"cut_every": 2},
    {"fail_every": 4, "status": 429, "retry_after": 1},
    {"stall_every": 5},
]


@pytest.mark.parametrize("faults", FAULTS, ids=["503", "cut bodies", "429", "stalls"])
def test_a_faulty_hub_gives_the_same_shards(tmp_path, repo, monkeypatch, faults):
    files, tokens = repo
    patience = Patience(read_seconds=0.5, give_up_seconds=20, first_wait_seconds=0.01)
    with LoopbackHub(files, **faults) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        source = hub_source(DATASET, name="sample-10BT", patience=patience)
        build_shards(source, tmp_path / "out", Settings(3_000), work(unit_bytes=10_000))
        assert hub.faults > 0
        assert not any("other.parquet" in request.path for request in hub.requests)
    check_folder(tmp_path / "out", tokens, 3_000, name="fineweb-edu-sample-10BT")


def test_a_hub_that_is_gone_ends_in_one_line_and_a_rerun_goes_on_at_its_commit(
    tmp_path, repo, monkeypatch, capsys
):
    files, tokens = repo
    out = tmp_path / "data" / "fineweb-edu-sample-10BT"  # the default
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "pretrain.text.documents.Patience",
        lambda: Patience(give_up_seconds=1, first_wait_seconds=0.01),
    )
    monkeypatch.setattr("pretrain.tokens.engines.MAX_THREADS", 1)
    # requests come in order: the last one fails
    monkeypatch.setattr("pretrain.tokens.engines.NETWORK_THREADS", 1)
    with LoopbackHub(files) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert main("--shard_size", 3_000, "--out_dir", tmp_path / "other") == 0
    capsys.readouterr()
    with LoopbackHub(files, down_after=hub.counted - 1) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert main("--shard_size", 3_000) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rerun" in error, error
    begun = Manifest.load(out)
    assert begun.shards and not begun.complete
    with LoopbackHub(files) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert main("--shard_size", 3_000) == 0
        assert not any("/revision/main" in request.path for request in hub.requests)
    check_folder(out, tokens, 3_000, name="fineweb-edu-sample-10BT")
    assert main("--shard_size", 3_000) == 0  # the hub is gone, and nobody misses it
    printed = capsys.readouterr()
    assert (
        "nothing is left to do" in printed.out
        and hub.commit(DATASET) in (out / "manifest.json").read_text()
    )
    assert main("--shard_size", 3_000, "--dataset", "HuggingFaceFW/fineweb", "--out_dir", out) == 1
    assert "--dataset was HuggingFaceFW/fineweb-edu" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["hf://datasets/a/b", "ftp://host/x", "gs://bucket/x"])
def test_an_out_dir_in_no_store_that_is_known_is_refused_and_makes_no_folder(
    tmp_path, monkeypatch, capsys, where
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (tmp_path / "a.txt").write_text("The mill.")
    try:
        assert fineweb.main(["--source", "a.txt", "--out_dir", where]) == 1
        assert "requirements-stores.txt, or pip install gcsfs" in capsys.readouterr().err
    except SystemExit as ended:
        assert ended.code == 2 and "or to s3://, gs:// or az://" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
