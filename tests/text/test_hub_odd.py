"""Odd datasets, tokens and addresses of a loopback Hub: one line, and no secret in it."""

import io
import json
import logging
import os
import pickle
import time

import huggingface_hub.constants
import pytest
from loopback_hub import LoopbackHub

from pretrain.text import hub, remote
from pretrain.text.documents import Patience, SourceError, hub_source, plan_units, read_unit
from pretrain.text.download import DownloadError, fetch
from pretrain.text.source import File, Source

PATIENT = Patience(read_seconds=0.4, give_up_seconds=60, first_wait_seconds=0.01)
IMPATIENT = Patience(give_up_seconds=0.5, first_wait_seconds=0.01)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(i)}: &{chr(i)} [{', '.join(['*' + chr(i - 1)] * 10)}]\n" for i in range(98, 115)
)


def card(body):
    return f"---\n{body}\n---\n# A dataset\n".encode()


@pytest.fixture
def on_hub(monkeypatch):
    """Call with a running hub, and what stands before its host, to make it this process's Hub."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", os.devnull)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def use(running, before=""):
        url = running.url.replace("://", f"://{before}")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)

    return use


def texts_of(source):
    return [
        text
        for unit in plan_units(source, unit_bytes=1 << 20)
        for batch in read_unit(source, unit)
        for text in batch.texts.to_pylist()
    ]


# ---- datasets


@pytest.mark.parametrize("archive", ["data.zip", "train.tar.gz", "a/b.7z"])
def test_a_dataset_of_archives_says_what_to_do(on_hub, archive):
    with LoopbackHub({"acme/packed": {"README.md": b"x", archive: b"PK\x03\x04"}}) as running:
        on_hub(running)
        with pytest.raises(
            SourceError, match=rf"acme/packed: .*{archive}.*--source|{archive} cann"
        ):
            hub_source("acme/packed", patience=PATIENT)


NAMES = ["no", "yes", "off", "2024", "1.5", "2024-02-03", "null", "0x10", "nb"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "null"])
def test_a_configuration_is_called_as_it_is_written(on_hub, name):
    entries = "".join(
        f"- {{config_name: {each}, data_files: '{each}/*.txt'}}\n" for each in (name, "other")
    )
    files = {
        "README.md": card(f"configs:\n{entries}"),
        f"{name}/a.txt": b"in it",
        "other/b.txt": b"x",
    }
    with LoopbackHub({"acme/names": files}) as running:
        on_hub(running)
        source = hub_source("acme/names", name=name, patience=PATIENT)
        assert texts_of(source) == ["in it"]
        assert source.description["config"] == name
        with pytest.raises(SourceError, match=rf"choose --name from ({name}, other|other, {name})"):
            hub_source("acme/names", patience=PATIENT)


@pytest.mark.parametrize("path", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (BOMB, "its aliases repeat values"),
        ("configs: " + "[" * 1000, "nested more than 100 deep"),
        ("configs: [", "not YAML"),
        ("a: 2024-02-31", "not YAML"),
    ],
    ids=["bomb", "deep", "broken", "date"],
)
def test_a_hostile_card_ends_in_one_line_at_once(on_hub, path, body, what):
    data = card(body) if path == "README.md" else body.encode()
    with LoopbackHub({"acme/hostile": {path: data, "a.txt": b"x"}}) as running:
        on_hub(running)
        begun = time.monotonic()
        with pytest.raises(SourceError, match=f"dataset acme/hostile: its dataset card: .*{what}"):
            hub_source("acme/hostile", patience=PATIENT)
        assert time.monotonic() - begun < 20


def test_an_endless_answer_is_not_read_to_its_end(on_hub, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_ANSWER", 100_000)
    with LoopbackHub({"acme/long": {"README.md": b"x" * 3_000_000, "a.txt": b"x"}}) as running:
        on_hub(running)
        with pytest.raises(SourceError, match=r"README\.md: answers with more than 100,000 bytes"):
            hub_source("acme/long", patience=PATIENT)


def test_files_whose_names_are_patterns_are_read(on_hub):
    files = {"train[v2].txt": b"two", "README.md": b"nothing"}
    with LoopbackHub({"acme/brackets": files}) as running:
        on_hub(running)
        assert texts_of(hub_source("acme/brackets", patience=PATIENT)) == ["two"]


# ---- tokens


@pytest.mark.parametrize(
    "token", ['"hf_good"', "hf_good'", "hf_good\n", " \u201chf_good\u201d ", "`hf_good`"]
)
def test_quotes_and_line_breaks_around_a_token_are_none_of_it(on_hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with LoopbackHub({"acme/one": {"a.txt": b"text"}}, token="hf_good") as running:
        on_hub(running)
        assert texts_of(hub_source("acme/one", patience=PATIENT)) == ["text"]


@pytest.mark.parametrize(
    "token", ["hf_se cret", "hf_sec\u2019ret", "hf_sec\nret", "hf_sec\x7fret", "hf_sécret"]
)
def test_what_can_be_no_token_is_said_without_showing_it(on_hub, monkeypatch, token):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with LoopbackHub({"acme/one": {"a.txt": b"text"}}) as running:
        on_hub(running)
        with pytest.raises(SourceError, match="characters in it that no token has") as error:
            hub_source("acme/one", patience=PATIENT)
        assert "sec" not in str(error.value).replace("second", "") and not running.requests


# ---- passwords in addresses


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 403}, {"status": 200}, {"down_after": 0}]
)
@pytest.mark.parametrize("dataset", ["acme/one", "acme/none"])
def test_a_password_in_the_endpoint_is_never_shown(on_hub, fault, dataset, caplog, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    patience = Patience(give_up_seconds=12, first_wait_seconds=11, longest_wait_seconds=11)
    faults = {"fail_every": 1, "scope": "all", **fault}
    with LoopbackHub({"acme/one": {"a.txt": b"text"}}, **faults) as running:
        on_hub(running, "me:pa55word@")
        with caplog.at_level(logging.DEBUG, "pretrain"), pytest.raises(SourceError) as error:
            hub_source(dataset, patience=patience if fault.get("status") == 503 else IMPATIENT)
    assert "pa55word" not in str(error.value) + caplog.text
    assert "127.0.0.1" in str(error.value)


def test_a_source_that_came_by_a_password_does_not_show_it(on_hub):
    with LoopbackHub({"acme/one": {"a.txt": b"text"}}) as running:
        on_hub(running, "me:pa55word@")
        source = hub_source("acme/one", patience=PATIENT)
        assert texts_of(source) == ["text"]
        assert "pa55word" not in repr(source) + json.dumps(source.description)


def test_a_download_does_not_show_the_password_of_its_address(tmp_path):
    with pytest.raises(DownloadError) as error:
        fetch(
            "http://me:pa55word@127.0.0.1:9/x.jsonl?sig=pa55word",
            tmp_path / "x",
            patience=IMPATIENT,
        )
    assert "pa55word" not in str(error.value) and "127.0.0.1" in str(error.value)
    left = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "pa55word" not in left


# ---- errors on their way


def test_errors_come_out_of_a_worker_as_they_went_in():
    for error in (SourceError("a"), remote.Refused("b", 404, "EntryNotFound"), DownloadError("c")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_foreign_file_on_the_hub_is_named(on_hub):
    files = {"train.txt": b"PK\x03\x04" + b"\0" * 3000}
    with LoopbackHub({"acme/odd": files}) as running:
        on_hub(running)
        source = hub_source("acme/odd", patience=PATIENT)
        with pytest.raises(SourceError, match=r"train\.txt: is a zip archive, not text"):
            texts_of(source)


def test_a_source_and_its_files_are_picklable():
    file = File("a.txt", 3, "txt", mtime_ns=5)
    source = Source("x", (file,), "text", {"kind": "local", "files": []})
    stream = io.BytesIO(pickle.dumps(source))
    assert pickle.load(stream) == source
