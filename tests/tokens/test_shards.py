"""Shard files, manifests and packing, against numpy's own writer and a plain cut of all tokens."""

import hashlib
import itertools
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.text.documents import Position, Unit
from pretrain.tokens.engines import run_in_order
from pretrain.tokens.packing import Packer
from pretrain.tokens.pipeline import TokenBatch
from pretrain.tokens.shards import (
    Manifest,
    Shard,
    ShardError,
    ShardWriter,
    data_fingerprint,
    find_shards,
    open_shard,
    shard_header,
    verify_shard,
)


def save(path: Path, tokens) -> Path:
    with open(path, "wb") as file:
        np.save(file, np.asarray(tokens, np.uint16))
    return path


def make_folder(folder: Path, sizes=(30, 50, 20)) -> Manifest:
    """A finished folder, written with numpy and hashlib alone."""
    folder.mkdir(exist_ok=True)
    rng, shards = np.random.default_rng(0), []
    for i, size in enumerate(sizes):
        split = "train" if i else "val"
        path = save(folder / f"x_{split}_{i:06d}.npy", rng.integers(0, 50257, size))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append(Shard(path.name, split, size, 1, digest, Position(0, i).to_json()))
    source = {"kind": "local", "text_column": "text", "files": []}
    manifest = Manifest("x", source, {"shard_size": 50}, {}, sizes[0], shards, None, complete=True)
    manifest.save(folder)
    return manifest


# ---- files


@pytest.mark.parametrize("tokens", [1, 7, 10, 999, 100_000_000, 12_345_678_901])
def test_a_header_is_what_numpy_writes(tokens, tmp_path):
    stand_in = np.lib.stride_tricks.as_strided(
        np.zeros(1, np.uint16), (tokens,), (0,)
    )  # no memory behind it
    with open(tmp_path / "header", "wb") as file:
        description = np.lib.format.header_data_from_array_1_0(stand_in)
        np.lib.format.write_array_header_1_0(file, {**description, "fortran_order": False})
    assert shard_header(tokens) == (tmp_path / "header").read_bytes()
    assert len(shard_header(tokens)) == 128  # of any number: it can be written again in place


@pytest.mark.parametrize("expected", [1000, 5000])
def test_a_written_shard_is_what_numpy_saves_and_sha256sum_prints(tmp_path, expected):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    writer = ShardWriter(tmp_path / "a.npy", expected)
    for part in np.array_split(tokens, 7):
        writer.write(part)
    assert not (tmp_path / "a.npy").exists()
    digest = writer.close()
    assert (tmp_path / "a.npy").read_bytes() == save(tmp_path / "b.npy", tokens).read_bytes()
    assert digest == hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_an_aborted_shard_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "a.npy", 10)
    writer.write(np.arange(5, dtype=np.uint16))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_open_shard_maps_and_does_not_let_write(tmp_path):
    tokens = open_shard(save(tmp_path / "a_train_000001.npy", [1, 2, 50256]))
    assert tokens.tolist() == [1, 2, 50256] and tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 3


def damaged(path: Path, how: str) -> None:
    good = save(path, np.arange(1000)).read_bytes()
    arrays = {
        "int32": np.arange(9, dtype=np.int32),
        "big-endian": np.arange(9, dtype=">u2"),
        "2-D": np.zeros((3, 3), np.uint16),
        "empty": np.zeros(0, np.uint16),
        "pickled": np.array([{}], object),
    }
    if how in arrays:
        with open(path, "wb") as file:
            np.save(file, arrays[how], allow_pickle=True)
    elif how == "several arrays":
        with open(path, "wb") as file:
            np.savez(file, a=np.arange(9, dtype=np.uint16))
    else:
        path.write_bytes(
            {"torn": good[:-1], "header only": good[:100], "longer": good + b"x", "no bytes": b""}[
                how
            ]
        )


@pytest.mark.parametrize(
    "how",
    [
        "int32",
        "big-endian",
        "2-D",
        "empty",
        "pickled",
        "several arrays",
        "torn",
        "header only",
        "longer",
        "no bytes",
    ],
)
def test_open_shard_refuses_and_names_what_is_no_shard(tmp_path, how):
    path = tmp_path / "a_train_000001.npy"
    damaged(path, how)
    with pytest.raises(ShardError, match=r"a_train_000001\.npy: .*fineweb\.py"):
        open_shard(path)


def test_open_shard_names_a_missing_file(tmp_path):
    with pytest.raises(ShardError, match=r"b\.npy: no such shard"):
        open_shard(tmp_path / "b.npy")


# ---- folders


def test_a_folder_opens_by_its_manifest_alone(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "x_train_000003.npy", [1])
    assert [path.name for path in find_shards(tmp_path, "train")] == [
        "x_train_000001.npy",
        "x_train_000002.npy",
    ]
    assert [path.name for path in find_shards(tmp_path, "val")] == ["x_val_000000.npy"]


def test_a_listed_shard_that_is_missing_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "x_train_000001.npy").unlink()
    with pytest.raises(ShardError, match=r"x_train_000001\.npy"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize(
    "names",
    [
        [
            "edufineweb_train_000001.npy",
            "edufineweb_train_000002.npy",
            "edufineweb_train_000010.npy",
        ],
        ["fineweb_train_0000.npy", "fineweb_train_0001.npy"],
        ["a_train_2.npy", "a_train_10.npy"],
        ["my_val_run_train_000001.npy"],
    ],
)
def test_folders_of_others_open_in_the_order_of_their_numbers(tmp_path, names):
    folder = tmp_path / "run_val_000000.npy"  # a folder's own name decides nothing
    folder.mkdir()
    for name in [
        *reversed(names),
        "edufineweb_val_000000.npy",
        "tokens.npy",
        "a_train_1.npy.tmp",
        "a_train_1.bin",
    ]:
        save(folder / name, [1])
    assert [path.name for path in find_shards(folder, "train")] == names
    assert [path.name for path in find_shards(folder, "val")] == ["edufineweb_val_000000.npy"]


@pytest.mark.parametrize("state", ["empty", "absent", "only val"])
def test_a_folder_without_shards_names_the_command_that_makes_them(tmp_path, state):
    folder = tmp_path / "data"
    if state != "absent":
        folder.mkdir()
    if state == "only val":
        save(folder / "x_val_000000.npy", [1])
    with pytest.raises(ShardError, match=r"python fineweb\.py --out_dir"):
        find_shards(folder, "train")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_fingerprint_tells_folders_apart_by_what_is_in_their_shards(tmp_path, with_manifest):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        make_folder(folder)
        if not with_manifest:
            (folder / "manifest.json").unlink()
    assert data_fingerprint(a) == data_fingerprint(b)
    tokens = np.load(b / "x_train_000001.npy")
    tokens[-1] ^= 1
    path = save(b / "x_train_000001.npy", tokens)
    if with_manifest:
        manifest = Manifest.load(b)
        manifest.shards[1].sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.save(b)
    assert data_fingerprint(a) != data_fingerprint(b)


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    manifest = make_folder(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert Manifest.load(tmp_path / "elsewhere") is None
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(tokens=99),
        lambda record: record.update(format=2),
        lambda record: record.pop("shards"),
        lambda record: record["shards"][1].update(file="../x_train_000001.npy"),
        lambda record: record["shards"][1].update(file="x_val_000001.npy"),
        lambda record: record["shards"][1].pop("sha256"),
        lambda record: record["shards"].append(3),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, change):
    make_folder(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    change(record)
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ShardError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_no_damaged_manifest(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ShardError, match="Not a directory"):
        Manifest.load(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}', "\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_verify_shard_finds_a_flipped_bit_a_large_id_and_a_wrong_count(tmp_path):
    shard = make_folder(tmp_path).shards[1]
    path = tmp_path / shard.file
    verify_shard(path, shard)
    good = np.load(path)
    with pytest.raises(ShardError, match="SHA-256"):
        verify_shard(save(path, good ^ np.eye(1, 50, 7, dtype=np.uint16)[0]), shard)
    with pytest.raises(ShardError, match="50257"):
        verify_shard(save(path, [*good[:-1], 50257]))
    with pytest.raises(ShardError, match="49 tokens"):
        verify_shard(save(path, good[:-1]), shard)


# ---- packing


@st.composite
def documents(draw):
    """[(row, tokens)] of one file: rows with gaps, where others were left out."""
    gaps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
    counts = [draw(st.integers(1, 9)) for _ in gaps]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [
        (int(row) - 1, rng.integers(0, 50257, n))
        for row, n in zip(np.cumsum(gaps), counts, strict=True)
    ]


def batches_of(documents, cuts, start: Position | None):
    """TokenBatches from the row of `start` on, cut before the documents in `cuts`; byte = 10 x
    row."""
    first_row = start.row if start else 0
    rows = [row for row, _ in documents if row >= first_row]
    tokens = [tokens for row, tokens in documents if row >= first_row]
    unit, next_row = Unit(0, 0, 1, first_row, 1), 0
    edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    for a, b in itertools.pairwise(edges):
        kept = np.array(rows[a:b], np.int64) - first_row
        before, next_row = next_row, int(kept[-1]) + 1
        yield TokenBatch(
            unit,
            np.concatenate(tokens[a:b]).astype(np.uint16),
            np.array([len(each) for each in tokens[a:b]], np.int64),
            kept,
            (kept + first_row) * 10,
            next_row,
            {"empty": np.setdiff1d(np.arange(before, next_row), kept)},
            np.array([row % 5 for row in rows[a:b]], np.int64),
            1,
        )


def plain_cut(documents, sizes, max_tokens):
    stream = np.concatenate([tokens for _, tokens in documents]).astype(np.uint16)[:max_tokens]
    edges = [0, sizes[0]]
    while edges[-1] < len(stream):
        edges.append(edges[-1] + sizes[1])
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def interrupted_build(folder, docs, data, sizes, max_tokens):
    """Pack until a shard is finished, start again from the manifest, and so on, with batches cut
    anew."""
    manifest = Manifest("x", {}, {}, {}, sizes[0])
    manifest.save(folder)
    while not manifest.complete:
        packer = Packer(folder, manifest, shard_size=sizes[1], max_tokens=max_tokens)
        start = Position.from_json(manifest.next) if manifest.next else None
        shards_before = len(manifest.shards)
        for batch in batches_of(docs, data.draw(st.sets(st.integers(0, 12))), start):
            packer.add(batch)
            if packer.done or len(manifest.shards) > shards_before:
                break
        else:
            packer.finish()
        packer.abort()
        manifest = Manifest.load(folder)


def uninterrupted_build(folder, docs, data, sizes, max_tokens):
    packer = Packer(
        folder, Manifest("x", {}, {}, {}, sizes[0]), shard_size=sizes[1], max_tokens=max_tokens
    )
    for batch in batches_of(docs, data.draw(st.sets(st.integers(0, 12))), None):
        packer.add(batch)
        if packer.done:
            return
    packer.finish()


@settings(max_examples=60, deadline=None)
@given(documents(), st.tuples(st.integers(1, 20), st.integers(1, 20)), st.data())
def test_shards_are_a_plain_cut_however_batches_come_and_wherever_it_stops(
    tmp_path_factory, docs, sizes, data
):
    total = sum(len(tokens) for _, tokens in docs)
    max_tokens = data.draw(st.none() | st.integers(1, total))
    manifests = []
    for build in (uninterrupted_build, interrupted_build):
        folder = tmp_path_factory.mktemp("pack")
        with patch("os.fsync"):  # hundreds of them are slow, and nothing is cut off here
            build(folder, docs, data, sizes, max_tokens)
        manifest = Manifest.load(folder)
        written = [np.load(folder / shard.file).tolist() for shard in manifest.shards]
        assert written == [shard.tolist() for shard in plain_cut(docs, sizes, max_tokens)]
        assert manifest.tokens == (total if max_tokens is None else max_tokens)
        manifests.append((folder / "manifest.json").read_text())
    assert manifests[0] == manifests[1]


def test_what_was_left_out_and_counted_adds_up(tmp_path):
    rng = np.random.default_rng(1)
    docs = [(row, rng.integers(0, 50257, 1 + row % 4)) for row in range(1, 100, 2)]
    manifest = Manifest("x", {}, {}, {}, val_tokens=17)
    packer = Packer(tmp_path, manifest, shard_size=23)
    for batch in batches_of(docs, {5, 11, 12, 40}, None):
        packer.add(batch)
    packer.finish()
    assert sum(shard.skipped.get("empty", 0) for shard in manifest.shards) == 50
    assert sum(shard.documents for shard in manifest.shards) == 50
    assert sum(shard.token_count["source"] for shard in manifest.shards) == sum(
        row % 5 for row, _ in docs
    )
    written = sum(shard.token_count["written"] for shard in manifest.shards)
    assert written == manifest.tokens - 50  # without end-of-text


def test_results_come_in_the_order_of_the_tasks_and_an_error_at_its_place():
    def lane(task):
        for i in range(task % 3):
            yield task, i
        if task == 20:
            raise ZeroDivisionError

    results = run_in_order(iter(range(30)), [lane] * 4)
    expected = [(task, i) for task in range(21) for i in range(task % 3)]
    received = []
    with pytest.raises(ZeroDivisionError):
        for result in results:
            received.append(result)
    assert received == expected
