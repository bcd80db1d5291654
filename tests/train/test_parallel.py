"""Sharded training on two ranks beside whole models on each. Two real processes over gloo make all
runs, one after the other; the tests look at what those left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from free_port import free_port
from tiny_runs import flags, logged, write_shards

import hellaswag
import train_gpt2
from pretrain.hardware import compiler_problem

ROOT = Path(__file__).parents[2]
ITEMS = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
SETTINGS = {"n_layer": 2, "n_embd": 16, "dropout": 0.1, "eval_interval": 4, "eval_iters": 2}
SETTINGS |= {"max_iters": 8, "lr_decay_iters": 8, "device": "cpu", "compile": False}
SCORED = {"hellaswag_data": ITEMS, "hellaswag_limit": 4, "sample_tokens": 3}
QUIET = {"hellaswag": False, "sample_interval": 0}
SHORT = QUIET | {"max_iters": 4}
MUON = SHORT | {"optimizer": "muon", "n_embd": 32, "learning_rate": 0.02}
MODERN = MUON | {"model": "modern", "n_head": 2}
# Few tokens: a CPU takes 20 times as long for a head of 16 bits.
HALF = SHORT | {"dtype": "bfloat16", "dropout": 0, "batch_size": 1, "block_size": 8}
FSDP, DDP = {"parallel": "fsdp"}, {"parallel": "ddp"}
# The folder of a run, and what differs from SETTINGS. A folder that comes again goes on.
RUNS = [
    ("ddp", DDP | SCORED),
    ("fsdp", FSDP | SCORED),
    ("interrupted", FSDP | QUIET | {"max_iters": 4}),
    ("interrupted", FSDP | QUIET),
    ("from_ddp", FSDP | QUIET | {"resume": "{root}/ddp/iter-4-*.pt"}),
    ("muon_ddp", MUON | DDP),
    ("muon_fsdp", MUON | FSDP | {"max_iters": 2}),
    ("muon_fsdp", MUON | FSDP),
    ("modern_ddp", MODERN | DDP),
    ("modern_fsdp", MODERN | FSDP),
    ("half_ddp", HALF | DDP),
    ("half_fsdp", HALF | FSDP),
    ("float16_fsdp", HALF | FSDP | {"dtype": "float16"}),
    ("spared", SHORT | FSDP | {"gradient_checkpointing": True, "reshard_after_forward": False}),
    ("init_from", SHORT | FSDP | {"max_iters": 1, "init_from": "{root}/ddp/final_model.pt"}),
    ("graphs", SHORT | FSDP | {"compile": True}),
    # Last, since a process that ends with an error leaves no group of processes.
    ("not_finite", SHORT | FSDP),
]
RANK = """
import functools, glob, json, os, sys
sys.path.insert(0, {root!r})
import torch
import train_gpt2
from torch._dynamo.utils import counters
from pretrain.train import stopping

weight = staticmethod(stopping.FiniteGuard.loss_weight)
infinite = staticmethod(lambda loss, steps: weight(loss * torch.inf, steps))
whole_compiler = torch.compile
only_graphs = functools.partial(torch.compile, backend="eager")
statuses, graphs = [], 0
for name, port, argv in json.loads({runs!r}):
    os.environ["MASTER_PORT"] = str(port)
    argv = [word for pattern in argv for word in (glob.glob(pattern) or [pattern])]
    is_broken = name == "not_finite" and os.environ["RANK"] == "1"
    stopping.FiniteGuard.loss_weight = infinite if is_broken else weight
    torch.compile = only_graphs if name in ("graphs", "compiled_fsdp") else whole_compiler
    statuses.append(train_gpt2.main(argv))
    if name == "graphs":
        graphs = counters["stats"]["unique_graphs"]
with open(os.path.join({folder!r}, os.environ["RANK"] + ".json"), "w") as file:
    json.dump([statuses, graphs], file)
    file.flush()
os._exit(0)
"""


def run_ranks(folder, runs, timeout):
    """The runs on two ranks: (exit statuses of the runs, graphs that were compiled) of each, and
    what they wrote to stderr."""
    folder.mkdir(exist_ok=True)
    listed = [
        (name, free_port(), [word.replace("{root}", str(folder)) for word in argv])
        for name, argv in runs
    ]
    code = RANK.format(root=str(ROOT), folder=str(folder), runs=json.dumps(listed))
    shared = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        forked.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0][0] == found[1][0], "ranks end alike"
    return *found[0], errors[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """The folder of RUNS, the exit status of each, what was compiled, and rank 0's stderr."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [(name, flags(data, folder / name, **SETTINGS | changes)) for name, changes in RUNS]
    statuses, graphs, errors = run_ranks(folder, runs, timeout=900)
    named = [(name, status) for (name, _), status in zip(RUNS, statuses, strict=True)]
    assert all(status == (name == "not_finite") for name, status in named), (named, errors)
    return folder, graphs, errors


def held(folder):
    return torch.load(folder / "final_model.pt", weights_only=True)


def assert_same_state(mine, theirs, tolerance=0.0):
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(mine["model"][name], weight, rtol=0, atol=tolerance)
    assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for number, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            found = mine["optimizer"]["state"][number][name]
            torch.testing.assert_close(found, value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        ("fsdp", "ddp", 1e-4),
        ("from_ddp", "ddp", 1e-4),
        ("muon_fsdp", "muon_ddp", 1e-4),
        ("modern_fsdp", "modern_ddp", 1e-4),
        ("half_fsdp", "half_ddp", 0.02),
        ("spared", "fsdp", 1e-4),
        ("graphs", "fsdp", 1e-3),
    ],
)
def test_losses_are_those_of_whole_models(ran, one, other, tolerance):
    for event, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "val_loss")):
        mine, theirs = (logged(ran[0] / folder, event, name) for folder in (one, other))
        both = sorted(mine.keys() & theirs.keys())
        assert both and (event == "eval" or len(both) == len(mine) >= 4)
        far = 10 * tolerance if name == "grad_norm" else tolerance
        assert [mine[n] for n in both] == pytest.approx([theirs[n] for n in both], abs=far), name


def test_a_sharded_run_saves_the_file_that_a_run_of_whole_models_saves(ran):
    mine, theirs = held(ran[0] / "fsdp"), held(ran[0] / "ddp")
    assert mine.keys() == theirs.keys() and mine["architecture"] == "gpt2"
    assert mine["model_source"] == theirs["model_source"] and "model.py" in mine["model_source"]
    assert_same_state(mine, theirs, tolerance=2e-3)


def test_scores_and_samples_are_those_of_whole_models(ran):
    def records(name, event):
        lines = (ran[0] / name / "metrics.jsonl").read_text().splitlines()
        return [r for line in lines if (r := json.loads(line))["event"] == event]

    for mine, theirs in zip(records("fsdp", "eval"), records("ddp", "eval"), strict=True):
        assert mine["tasks"]["hellaswag"]["n"] == 4
        for name in ("acc", "acc_norm"):
            assert mine["tasks"]["hellaswag"][name] == theirs["tasks"]["hellaswag"][name]
    texts = [[record["text"] for record in records(name, "sample")] for name in ("fsdp", "ddp")]
    assert len(texts[0]) == 2 and texts[0] == texts[1]


def test_an_interrupted_sharded_run_ends_as_an_uninterrupted_one_bit_for_bit(ran):
    assert_same_state(held(ran[0] / "interrupted"), held(ran[0] / "fsdp"))
    mine, theirs = (logged(ran[0] / name) for name in ("interrupted", "fsdp"))
    assert mine == theirs


def test_one_process_goes_on_from_a_sharded_run(ran, data):
    changes = QUIET | {"resume": next((ran[0] / "fsdp").glob("iter-4-*.pt"))}
    changes |= {"gradient_accumulation_steps": 4, "parallel": "fsdp"}
    assert train_gpt2.main(flags(data, ran[0] / "alone", **SETTINGS | changes)) == 0
    mine, theirs = (logged(ran[0] / name) for name in ("alone", "ddp"))
    assert len(mine) == 4 and mine == pytest.approx({n: theirs[n] for n in mine}, abs=1e-4)


def test_hellaswag_scores_a_sharded_runs_checkpoint_on_one_process(ran, tmp_path):
    output = tmp_path / "scores.json"
    words = ["--checkpoint", str(ran[0] / "fsdp" / "final_model.pt"), "--data", str(ITEMS)]
    words += ["--limit", "4", "--device", "cpu", "--dtype", "float32", "--output", str(output)]
    assert hellaswag.main(words) == 0
    last = (ran[0] / "fsdp" / "metrics.jsonl").read_text().splitlines()
    logged_score = [r for line in last if (r := json.loads(line))["event"] == "eval"][-1]
    text = output.read_text()
    assert json.loads(text)["acc_norm"] == logged_score["tasks"]["hellaswag"]["acc_norm"]


def test_a_sharded_run_begins_from_the_weights_of_another(ran):
    first = logged(ran[0] / "init_from", "eval", "val_loss")[0]
    assert first == pytest.approx(logged(ran[0] / "ddp", "eval", "val_loss")[8], abs=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_stops_a_sharded_run_before_the_update(ran):
    assert "error: step 0: loss nan on rank 1, gradient norm nan" in ran[2]


def test_float16_scales_its_gradients_when_sharded(ran):
    saved = held(ran[0] / "float16_fsdp")
    assert saved["scaler"]["scale"] >= 1 and saved["scaler"]["_growth_tracker"] >= 1
    losses = logged(ran[0] / "float16_fsdp")
    assert losses == pytest.approx(logged(ran[0] / "half_ddp"), abs=0.03)


def test_each_block_has_one_compiled_graph_and_evaluations_have_none(ran):
    assert ran[1] == SETTINGS["n_layer"]


@pytest.mark.slow
@pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_models_train_alike_on_two_ranks(data, tmp_path):
    """Whole models with the whole compiler, which takes two seconds for each of their kernels;
    sharded ones with the graphs alone: they are gathered outside of what is compiled. Without
    dropout, which the compiler draws otherwise."""
    plain = SHORT | {"dropout": 0, "n_layer": 1}
    compiled = plain | {"compile": True}
    runs = [("plain", plain | DDP)]
    runs += [("compiled_ddp", compiled | DDP), ("compiled_fsdp", compiled | FSDP)]
    argvs = [(name, flags(data, tmp_path / name, **SETTINGS | run)) for name, run in runs]
    statuses, _, errors = run_ranks(tmp_path, argvs, timeout=900)
    assert statuses == [0, 0, 0], errors
    expected = logged(tmp_path / "plain")
    for name, _ in runs[1:]:
        assert json.loads((tmp_path / name / "config.json").read_text())["compiled"] is True
        assert logged(tmp_path / name) == pytest.approx(expected, abs=1e-3), name
