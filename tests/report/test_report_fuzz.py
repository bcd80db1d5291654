"""The report of logs that no program of ours wrote: a valid page or a RunError, soon."""

import contextlib
import dataclasses
import json

import pytest
from fuzzing import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_report import Elements, healthy_run, write_run

from pretrain.report import __main__ as report
from pretrain.report.compare import compare, to_csv, to_markdown
from pretrain.report.findings import find
from pretrain.report.page import html_page, key_figures
from pretrain.report.plots import plots
from pretrain.report.runs import Run, RunError

ODD_NUMBERS = st.sampled_from(
    [
        *(0, -1, 1, True, 1e308, -1e308, 5e-324, 10**400, -(10**400), 2**63, 1.5, 1e18),
        *("nan", "inf", "-inf", "7", "", "\ud800", None, [], {}, [[1]], {"a": {"b": 1}}),
    ]
)
ODD = ODD_NUMBERS | st.floats() | st.text(max_size=8) | st.integers()
NESTED = st.recursive(
    ODD, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)
FIELDS = st.sampled_from(
    [
        "event",
        "time",
        "step",
        "loss",
        "val_loss",
        "train_loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "perplexity",
        "accuracy",
        "bits_per_byte",
        "hellaswag",
        "tasks",
        "sources",
        "prompt",
        "text",
        "texts",
        "reason",
        "flags",
    ]
)
EVENTS = st.sampled_from(["start", "train", "eval", "sample", "stop", "else"])
SCORES = st.dictionaries(
    st.sampled_from(["style", "n", "acc", "acc_norm", "acc_norm_stderr", "truncated"]), ODD
)
RECORDS = st.fixed_dictionaries(
    {"event": EVENTS | ODD},
    optional={
        "time": ODD,
        "step": st.integers(0, 99) | ODD,
        "hellaswag": SCORES | NESTED,
        "tasks": st.dictionaries(st.text(max_size=5), SCORES) | NESTED,
    },
)
MUTATIONS = st.lists(st.tuples(st.integers(0, 70), FIELDS, NESTED), max_size=12)
HEALTHY = healthy_run(60)


def odd_log(folder, mutations, more, torn):
    """A healthy log of which some fields are others, with records and bytes of no sense in it."""
    records = [dict(record) for record in HEALTHY]
    for at, field, value in mutations:
        records[at % len(records)][field] = value
    lines = [json.dumps(record) for record in [*records, *more]]
    lines.insert(len(lines) // 2, "[" * 5000)
    folder.mkdir(exist_ok=True)
    data = "\n".join(lines).encode() + b"\n" + torn
    (folder / "metrics.jsonl").write_bytes(data)
    return folder


@fuzz(150)
@given(MUTATIONS, st.lists(RECORDS, max_size=6), st.binary(max_size=20), NESTED)
def test_any_log_and_any_config_give_a_valid_page_soon(tmp_path_factory, odd, more, torn, config):
    folder = odd_log(tmp_path_factory.getbasetemp() / "odd", odd, more, torn)
    (folder / "config.json").write_text(json.dumps(config))
    with bounded():
        run = Run.load(folder)
        other = dataclasses.replace(run)
        found = [(run, finding) for finding in find(run)]
        key_figures(run)
        for runs in ([run], [run, other]):
            page = html_page(runs, found, []).encode("utf-8", "replace").decode()
            assert Elements(page).open == []
        table = compare([run, other])
        assert to_csv(table) and to_markdown(table)


@fuzz(3, cost=50)
@given(MUTATIONS, st.lists(RECORDS, max_size=6))
def test_any_log_can_be_drawn(tmp_path_factory, odd, more):
    run = Run.load(odd_log(tmp_path_factory.getbasetemp() / "drawn", odd, more, b""))
    with bounded():
        for plot in plots([run]):
            plot.figure.canvas.draw()


@fuzz(150)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_run_or_a_run_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(data)
    with contextlib.suppress(RunError), bounded():
        html_page([Run.load(folder)], [], [])


STEP = {"event": "train", "step": 5, "time": 1.0, "loss": 3.0}


@pytest.mark.parametrize(
    "records",
    [
        [STEP | {"time": 1e18}],  # beyond every calendar
        [STEP | {"loss": 10**400}],
        [STEP | {"step": 10**30}, STEP],
        [STEP | {"step": -3}, STEP],
        [STEP, {"event": "eval", "step": 5, "val_loss": 2.0, "tasks": [1], "hellaswag": "?"}],
        [STEP, {"event": "eval", "step": 5, "val_loss": 2.0, "tasks": 0}],
        [STEP | {"sources": 1}, {"event": "eval", "step": 5, "val_loss": 2.0, "sources": 7}],
        [STEP, {"event": "sample", "step": 5, "prompt": "\ud800", "text": "\udfff"}],
        [STEP, {"event": "sample", "step": 5, "text": {"not": "text"}}],
        [STEP, {"event": "stop", "reason": {"a": "\ud800"}}],
        [{"event": "start", "flags": {"deep": [[[["\ud800"]]]], "big": 10**300}}, STEP],
        [STEP | {"event": ["train"]}, STEP],
        [STEP | {"step": True, "tokens_per_second": -1e308, "mfu": 1e308}, STEP],
    ],
)
def test_an_odd_log_is_a_page_and_no_traceback(tmp_path, records):
    folder = write_run(tmp_path / "run", records)
    assert report.main([str(folder)]) == 0
    assert Elements((folder / "report.html").read_text(encoding="utf-8")).open == []


def test_settings_nested_beyond_the_readers_depth_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", HEALTHY[:5])
    (folder / "config.json").write_text('{"a":' * 100_000)
    assert Run.load(folder).config["flags.max_iters"] == 600


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match="not a file"):
        Run.load(tmp_path)


def test_a_log_that_cannot_be_read_is_named_once(tmp_path, monkeypatch):
    write_run(tmp_path, HEALTHY[:5])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pretrain.report.runs.read_log", refuse)
    with pytest.raises(RunError) as error:
        Run.load(tmp_path)
    assert str(error.value) == f"{tmp_path}/metrics.jsonl: Permission denied"


def test_a_page_that_cannot_be_written_is_called_as_its_user_calls_it(tmp_path, capsys):
    folder = write_run(tmp_path / "run", HEALTHY[:5])
    assert report.main([str(folder), "--output", "/proc/x.html"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: /proc/x") and ".tmp" not in error and ".new" not in error


def test_a_configuration_of_a_million_settings_is_cut(tmp_path):
    many = {f"k{i}": {"v": i} for i in range(100_000)}
    folder = write_run(tmp_path / "run", HEALTHY[:5], **many)
    assert len(html_page([Run.load(folder)], [], [])) < 1_000_000
