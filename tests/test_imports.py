"""The import rules of the house, read from the source and from what a fresh interpreter loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"fineweb", "train_gpt2", "hellaswag", "sample"}
FRAMEWORKS = {"lightning", "pytorch_lightning", "accelerate", "transformers"}
TORCH_FREE = (
    "tokenizer", "documents", "source", "hub", "remote", "parquet", "textfile", "estimate",
    "shards", "build", "packing", "pipeline", "verify", "schedule", "runlog", "report", "owntext",
    "trackers", "console", "flags",
)  # fmt: skip
WITHOUT_MODEL = ("loader", "optim", "checkpoint", "distributed", "sampling", "validation")


def sources():
    """All Python files of the product: everything but tests and environments."""
    folders = (".", "pretrain", "adapters", "benchmarks")
    return [path for folder in folders for path in (ROOT / folder).glob("*.py")]


def imports(path):
    """Yield (module, name of the enclosing function or None) for every import statement of a file."""

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                yield module, function
                yield from ((f"{module}.{alias.name}", function) for alias in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, child.name if inside else function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), None)


def top_level(path):
    return {module.split(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_data_pipeline_starts_without_torch(name):
    code = f"import sys, pretrain.{name}; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_importing_a_script_starts_nothing(script, tmp_path):
    """No file, no socket, no process group: spawn workers import the main module again."""
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise SystemExit('opened a socket at import')\n"
        "socket.socket.connect = refuse\n"
        f"import {script}\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.distributed.is_initialized()\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
    )
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert done.stdout == ""


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_what_the_stages_share_knows_neither_the_model_nor_a_script(name):
    path = ROOT / "pretrain" / f"{name}.py"
    assert not top_level(path) & (SCRIPTS | {"model", "adapters"})


def test_the_model_needs_torch_alone():
    for module, function in imports(ROOT / "model.py"):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top == "torch":
            continue
        assert function is not None, f"model.py imports {module} at its top"


def test_the_scorer_takes_a_model_and_does_not_know_ours():
    for module, function in imports(ROOT / "hellaswag.py"):
        if module.split(".")[0] in {"model", "transformers"}:
            assert function is not None, f"hellaswag.py imports {module} at its top"


def test_nobody_imports_the_command_line_scripts_and_nothing_imports_adapters():
    for path in sources():
        if path.parent.name != "benchmarks":
            assert not top_level(path) & {"train_gpt2", "fineweb"}, path
        if path.parent.name != "adapters":
            assert "adapters" not in top_level(path), path


def test_frameworks_stay_in_adapters():
    for path in sources():
        if path.parent.name in {"adapters", "benchmarks"}:
            continue
        for module, function in imports(path):
            inside = function is not None
            assert inside or module.split(".")[0] not in FRAMEWORKS, f"{path.name} imports {module}"


def test_help_of_the_data_script_loads_neither_torch_nor_datasets():
    code = (
        "import sys, fineweb\n"
        "try: fineweb.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'awkward', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'--help imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dataset" in done.stdout and "--source" in done.stdout
