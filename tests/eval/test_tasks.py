"""Tasks at evaluations: any file in HellaSwag's format, and HellaSwag whose file may come later."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import forked
import pytest
import torch
from free_port import free_port

from model import GPT, GPTConfig
from pretrain.distributed import Ranks
from pretrain.errors import UserError
from pretrain.eval import hellaswag as data
from pretrain.eval import tasks
from pretrain.eval.scoring import score_examples
from pretrain.eval.tasks import TASKS, HellaSwag, MultipleChoice, open_tasks, parse_tasks

ROOT = Path(__file__).parents[2]
ITEMS = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
ALONE = Ranks(0, 1, torch.device("cpu"))
LEFT_OUT = "warning: mine is left out: "


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8)).eval()


def score(task, model, ranks=ALONE):
    return task.score(model, dtype=torch.float32, ranks=ranks, interrupted=lambda: False)


def without_seconds(summary):
    return {key: value for key, value in summary.items() if key != "seconds"}


def test_any_file_in_hellaswags_format_is_a_task(model):
    expected = score_examples(model, data.load_examples(ITEMS, 7), style="lm-eval").summary()
    found = score(MultipleChoice("mine", ITEMS, 7, style="lm-eval"), model)
    assert without_seconds(found) == without_seconds(expected) and found["n"] == 7


def test_hellaswag_is_one_of_them_and_in_the_table(model):
    assert without_seconds(score(HellaSwag(ITEMS, 5), model)) == without_seconds(
        score(MultipleChoice("mine", ITEMS, 5), model)
    )
    assert TASKS["hellaswag"] is HellaSwag


def test_what_is_wrong_with_a_file_is_one_warning_and_no_reason_to_stop(model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"ctx": 1}\n')
    task = MultipleChoice("mine", bad)
    assert score(task, model) is None and score(task, model) is None
    err = capsys.readouterr().err
    assert err.count(LEFT_OUT) == 1 and "line 1" in err


def test_a_model_that_cannot_be_scored_is_one_warning_and_no_reason_to_stop(capsys):
    small = GPT(GPTConfig(block_size=8, vocab_size=99, n_layer=1, n_head=1, n_embd=8))
    assert score(MultipleChoice("mine", ITEMS), small) is None
    assert "vocabulary of 99" in capsys.readouterr().err


def test_a_download_goes_on_beside_training_and_is_scored_when_it_is_there(
    model, tmp_path, monkeypatch
):
    arrive, arrived = threading.Event(), threading.Event()
    monkeypatch.setenv("HELLASWAG_DIR", str(tmp_path))

    def slow():
        arrive.wait(60)
        (tmp_path / "hellaswag_val.jsonl").write_bytes(ITEMS.read_bytes())
        arrived.set()

    monkeypatch.setattr(tasks, "ensure_data", slow)
    task = HellaSwag(limit=4, wait_seconds=0.01)
    assert score(task, model) is None, "not there yet"
    arrive.set()
    assert arrived.wait(60)
    task._thread.join(60)
    assert score(task, model)["n"] == 4


def test_a_download_that_fails_is_said_once(model, monkeypatch, capsys):
    def no_network():
        raise data.DataUnavailable("no network")

    monkeypatch.setattr(tasks, "ensure_data", no_network)
    task = HellaSwag(wait_seconds=None)
    assert score(task, model) is None and score(task, model) is None
    assert capsys.readouterr().err.count("HellaSwag is left out: no network") == 1


def test_only_the_first_process_of_a_node_downloads(monkeypatch):
    monkeypatch.setattr(tasks, "ensure_data", lambda: pytest.fail("downloads"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    HellaSwag(wait_seconds=None)


def test_names_and_files_of_tasks_are_read_from_flags(model):
    wanted = parse_tasks([f"mine={ITEMS}", "hellaswag"])
    assert wanted == {"mine": str(ITEMS), "hellaswag": None}
    mine, _ = open_tasks({"mine": str(ITEMS), "hellaswag": str(ITEMS)}, 3)
    assert mine.name == "mine" and score(mine, model)["n"] == 3


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["trivia"], "trivia: give its file, trivia=trivia.jsonl"),
        (["a=nowhere.jsonl"], "a: nowhere.jsonl: no such file"),
        (["=x"], "is not NAME=FILE"),
        (["a/b=x"], "is not NAME=FILE"),
        (["hellaswag", f"hellaswag={ITEMS}"], "named twice"),
    ],
)
def test_words_that_name_no_task_are_a_user_error(words, problem):
    with pytest.raises(UserError, match=problem):
        parse_tasks(words)


TWO_NODES = """
import json, os, sys, torch
sys.path.insert(0, "{root}")
from model import GPT, GPTConfig
from pretrain.distributed import Ranks
from pretrain.eval import tasks
from pretrain.eval.scoring import score_examples
rank = int(os.environ["RANK"])
os.environ["HELLASWAG_DIR"] = "{folder}/node" + str(rank)
ranks = Ranks.start("cpu")
torch.manual_seed(0)
model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8)).eval()
passes = []
hidden = model.hidden_states
model.hidden_states = lambda *words: (passes.append(1), hidden(*words))[1]
def download():
    path = tasks.data_path()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(open("{items}", "rb").read())
tasks.ensure_data = download
options = dict(dtype=torch.float32, ranks=ranks, interrupted=lambda: False)
found = tasks.HellaSwag(limit=5, wait_seconds=None, batch_tokens=150).score(model, **options)
path = tasks.data_path()
if rank:
    path.write_bytes(path.read_bytes() + b"\\n")
other = tasks.MultipleChoice("mine", path).score(model, **options)
print(json.dumps([rank, len(passes), found, other]), flush=True)
ranks.stop()
"""


def test_each_node_reads_its_own_disk_and_all_make_the_same_passes(tmp_path, model):
    """Two ranks that are the first of their nodes each, with a folder each."""
    code = TWO_NODES.format(root=ROOT, folder=tmp_path, items=ITEMS)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        forked.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (_, passes, found, other), (_, more, same, none) = sorted(
        json.loads(out.splitlines()[-1]) for out, _ in outputs
    )
    assert passes == more > 1
    assert without_seconds(found) == without_seconds(same)
    expected = score_examples(model, data.load_examples(ITEMS, 5), batch_tokens=150).summary()
    assert without_seconds(found) == without_seconds(expected)
    assert other is none is None
    assert sum(err.count("not the same file on all nodes") for _, err in outputs) == 1
