"""The notebook in examples/ runs from its first cell to its last, as a reader would run it."""

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "first_model.ipynb"


def test_it_is_kept_without_what_a_run_left_in_it():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 9
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    assert max(map(len, lines)) <= 120


def test_every_cell_runs_and_the_model_learns(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("model.py", "pretrain", "adapters", "input.txt", "tests/data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.symlink(ROOT / name, tmp_path / name)
    (tmp_path / "examples").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "examples")
    monkeypatch.setenv("UPDATES", "6")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(tmp_path / "examples" / NOTEBOOK.name, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=250, resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in shown)
    assert "(1, 8, 64)" in printed and "The boat" in printed and "18 questions" in printed
    run = tmp_path / "checkpoints" / "notebook"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in records if record["event"] == "eval"]
    assert len(losses) == 7 and losses[-1] < losses[0] - 1
    assert "srcdoc" in shown[-1]["data"]["text/html"] and (run / "report.html").is_file()
