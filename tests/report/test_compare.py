"""Several runs: what differs leads, and nothing of a page is left behind by a full disk."""

import contextlib
import csv
import io
import re
import subprocess
import sys

import pytest
from test_report import healthy_run, of, write_run

from pretrain import files
from pretrain.report import __main__ as report
from pretrain.report.compare import compare, seeds, to_csv, to_markdown
from pretrain.report.findings import find
from pretrain.report.page import html_page
from pretrain.report.runs import Run


def run_of(folder, loss, rate, seed=1, **more):
    """A run whose best validation loss is `loss`."""
    records = healthy_run(20, seed=seed, evals=2)
    for record in of(records, "eval"):
        record["val_loss"] = loss + 0.5 * (record["step"] < 200)
    config = {"learning_rate": rate, "seed": seed, "out_dir": str(folder), "n_layer": 2, **more}
    return write_run(folder, records, flags=config)


def three_runs(folder):
    return [
        run_of(folder / "slow", 3.5, 1e-4),
        run_of(folder / "good", 3.0, 3e-4),
        run_of(folder / "fast", 4.0, 1e-3),
    ]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Runs that nothing is written to but their page."""
    return three_runs(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def page_and_tables(three, tmp_path_factory):
    """What one command says of the three: the page, the CSV, and what it prints."""
    table = tmp_path_factory.mktemp("tables") / "t.csv"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert report.main([*map(str, three), "--csv", str(table), "--md", "-"]) == 0
    return (three[0] / "report.html").read_text(), table.read_text(), printed.getvalue()


def test_the_best_run_leads_and_only_what_differs_is_a_column(three):
    table = compare([Run.load(folder) for folder in three])
    assert [row[0] for row in table.rows] == ["good", "slow", "fast"]
    assert table.header[1] == "learning_rate" and table.header[2] == "validation loss"
    assert not {"n_layer", "out_dir", "seed"} & set(table.header)
    assert [row[1] for row in table.rows] == ["0.0003", "0.0001", "0.001"]
    assert (0, 2) in table.best and (1, 2) not in table.best


def test_the_page_leads_with_the_table_and_marks_the_best(page_and_tables):
    page, _, _ = page_and_tables
    assert page.index("What differs") < page.index("What looks wrong")
    assert re.findall(r'class="best"[^>]*>([^<]*)', page)[0] == "3.0000"


def test_a_finding_of_several_runs_is_one_card_that_names_them(tmp_path):
    runs = []
    for name in ("a", "b"):
        records = healthy_run(300)
        for record in of(records, "train")[150:155]:
            record["loss"] += 4.0
        runs.append(Run.load(write_run(tmp_path / name, records, flags={"seed": len(runs)})))
    page = html_page(runs, [(run, finding) for run in runs for finding in find(run)], [])
    (card,) = re.findall(r'<div class="card finding">(.*?)</div>', page, re.DOTALL)
    assert "a at step" in card and "b at step" in card and "In 2 runs" in card
    assert card.count("What to try:") == 1


def test_settings_that_are_equal_are_folded_away_and_one_legend_serves_all_pictures(
    three, page_and_tables
):
    page, _, _ = page_and_tables
    head, folded = page.split("Configuration</h2>")[1].split("Equal in all")
    assert "flags.learning_rate" in head and "n_layer" not in head
    assert "n_layer" in folded and "<details open>" not in head
    assert page.count('class="legend"') == 1
    legend = re.search(r'<p class="legend".*?</p>', page)[0]
    assert all(f">{run.name}<" in legend.replace("</svg>", ">") for run in map(Run.load, three))


def test_csv_and_markdown_hold_the_same_numbers(page_and_tables):
    _, table, printed = page_and_tables
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["run"] for row in rows] == ["good", "slow", "fast"]
    assert float(rows[0]["validation loss"]) == 3.0 and float(rows[2]["learning_rate"]) == 1e-3
    assert float(rows[0]["tokens"]) == 200 * 1024
    assert "| good | 0.0003 | **3.0000** |" in printed


def test_names_cannot_break_a_table_or_become_a_formula(tmp_path):
    folders = [run_of(tmp_path / "=1|a", 3.0, 1e-3), run_of(tmp_path / "b", 3.1, 1e-4)]
    table = compare([Run.load(folder) for folder in folders])
    assert "\n'=1|a," in to_csv(table)
    lines = to_markdown(table).splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_seeds_of_one_setting_are_shown_as_mean_and_spread(tmp_path):
    folders = [
        run_of(tmp_path / f"{rate}-{seed}", loss, rate, seed)
        for rate, losses in ((1e-3, (3.0, 3.2)), (1e-4, (4.0, 4.4)))
        for seed, loss in enumerate(losses)
    ]
    lines = seeds([Run.load(folder) for folder in folders])
    assert lines[0].startswith("learning_rate 0.001: validation loss 3.1000 +- 0.1414")
    assert "2 seeds" in lines[1] and "4.2000 +- 0.2828" in lines[1]


def test_a_full_disk_leaves_nothing_behind_and_the_old_page_as_it_was(
    tmp_path, monkeypatch, capsys
):
    folders = three_runs(tmp_path)
    page = folders[0] / "report.html"
    for name in ("report.html", "report-loss.png", "report-mfu.png"):
        (folders[0] / name).write_text(f"{name} of before")
    before = {path.name: path.read_bytes() for path in folders[0].iterdir()}
    real, written = files.os.fsync, []

    def full_disk(handle):
        written.append(handle)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full_disk)
    capsys.readouterr()
    assert report.main([*map(str, folders), "--output", str(page)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == before


def test_a_killed_run_is_known_by_its_free_lock(tmp_path):
    folder = write_run(tmp_path / "run", healthy_run(10))
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert Run.load(folder).status() == "still going", "though its last line is years old"
        process.kill()
    assert Run.load(folder).status() == "interrupted: its process is gone"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--outptu", "x"], "did you mean --output?"),
        ([], "OUT_DIR: name the folder of a run"),
    ],
)
def test_wrong_flags_are_said_with_what_was_meant(words, answer, capsys):
    assert report.main(words) == 2
    assert answer in capsys.readouterr().err
