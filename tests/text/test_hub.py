"""Datasets on a loopback Hub: which files, with what requests, and through which faults."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import LoopbackHub

from pretrain.text import ranges, remote
from pretrain.text.documents import (
    Patience,
    Position,
    SourceError,
    hub_source,
    local_source,
    plan_units,
    read_unit,
)
from pretrain.text.readers import blocks, parquet
from pretrain.tokens.estimate import estimate

# Short waits between attempts, and time for a busy machine; the other is for a Hub that does not
# come back.
PATIENT = Patience(
    read_seconds=0.4, give_up_seconds=60, first_wait_seconds=0.01, longest_wait_seconds=0.1
)
IMPATIENT = dataclasses.replace(PATIENT, give_up_seconds=1.5)
CARD = b"""---
configs:
- config_name: sample
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: default
  data_files:
  - {split: train, path: "data/*/*"}
  - {split: test, path: [held/a.parquet, "held/[b-c].parquet"]}
---
# A dataset
"""
TEXTS = [f"document {i} " + "déjà vu " * (i % 40) for i in range(600)]


def parquet_bytes(texts, **options):
    sink = pa.BufferOutputStream()
    table = pa.table(
        {
            "text": texts,
            "id": [f"<{t[:12]}>" for t in texts],
            "token_count": [len(t) for t in texts],
        }
    )
    pq.write_table(table, sink, **{"row_group_size": 20, **options})
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def repos():
    names = (
        "002_00000",
        "000_00000",
        "001_00000",
    )  # a listing is sorted, whatever order they were uploaded in
    parts = dict(zip(sorted(names), (TEXTS[:250], TEXTS[250:251], TEXTS[251:]), strict=True))
    files = {f"sample/10BT/{name}.parquet": parquet_bytes(parts[name]) for name in names}
    return {
        "acme/web": {
            "README.md": CARD,
            **files,
            "data/x/other.parquet": b"?",
            "held/a.parquet": b"?",
        }
    }


@pytest.fixture
def on_hub(monkeypatch):
    """Call with a running hub to make it the Hub of this process."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", os.devnull)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return lambda hub: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)


def web(**options):
    return hub_source("acme/web", **{"name": "sample", "patience": PATIENT, **options})


def texts_of(source, *, unit_bytes=4000, **options):
    units = plan_units(source, unit_bytes=unit_bytes, **options)
    return [
        text
        for unit in units
        for batch in read_unit(source, unit)
        for text in batch.texts.to_pylist()
    ]


# ---- which files


def repository(*paths, **cards):
    return {
        **dict.fromkeys(paths, b"x"),
        **{name.replace("_", "."): text for name, text in cards.items()},
    }


FORMS = b"""---
configs:
- {config_name: a, data_files: 'x/**'}
- {config_name: b, data_files: ['y/1.jsonl', 'y/2*.jsonl']}
- {config_name: c, data_files: [{split: train, path: 'x/deep/*.jsonl'},
   {split: dev, path: [y/1.jsonl]}]}
- {config_name: d, data_dir: y, default: true}
---
"""
SHAPES = {
    "acme/configs": repository(
        "sample/10BT/b.parquet",
        "sample/10BT/a.parquet",
        "sample/10BT/.hidden.parquet",
        "sample/10BT/deeper/x.parquet",
        "data/CC-1/z.parquet",
        "data/CC-0/y.parquet",
        "data/top.parquet",
        "held/a.parquet",
        "held/b.parquet",
        "held/d.parquet",
        README_md=CARD,
    ),
    "acme/bare": repository("train-00000.parquet", "train-00001.parquet", "test-00000.parquet"),
    "acme/folders": repository(
        "data/train/a-b/1.jsonl",
        "data/train/a/2.jsonl",
        "data/train/a.jsonl",
        "data/validation/v.jsonl",
    ),
    "acme/one": repository("corpus.jsonl.gz", "LICENSE.txt", README_md=b"no front matter"),
    "acme/forms": repository(
        "x/3.jsonl",
        "x/deep/1.jsonl",
        "x/deep/er/2.jsonl",
        "y/1.jsonl",
        "y/22.jsonl",
        "y/2.jsonl",
        "z.jsonl",
        README_md=FORMS,
    ),
    "acme/yaml": repository(
        "other/a.txt",
        "sample/10BT/a.parquet",
        README_md=CARD,
        _huggingface_yaml=b"configs:\n- {config_name: sample, data_files: 'other/*.txt'}\n",
    ),
}
ASKED = [
    ("acme/configs", "sample"),
    ("acme/configs", "default"),
    ("acme/configs", None),
    ("acme/bare", None),
    ("acme/folders", None),
    ("acme/one", None),
    ("acme/forms", "a"),
    ("acme/forms", "b"),
    ("acme/forms", "c"),
    ("acme/forms", "d"),
    ("acme/forms", None),
    ("acme/yaml", "sample"),
]
ASK_DATASETS = """
import json, sys, datasets, huggingface_hub
def files(repo, name):
    huggingface_hub.HfFileSystem.clear_instance_cache()
    builder = datasets.load_dataset_builder(repo, name)
    splits = builder.config.data_files.items()
    paths = {str(split): [f.split("@")[1] for f in files] for split, files in splits}
    return builder.config.name, paths
print(json.dumps([files(*asked) for asked in json.loads(sys.argv[1])]))
"""


def test_files_are_those_that_datasets_itself_resolves(on_hub, tmp_path):
    with LoopbackHub(SHAPES) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", ASK_DATASETS, json.dumps(ASKED)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        on_hub(hub)
        for (repo, name), (config, splits) in zip(ASKED, json.loads(done.stdout), strict=True):
            for split, paths in splits.items():
                source = hub_source(repo, name=name, split=split, patience=PATIENT)
                assert [f"{hub.commit(repo)}/{f.path}" for f in source.files] == paths, (
                    repo,
                    name,
                    split,
                )
                assert source.description["config"] == config


def test_a_sample_of_a_huge_dataset_is_found_without_listing_all_of_it(on_hub):
    files = {f"data/CC-{i}/{j}.parquet": b"x" for i in range(20) for j in range(5)}
    with LoopbackHub(
        {"acme/web": {"README.md": CARD, "sample/10BT/a.parquet": b"x", **files}}
    ) as hub:
        on_hub(hub)
        assert [f.path for f in web().files] == ["sample/10BT/a.parquet"]
        assert len(hub.requests) == 4  # commit, two cards, one folder


def test_a_source_records_the_commit_and_no_secret(on_hub, repos, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LoopbackHub(repos, token="hf_secret") as hub:
        on_hub(hub)
        source = web()
        assert source.name == "web-sample"
        assert source.description["commit"] == hub.commit("acme/web")
        assert web(revision=hub.commit("acme/web")).description == source.description
        listed = source.description["files"][0]
        assert listed["path"] == "sample/10BT/000_00000.parquet"
        assert listed["size"] == len(repos["acme/web"][listed["path"]])
        assert len(listed["sha256"]) == 64
        assert "hf_secret" not in repr(source)
        assert hub.url not in json.dumps(source.description)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "sampel"}, "has no configuration 'sampel'; choose --name from sample, default"),
        ({"split": "validation"}, "has no split 'validation'; choose --split from train"),
        ({"revision": "v2"}, "has no revision 'v2'; check --revision"),
        (
            {"dataset": "acme/nothing"},
            "is not on http://127.0.0.1:.* or is private; check --dataset, or log in",
        ),
        ({"dataset": "not a name"}, "'not a name' is not the name of a dataset"),
        (
            {"dataset": "acme/table"},
            "t.csv cannot be read; its files have to be .parquet, .jsonl or .txt",
        ),
        ({"dataset": "acme/choice"}, "has several configurations; choose --name from en, de"),
        (
            {"dataset": "acme/escape", "name": "x"},
            "its card names .*, which is not in its repository",
        ),
        ({"dataset": "acme/empty"}, "dataset acme/empty: "),
    ],
)
def test_a_wrong_name_is_answered_at_once_with_the_way_out(on_hub, repos, tmp_path, asked, message):
    (tmp_path / "secret.txt").write_text("x")
    choice = (
        b"---\nconfigs:\n"
        b"- {config_name: en, data_files: a.txt}\n- {config_name: de, data_files: b.txt}\n---\n"
    )
    secret = f"{tmp_path.as_posix()}/secret.txt"
    escape = f"---\nconfigs:\n- {{config_name: x, data_files: '{secret}'}}\n---\n".encode()
    more = {
        "acme/table": {"t.csv": b"text\na\n"},
        "acme/choice": {"README.md": choice, "a.txt": b"x", "b.txt": b"x"},
        "acme/escape": {"README.md": escape, "a.txt": b"x"},
        "acme/empty": {"README.md": b"nothing else"},
    }
    with LoopbackHub({**repos, **more}) as hub:
        on_hub(hub)
        name = {"name": "sample"} if "dataset" not in asked else {}
        with pytest.raises(SourceError, match=message) as error:
            hub_source(**{"dataset": "acme/web", "patience": PATIENT, **name, **asked})
        assert "\n" not in str(error.value)


def test_what_may_not_be_read_says_how_to_log_in(on_hub, repos, monkeypatch):
    with LoopbackHub(repos, token="right", gated=True) as hub:
        on_hub(hub)
        for token in ("", "wrong"):
            monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(
                SourceError, match=r"is gated: ask for access at .*/datasets/acme/web, then log in"
            ):
                web()
        monkeypatch.setenv("HF_TOKEN", "right")
        assert texts_of(web()) == TEXTS


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://127.0.0.1", "http://"])
def test_an_endpoint_that_is_no_address_is_answered_at_once(on_hub, monkeypatch, endpoint):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(SourceError, match="check HF_ENDPOINT"):
        web()


def test_offline_mode_is_not_waited_for(on_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        web()


# ---- with which requests


def test_only_the_text_and_its_token_counts_are_fetched(on_hub):
    """Beside them is a column that is far larger, and must stay where it is."""
    texts = [os.urandom(3000).hex() for _ in range(60)]
    noise = [os.urandom(30_000) for _ in range(60)]
    sink = pa.BufferOutputStream()
    table = pa.table({"noise": noise, "text": texts, "more": noise, "token_count": list(range(60))})
    pq.write_table(table, sink, row_group_size=20, use_dictionary=False)
    content = sink.getvalue().to_pybytes()
    with LoopbackHub({"acme/fat": {"train.parquet": content}}) as hub:
        on_hub(hub)
        source = hub_source("acme/fat", patience=PATIENT)
        assert texts_of(source, unit_bytes=1 << 30) == texts
        sent = [
            r.bytes_sent
            for r in hub.requests
            if "/resolve/" in r.path and r.path.endswith(".parquet")
        ]
    metadata = pq.ParquetFile(pa.BufferReader(content)).metadata
    wanted = sum(
        metadata.row_group(g).column(c).total_compressed_size for g in range(3) for c in (1, 3)
    )
    assert wanted <= sum(sent) < wanted + 100_000  # and the footer
    assert sum(sent) < len(content) / 5


def test_a_unit_costs_one_request(on_hub, repos):
    with LoopbackHub(repos) as hub:
        on_hub(hub)
        source = web()
        (unit, *_) = plan_units(source, unit_bytes=1 << 30)
        list(read_unit(source, unit))
        before = len(hub.requests)
        list(read_unit(source, unit))
        assert len(hub.requests) == before + 1


def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(on_hub, repos, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LoopbackHub(repos, token="hf_secret", link_uses=2) as hub:
        on_hub(hub)
        assert texts_of(web()) == TEXTS
        assert {r.host.split(":")[0] for r in hub.requests} == {"127.0.0.1", "localhost"}
        assert all(
            r.token == ("hf_secret" if r.host.startswith("127") else None) for r in hub.requests
        )


def test_a_link_is_used_again_until_it_expires(on_hub, repos):
    with LoopbackHub(repos, link_uses=3) as hub:
        on_hub(hub)
        source = web()
        with remote.RemoteFile(source.files[0].url, source.files[0].size, PATIENT) as file:
            for at in (0, 9000, 4000, 100, 5000):
                file.seek(at)
                assert file.read(7) == hub.repos["acme/web"][source.files[0].path][at : at + 7]
        assert list(hub.links.values()) == [4, 2]  # the fourth use was refused


# ---- through which faults

FAULTS = [
    {"fail_every": 2},
    {"fail_every": 3, "scope": "all", "status": 500},
    {"fail_every": 2, "scope": "all", "status": 429, "retry_after": 0},
    {"fail_every": 3, "status": 429, "retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"},
    {"cut_every": 1},
    {"cut_every": 2, "scope": "all"},
    {"stall_every": 5, "scope": "all"},
    {"link_uses": 1},
    {"link_uses": 2, "cut_every": 3},
    {"ranges": False, "cut_every": 4},
]


@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_documents_are_the_same_through_faults(on_hub, repos, faults):
    with LoopbackHub(repos, **faults) as hub:
        on_hub(hub)
        source = web()
        batches = [
            batch
            for unit in plan_units(source, unit_bytes=4000)
            for batch in read_unit(source, unit)
        ]
        assert [text for batch in batches for text in batch.texts.to_pylist()] == TEXTS
        assert hub.faults >= 2 or "link_uses" in faults
        counts = [batch.token_counts for batch in batches]
        assert np.concatenate(counts).tolist() == [len(text) for text in TEXTS]


def test_a_column_chunk_too_large_to_hold_is_streamed_through_faults(on_hub, monkeypatch):
    monkeypatch.setattr(parquet, "LOAD_BYTES", 10_000)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 50_000)
    monkeypatch.setattr(parquet, "READ_BYTES", 30_000)
    monkeypatch.setattr(ranges, "BLOCK", 5000)
    texts = [os.urandom(700).hex() for _ in range(500)]
    content = parquet_bytes(
        texts, row_group_size=500, data_page_size=20_000, write_batch_size=10, use_dictionary=False
    )
    with LoopbackHub({"acme/big": {"train.parquet": content}}, cut_every=1) as hub:
        on_hub(hub)
        source = hub_source("acme/big", patience=PATIENT)
        (unit,) = plan_units(source, unit_bytes=1)
        read, sizes = remote.RemoteFile.read, []
        monkeypatch.setattr(
            remote.RemoteFile, "read", lambda file, n: sizes.append(n) or read(file, n)
        )
        batches = list(read_unit(source, unit))
        assert [t for b in batches for t in b.texts.to_pylist()] == texts
        assert len(batches) > 5
        assert max(sizes) < 60_000
        assert hub.faults > 3


@pytest.mark.parametrize(
    "name", ["corpus.jsonl", "corpus.txt", "corpus.jsonl.gz", "corpus.txt.zst"]
)
def test_text_files_on_the_hub_are_read_like_local_ones(on_hub, tmp_path, monkeypatch, name):
    monkeypatch.setattr(blocks, "BLOCK", 3000)
    monkeypatch.setattr(blocks, "OVERRUN", 100)
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    data = (lines if "jsonl" in name else "\n<|endoftext|>\n".join(TEXTS)).encode()
    data = gzip.compress(data) if name.endswith("gz") else data
    data = pa.compress(data, "zstd", asbytes=True) if name.endswith("zst") else data
    (tmp_path / name).write_bytes(data)
    expected = texts_of(local_source([tmp_path / name]))
    assert len(expected) == len(TEXTS)
    with LoopbackHub({"acme/text": {name: data}}, cut_every=3) as hub:
        on_hub(hub)
        source = hub_source("acme/text", patience=PATIENT)
        assert texts_of(source, unit_bytes=5000) == expected
        bytes_sent = sum(r.bytes_sent for r in hub.requests if r.path.endswith(name))
        assert hub.faults >= 2 or "." in name[:-4]
        assert bytes_sent < 1.3 * len(data) + 2000


@pytest.mark.parametrize(
    "gone", [{"down_after": 0, "scope": "all"}, {"fail_every": 1, "scope": "all"}], ids=str
)
def test_a_hub_that_is_gone_ends_the_search_for_files_in_bounded_time(on_hub, repos, gone):
    with LoopbackHub(repos, **gone) as hub:
        on_hub(hub)
        with pytest.raises(
            SourceError, match=r"dataset acme/web on http.*attempts in .*; rerun the same command"
        ):
            web(patience=IMPATIENT)
        assert len(hub.requests) > 3


@pytest.mark.parametrize("fault", ["down_after", "fail_every", "stall_every"])
def test_a_hub_that_goes_while_reading_ends_the_run_and_a_rerun_continues(on_hub, repos, fault):
    with LoopbackHub(repos) as hub:
        on_hub(hub)
        source = web()
        expected, done = texts_of(source), []
        source = dataclasses.replace(source, patience=IMPATIENT)
        with pytest.raises(
            SourceError, match=r"00\d_00000.parquet: .*; rerun the same command later to continue"
        ):
            for unit in plan_units(source, unit_bytes=4000):
                for batch in read_unit(source, unit):
                    done += [
                        (unit, row, text)
                        for row, text in zip(batch.rows, batch.texts.to_pylist(), strict=True)
                    ]
                    if len(done) > 300:
                        setattr(hub, fault, 1)
        assert [text for *_, text in done] == expected[: len(done)]
        assert len(done) < len(expected)
        hub.down_after, hub.fail_every, hub.stall_every = None, 0, 0
        unit, row, _ = done[-1]
        position = Position(unit.file, unit.first_row + int(row) + 1)
        again = web()
        assert again.description == source.description
        rest = []
        for i, unit in enumerate(plan_units(again, unit_bytes=4000, resume=position)):
            skip = position.row - unit.first_row if i == 0 and unit.file == position.file else 0
            for batch in read_unit(again, unit, skip_rows=skip):
                rest += batch.texts.to_pylist()
        assert rest == expected[len(done) :]


def test_a_file_that_is_not_the_one_listed_is_an_error(on_hub, repos):
    with LoopbackHub(repos) as hub:
        on_hub(hub)
        source = web()
        commit = hub.commit("acme/web")
        hub.commit = lambda repo: commit
        hub.repos = {"acme/web": {**repos["acme/web"], source.files[0].path: b"PAR1" * 100}}
        with pytest.raises(
            SourceError, match=r"000_00000.parquet: has 400 bytes, not the \d+ that were listed"
        ):
            texts_of(source)


def test_an_answer_that_is_no_hubs_is_not_taken_for_one(on_hub, repos):
    with LoopbackHub(repos, scope="all", fail_every=1, status=200) as hub:  # a login page, say
        on_hub(hub)
        with pytest.raises(SourceError, match="not the Hub's; check HF_ENDPOINT"):
            web()


def test_the_time_that_the_reader_takes_is_not_the_networks(on_hub, repos):
    """A response can be left open for as long as shards are written; its fault then is the first
    one."""
    with LoopbackHub(repos) as hub:
        on_hub(hub)
        listed = web().files[0]
        hub.stall_every = 1
        with remote.RemoteFile(listed.url, listed.size, IMPATIENT) as file:
            file.expect([(0, listed.size)])
            start = file.read(10)
            time.sleep(IMPATIENT.give_up_seconds + 0.1)
            hub.stall_every = 0
            assert start + file.read() == hub.repos["acme/web"][listed.path]


def test_a_pause_that_the_server_asks_for_is_kept_within_reason(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    waiting = ranges.Waiting("x", Patience(give_up_seconds=60, rate_limit_seconds=200))
    waiting.after(ranges.Fault("HTTP 429", retry_after=90))  # longer than it would wait by itself
    assert slept == [90]
    waiting.start()
    slept.clear()
    with pytest.raises(SourceError, match="asks for a pause of 30 s"):
        while True:
            waiting.after(ranges.Fault("HTTP 429", retry_after=30))
    assert slept == [30] * 6
    waiting.start()
    with pytest.raises(SourceError, match="1 attempt in 0 s"):
        waiting.after(ranges.Fault("HTTP 429", retry_after=300))


def test_waits_grow_with_jitter_and_end(monkeypatch):
    now, slept = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    patience = Patience()
    waiting = ranges.Waiting("x", patience)
    with pytest.raises(SourceError):
        while True:
            waiting.after(ranges.Fault("HTTP 503"))
    bounds = [
        min(patience.longest_wait_seconds, patience.first_wait_seconds * 2**i)
        for i in range(len(slept))
    ]
    assert all(bound / 2 <= s <= bound for s, bound in zip(slept, bounds, strict=True))
    assert len({s / bound for s, bound in zip(slept, bounds, strict=True)}) > 1
    assert (
        patience.give_up_seconds - patience.longest_wait_seconds
        < now[0]
        <= patience.give_up_seconds
    )


# ---- workers


def read_in_worker(source, unit, queue):
    texts = [text for batch in read_unit(source, unit) for text in batch.texts.to_pylist()]
    queue.put((texts, {"datasets", "torch", "huggingface_hub.hf_api"} & set(sys.modules)))


def test_a_spawned_worker_reads_a_unit_with_the_token_and_without_datasets(
    on_hub, repos, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LoopbackHub(repos, token="hf_secret", fail_every=2) as hub:
        on_hub(hub)
        source = web()
        (unit, *_) = plan_units(source, unit_bytes=1 << 30)
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        worker = spawn.Process(target=read_in_worker, args=(source, unit, queue))
        worker.start()
        texts, heavy = queue.get(timeout=60)
        worker.join()
    assert texts == TEXTS[:250]
    assert not heavy


def test_an_estimate_of_a_dataset_reads_one_footer_and_one_unit(on_hub, repos):
    with LoopbackHub(repos) as hub:
        on_hub(hub)
        source = web()
        before = len(hub.requests)
        found = estimate(source, lambda texts: sum(map(len, texts.to_pylist())))
        assert not found.rows_exact
        assert 100 < found.rows < 1200
        assert found.tokens > 0
        asked = {r.path.rpartition("/")[2] for r in hub.requests[before:]}
        assert asked == {f.path.rpartition("/")[2] for f in source.files[:1]} or len(asked) <= 3
