import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.report import __main__ as report
from pretrain.report.console import Console
from pretrain.report.lines import eval_line, train_line
from pretrain.report.runlog import RunLog, scores_block
from pretrain.report.trackers import numbers

ROOT = Path(__file__).parents[2]
EVAL = {"step": 5, "val_loss": 3.2, "train_loss": 3.2, "perplexity": 24.5, "accuracy": 0.38}
MINE = {"style": "completion", "n": 12, "acc": 0.5, "acc_norm": 0.25, "truncated": 0}


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [Gone(), io.StringIO()])
def test_a_stdout_that_has_gone_ends_the_lines_and_not_the_run(stream, monkeypatch):
    if not isinstance(stream, Gone):
        stream.close()  # `>&-`, or a terminal that was closed
    console = Console(10, 0)
    monkeypatch.setattr(sys, "stdout", stream)
    console.say("step 1")
    console.sample({"step": 2, "prompt": "a", "text": "b"})
    console.close()
    assert not console.enabled


def test_a_run_goes_on_behind_a_head_that_has_seen_enough():
    code = (
        "from pretrain.report.console import Console\n"
        "import sys\n"
        "console = Console(99, 0)\n"
        "for i in range(20_000): console.say(f'step {i} ' + 'x' * 99)\n"
        "console.close(); print('more'); print('whole', file=sys.stderr)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(b"step 0 ")
        process.stdout.close()
        assert process.stderr.read() == b"whole\n"
        assert process.wait() == 0


def test_a_narrow_stdout_shows_what_it_can(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    console = Console(10, 0)
    monkeypatch.setattr(sys, "stdout", narrow)
    console.sample({"step": 2, "prompt": "Müller", "text": " 日本 \N{OWL}"})
    narrow.flush()
    assert narrow.buffer.getvalue().decode("cp1252") == "step  2/10 | Müller ?? ?\n"
    assert console.enabled


def test_the_evaluation_line_names_every_task_and_says_how_many_contexts_were_cut():
    line = eval_line(EVAL | {"tasks": {"hellaswag": MINE, "mine": MINE | {"truncated": 7}}}, 10)
    assert "hellaswag 25.0% (12)" in line and "mine 25.0% (12, 7 contexts cut)" in line


def test_the_table_of_an_evaluation_names_every_task_and_its_cut_contexts():
    scores = {"val": {"loss": 800.0, "accuracy": 0.1, "tokens": 9, "bits_per_byte": 1.25}}
    block = scores_block(scores, {"hellaswag": MINE, "mine": MINE | {"truncated": 7}})
    assert "perplexity inf" in block, "beyond what math.exp takes"
    assert "bits per byte 1.2500" in block
    assert "HellaSwag  acc 0.5000" in block and "mine  acc 0.5000" in block
    assert "7 endings had their context cut" in block


TRAIN = {
    "step": 10,
    "loss": 3.25,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "mfu": 0.41,
    "tokens_per_second": 1_234_567.0,
    "milliseconds_per_step": 9.5,
    "memory_bytes": 10**9,
}


@pytest.mark.parametrize("max_iters", [20, 500, 5000, 600_000])
@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_window_of_80_columns_or_more_breaks_a_number(max_iters, width):
    tasks = {"tasks": {"hellaswag": MINE, "mine": MINE | {"n": 10042, "truncated": 7}}}
    for line in (
        train_line(TRAIN, max_iters, "3 min 20 s, 5 h 12 min left", columns=width),
        eval_line(EVAL | tasks | {"bits_per_byte": 1.25}, max_iters, columns=width),
    ):
        fields = [field.strip() for field in line.split(" | ")]
        rows = [line[i : i + width] for i in range(0, len(line), width)]
        shown = [field.strip() for row in rows for field in row.strip(" |").split(" | ")]
        assert len(rows) > 1 and shown == fields


def test_an_evaluation_says_what_its_accuracy_is_of_and_its_bits_per_byte():
    line = eval_line(EVAL | {"bits_per_byte": 1.25}, 10)
    assert "| token accuracy 38.0%" in line and "| bits per byte 1.2500" in line


def test_a_log_that_is_no_terminal_has_elapsed_and_remaining_time(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("pretrain.report.console.time.monotonic", lambda: now[0])
    console = Console(30, 5)
    now[0] += 60.0
    console.train(TRAIN)
    assert capsys.readouterr().out.splitlines()[0].endswith("| 1 min 0 s, 4 min 0 s left")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("max_iters", [20, 600_000])
def test_the_bar_fits_80_columns_and_shows_the_progress_of_an_evaluation(max_iters, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(max_iters, 0)
    console.train(TRAIN)
    console.bar.refresh()
    parts = ("loss 3.2500", "1,234,567 tok/s", "norm 0.50", "mfu 41.0%")
    last = terminal.getvalue().split("\r")[-1]
    assert len(last.rstrip()) <= 80 and last.rstrip().endswith("]")
    shown = last[last.index("[") : last.index("]")].split(", ")[1:]
    assert shown == list(parts[: len(shown)]) and len(shown) >= 2
    console.progress("val", 3, 50)
    assert "val 3/50 " in terminal.getvalue().split("\r")[-1]
    console.progress("val", 50, 50)
    assert "val" not in terminal.getvalue().split("\r")[-1]
    console.close()


def test_trackers_get_tasks_under_the_names_they_had():
    found = numbers(EVAL | {"event": "eval", "tasks": {"hellaswag": MINE}})
    assert found["eval/hellaswag/acc_norm"] == 0.25 and found["eval/val_loss"] == 3.2


def test_a_log_of_before_tasks_had_names_gives_the_same_page(tmp_path):
    pages = []
    for name, scores in (("old", {"hellaswag": MINE}), ("new", {"tasks": {"hellaswag": MINE}})):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        log = RunLog(folder)
        log.write("start", step=0)
        for step in (5, 10):
            log.write("eval", step=step, val_loss=3.2, **scores)
        lines = [json.loads(line) for line in log.path.read_text().splitlines()]
        log.path.write_text("".join(json.dumps(line | {"time": 1.0}) + "\n" for line in lines))
        assert report.main([str(folder)]) == 0
        pages.append((folder / "report.html").read_text().replace(str(folder), ""))
        assert (folder / "report-hellaswag-completion.png").exists()
    assert pages[0] == pages[1] and "HellaSwag, completion" in pages[0]


def test_the_first_line_is_followed_by_how_long_the_rest_takes_and_no_other_is(capsys):
    record = {"loss": 5.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000.0}
    record |= {"milliseconds_per_step": 250.0, "memory_bytes": 1e9}
    console = Console(max_iters=850, step=100)
    for step in (110, 120):
        console.train({**record, "step": step})
    Console(max_iters=130, step=120).train({**record, "step": 130})
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("about") for line in lines] == [False, True, False, False]
    assert lines[1].startswith("about 3 min 5 s for the other 740 updates")  # 740 x 0.25 s
