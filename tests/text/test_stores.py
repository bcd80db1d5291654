"""Sources at addresses: an S3 server on loopback through faults, servers of HTTP, the Hub."""

import dataclasses
import functools
import gzip
import http.server
import importlib
import json
import logging
import sys
import threading

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import LoopbackHub
from loopback_s3 import SECRET

from pretrain.text import addresses, documents, stores
from pretrain.text.documents import (
    Patience,
    SourceError,
    changed_files,
    local_source,
    plan_units,
    read_unit,
)

PATIENT = Patience(
    read_seconds=0.4, give_up_seconds=20, first_wait_seconds=0.01, longest_wait_seconds=0.05
)
IMPATIENT = dataclasses.replace(PATIENT, give_up_seconds=1.0)
TEXTS = [f"document {i} " + "déjà vu " * (i % 40) + "\n" for i in range(300)]


def parquet_bytes(texts):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "id": texts}), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def jsonl_bytes(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@functools.cache
def corpus():
    """Objects below a bucket's folder, in the order in which they are read, and what is no part
    of it."""
    return {
        "a/one.parquet": parquet_bytes(TEXTS[:100]),
        "a/two.jsonl": jsonl_bytes(TEXTS[100:200]),
        "b.jsonl.gz": gzip.compress(jsonl_bytes(TEXTS[200:250])),
        "c.txt": "<|endoftext|>\n".join(TEXTS[250:]).encode(),
    } | {"_out/x.jsonl": b"?", ".x.jsonl": b"?", "README.md": b"?", "d.json": b"?"}


@pytest.fixture
def bucket(s3):
    for name, data in corpus().items():
        s3.put(f"s3://acme/web/{name}", data)
    return s3


def source(*given, **options):
    return local_source(given or ["s3://acme/web"], **{"patience": PATIENT, **options})


def texts_of(source, unit_bytes=4000):
    return [
        text
        for unit in plan_units(source, unit_bytes=unit_bytes)
        for batch in read_unit(source, unit)
        for text in batch.texts.to_pylist()
    ]


def names(source):
    return [file.path.removeprefix("s3://acme/web/") for file in source.files]


# ---- which objects


def test_a_folder_in_a_store_holds_what_it_would_hold_on_a_disk(bucket, tmp_path):
    for name, data in corpus().items():
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    here = local_source([tmp_path / "web"])
    there = source("s3://acme/web/")
    assert [f.path.partition("/web/")[2] for f in here.files] == names(there)
    assert texts_of(there) == texts_of(here)
    assert there.name == here.name == "web"
    assert source("s3://acme").name == "acme" and names(source("s3://acme")) == names(there)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("s3://acme/web/a/*", ["a/one.parquet", "a/two.jsonl"]),
        ("s3://acme/web/**/*.jsonl*", ["_out/x.jsonl", "a/two.jsonl", "b.jsonl.gz"]),
        ("s3://acme/*/?/[o]ne.*", ["a/one.parquet"]),
        ("s3://acme/web/d.json", ["d.json"]),
        ("s3://acme/web/*.json", ["d.json"]),
        ("s3://acme/web/[abcd]**", ["b.jsonl.gz", "c.txt", "d.json"]),
    ],
)
def test_patterns_find_objects_as_they_find_files(bucket, tmp_path, pattern, found):
    assert names(source(pattern)) == found
    if pattern.startswith("s3://acme/web/"):
        for name in corpus():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"{}")
        on_disk = local_source([pattern.replace("s3://acme/web", tmp_path.as_posix())])
        on_disk = [f.path.removeprefix(f"{tmp_path.as_posix()}/") for f in on_disk.files]
        assert on_disk == found


def test_an_object_that_is_named_like_a_pattern_is_itself(bucket):
    bucket.put("s3://acme/data[v2]/x.txt", b"text")
    assert texts_of(source("s3://acme/data[v2]/x.txt")) == ["text"]
    assert texts_of(source("s3://acme/data[v2]")) == ["text"]


def test_stores_and_disks_mix_and_an_object_given_twice_is_read_once(bucket, tmp_path):
    (tmp_path / "here.txt").write_text("here")
    mixed = source("s3://acme/web/c.txt", tmp_path / "here.txt", "s3://acme/web/")
    assert names(mixed)[0] == "c.txt" and len(mixed.files) == 5
    assert mixed.description["kind"] == "stored"
    assert texts_of(mixed)[len(TEXTS) - 250] == "here"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3://acme/nothing", "s3://acme/nothing: no such object, and no folder with one"),
        ("s3://nobucket/x.txt", "s3://nobucket/x.txt: no such object, or no such bucket"),
        ("s3://acme/web/*.csv", "no file matches it"),
        ("s3://acme/web/README.md", "cannot be read; a source is .parquet"),
        ("s3://*/web", "a pattern begins behind the bucket's name"),
        ("s3://UPPER case/web", "Invalid bucket name"),
        ("ftp://host/x.txt", "no scheme that is known here; known are s3://, gs://, az://"),
        ("file:///x.txt", "a file on this machine is given by its path"),
        ("s3://key:hush@acme/x.txt", "^s3://acme/x.txt: no address of a store has a password"),
        ("hf://models/acme/web", "a dataset is hf://datasets/OWNER/NAME"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_line(bucket, given, message):
    with pytest.raises(SourceError, match=message) as error:
        source(given)
    assert "\n" not in str(error.value) and "hush" not in str(error.value)


@pytest.mark.parametrize(("scheme", "driver"), [("gs", "gcsfs"), ("az", "adlfs"), ("s3", "s3fs")])
def test_a_driver_that_is_missing_is_named_with_its_install(monkeypatch, scheme, driver):
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.setattr(stores, "_system", stores._system.__wrapped__)  # not the one in use
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, scheme, raising=False)
    with pytest.raises(SourceError, match=rf"requirements-stores\.txt, or pip install {driver}"):
        source(f"{scheme}://acme/x.txt")


def test_credentials_are_the_stores_own_and_are_never_shown(bucket, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    bucket.faults(fail_every=1, status=403)
    with pytest.raises(SourceError, match="not permitted") as error:
        source()
    bucket.faults(down=1)
    with pytest.raises(SourceError, match="rerun the same command") as gone:
        source(patience=IMPATIENT)
    assert SECRET not in f"{error.value} {gone.value} {caplog.text}"
    assert "Signature" not in f"{error.value} {gone.value} {caplog.text}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(stores, "_system", stores._system.__wrapped__)  # not the one in use
    with pytest.raises(SourceError, match=r"not permitted .*credential.*AWS_ACCESS_KEY_ID"):
        source()


# ---- through faults


@pytest.mark.parametrize(
    "faults", [{"fail_every": 3}, {"cut_every": 3}, {"status": 500, "fail_every": 4}], ids=str
)
def test_documents_are_the_same_through_faults(bucket, faults):
    bucket.faults(**faults)
    assert texts_of(source(), unit_bytes=8000) == TEXTS
    assert bucket.faulty > 5


def test_a_cut_body_costs_a_piece_and_not_the_file(s3, monkeypatch):
    monkeypatch.setattr(stores, "PIECE", 10_000)
    data = bytes(range(256)) * 400
    s3.put("s3://acme/x.txt", data)
    s3.faults(match=r"GET /acme/x\.txt", cut_every=3)
    with stores.StoreFile("s3://acme/x.txt", len(data), PATIENT) as file:
        assert file.read() == data
    assert s3.faulty == 5 and s3.sent < 1.3 * len(data)


def test_ranges_that_lie_close_together_cost_one_request(s3):
    data = bytes(range(256)) * 4000
    s3.put("s3://acme/x.txt", data)
    with stores.StoreFile("s3://acme/x.txt", len(data), PATIENT) as file:
        file.load([(100, 200), (50_000, 60_000), (900_000, 900_100)])
        for start, stop in ((50_000, 60_000), (900_000, 900_100), (100, 200)):
            file.seek(start)
            assert file.read(stop - start) == data[start:stop]
    assert len(s3.requests) == 2


@pytest.mark.parametrize("fault", ["stall_every", "fail_every", "down"])
def test_a_store_that_stays_away_ends_the_run_with_one_line_in_bounded_time(bucket, fault):
    before = source(patience=IMPATIENT)
    bucket.faults(**{fault: 1})
    with pytest.raises(
        SourceError, match=r"^s3://acme/web/a/one\.parquet: .*attempts? in .*; rerun the same"
    ):
        texts_of(before)


def test_an_object_that_is_replaced_while_it_is_read_ends_the_run(bucket):
    before = source("s3://acme/web/a/two.jsonl")
    units = list(plan_units(before, unit_bytes=4000))
    assert list(read_unit(before, units[0]))
    changed = jsonl_bytes(TEXTS[101:201])
    bucket.put("s3://acme/web/a/two.jsonl", changed)
    with pytest.raises(SourceError, match=r"two\.jsonl: was written to .*; start again"):
        list(read_unit(before, units[1]))
    after = source("s3://acme/web/a/two.jsonl")
    files = before.description["files"]
    assert changed_files(files, after) == ["s3://acme/web/a/two.jsonl changed"]
    # The same content under another name is no change, as on a disk.
    bucket.put("s3://acme/else.jsonl", changed)
    elsewhere = source("s3://acme/else.jsonl")
    assert changed_files(after.description["files"], elsewhere) == []


# ---- servers of HTTP


@pytest.fixture
def server(tmp_path):
    """Files of a folder, with pages that link to them, for those who send me:hush."""
    seen = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_):
            pass

        def do_GET(self):
            seen.append(dict(self.headers))
            if self.headers.get("Authorization") == "Basic bWU6aHVzaA==":  # base64 of me:hush
                super().do_GET()
            else:
                self.send_error(401)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", tmp_path, seen
        server.shutdown()


def test_files_of_a_server_are_read_with_the_password_that_nobody_sees(server, monkeypatch):
    host, folder, seen = server
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (folder / "sub").mkdir()
    (folder / "a.jsonl").write_bytes(jsonl_bytes(TEXTS[:100]))
    (folder / "sub" / "b.txt").write_bytes("<|endoftext|>\n".join(TEXTS[100:]).encode())
    address = f"http://me:hush@{host}"
    single = source(f"{address}/a.jsonl?signature=hush", f"{address}/sub/b.txt")
    assert texts_of(single) == TEXTS
    assert texts_of(source(f"{address}/")) == TEXTS
    assert texts_of(source(f"{address}/*.jsonl")) == TEXTS[:100]
    assert single.files[0].path == f"http://{host}/a.jsonl"
    assert "hush" not in f"{single!r} {single.description} {single.name}"
    assert "hf_secret" not in str(seen)
    with pytest.raises(SourceError, match="HTTP 404") as error:
        source(f"{address}/nothing.txt?signature=hush")
    assert "hush" not in str(error.value)
    with pytest.raises(SourceError, match="HTTP 401") as error:
        source(f"http://you:hush@{host}/a.jsonl")
    assert "hush" not in str(error.value)


def test_a_file_that_its_server_replaces_ends_the_run(server, monkeypatch):
    host, folder, _ = server
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (folder / "a.txt").write_bytes(b"x" * 1000)
    before = source(f"http://me:hush@{host}/a.txt")
    (folder / "a.txt").write_bytes(b"y" * 1001)
    with pytest.raises(SourceError, match="has 1001 bytes, not the 1000"):
        texts_of(before)
    after = source(f"http://me:hush@{host}/a.txt")
    assert changed_files(before.description["files"], after)


# ---- the Hub


def test_files_of_a_dataset_are_pinned_to_their_commit(monkeypatch):
    files = {"data/b.jsonl": jsonl_bytes(TEXTS[:9]), "data/x/a.jsonl": jsonl_bytes(TEXTS[9:])}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LoopbackHub({"acme/web": {**files, "_x.txt": b"?"}}, token="hf_secret") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        for cached in (addresses._tree, addresses._repository):
            cached.cache_clear()
        found = source("hf://datasets/acme/web")
        commit = hub.commit("acme/web")
        assert [file.path for file in found.files] == [
            f"hf://datasets/acme/web@{commit}/data/b.jsonl",
            f"hf://datasets/acme/web@{commit}/data/x/a.jsonl",
        ]
        assert texts_of(found) == TEXTS
        assert texts_of(source("hf://datasets/acme/web@main/data/*.jsonl")) == TEXTS[:9]
        assert texts_of(source("hf://datasets/acme/web/data/x/")) == TEXTS[9:]
        again = documents.local_source([file.path for file in found.files], patience=PATIENT)
        assert again.description == found.description
        assert "hf_secret" not in repr(found) and hub.url not in repr(found)
        with pytest.raises(SourceError, match="no such file or folder in the dataset"):
            source("hf://datasets/acme/web/data/none.jsonl")
