"""The import rules of the house, read from the source and from what a fresh interpreter loads."""

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"fineweb", "train_gpt2", "hellaswag", "sample"}
FRAMEWORKS = {
    "ray",
    "fsspec",
    "lm_eval",
    "lightning",
    "pytorch_lightning",
    "accelerate",
    "transformers",
}
TORCH_FREE = ("text", "tokens", "report")  # rooms that fineweb.py and its workers start from


@functools.cache
def sources():
    """All Python files of the product: everything but tests and environments."""
    files = list(ROOT.glob("*.py"))
    return files + [
        p
        for folder in ("pretrain", "adapters", "benchmarks")
        for p in (ROOT / folder).rglob("*.py")
    ]


def modules(room):
    """Dotted names of the modules in a room of pretrain/."""
    return [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "pretrain" / room).rglob("*.py")
    ]


@functools.cache
def imports(path):
    """(module, name of the enclosing function or None) for every import statement of a file."""

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

    return list(visit(ast.parse(path.read_text(encoding="utf-8")), None))


def top_level(path):
    return {module.split(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize("room", TORCH_FREE)
def test_the_rooms_of_the_data_pipeline_start_without_torch(room):
    names = ", ".join(name for name in modules(room) if not name.endswith(".__main__"))
    code = (
        f"import sys, {names}; sys.exit(', '.join({{'torch', 'datasets'}} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Which rooms a room may import from, besides itself and the ground floor.
MAY_IMPORT = {
    "text": set(),
    "tokens": {"text"},
    "report": {"tokens", "text"},
    "train": {"models", "tokens", "text", "report"},
    "eval": {"train", "tokens", "text", "report"},
    "models": set(),
}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_between_rooms_run_one_way(room):
    allowed = MAY_IMPORT[room] | {room}
    for path in (ROOT / "pretrain" / room).rglob("*.py"):
        for module, function in imports(path):
            parts = module.split(".")
            if parts[0] == "pretrain" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                inside = function is not None and room == "models"
                assert parts[1] in allowed or inside, f"{path.relative_to(ROOT)} imports {module}"
            assert parts[0] not in SCRIPTS | {"adapters"}, (
                f"{path.relative_to(ROOT)} imports {module}"
            )


def test_the_ground_floor_imports_nothing_above_itself():
    for path in (ROOT / "pretrain").glob("*.py"):
        for module, function in imports(path):
            parts = module.split(".")
            above = parts[0] == "pretrain" and len(parts) > 1 and parts[1] in MAY_IMPORT
            assert not above or function is not None, f"{path.name} imports {module}"


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
    env = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert done.stdout == ""


def test_the_model_needs_torch_alone():
    for module, function in imports(ROOT / "model.py"):
        top = module.split(".")[0]
        ground = module.startswith(("pretrain.ops", "pretrain.errors"))
        if top in sys.stdlib_module_names or top == "torch" or ground:
            continue
        assert function is not None, f"model.py imports {module} at its top"


def test_the_scorer_takes_a_model_and_does_not_know_ours():
    for module, function in imports(ROOT / "hellaswag.py"):
        if module.split(".")[0] in {"model", "transformers"}:
            assert function is not None, f"hellaswag.py imports {module} at its top"


def test_nobody_imports_the_command_line_scripts_and_nothing_imports_adapters():
    for path in sources():
        if "benchmarks" not in path.parts:
            assert not top_level(path) & {"train_gpt2", "fineweb"}, path
        if path.parent.name not in {"adapters", "benchmarks"}:
            assert "adapters" not in top_level(path), path


def test_frameworks_stay_in_adapters():
    for path in sources():
        if {"adapters", "benchmarks"} & set(path.parts):
            continue
        for module, function in imports(path):
            inside = function is not None
            assert inside or module.split(".")[0] not in FRAMEWORKS, f"{path.name} imports {module}"


PROGRAMS = [
    *("fineweb", "train_gpt2", "hellaswag", "sample", "pretrain.report"),
    *("adapters.huggingface", "adapters.hf_trainer", "adapters.accelerate_loop"),
    *("adapters.lightning_module", "adapters.lm_eval"),
]
HEAVY = FRAMEWORKS | {"torch", "datasets", "pyarrow", "awkward", "matplotlib", "huggingface_hub"}


def test_help_and_wrong_flags_are_answered_before_anything_heavy_is_loaded():
    code = (
        "import runpy, sys\n"
        f"for name in {PROGRAMS}:\n"
        "    for flag, status in (('--help', 0), ('--no_such_flag', 2)):\n"
        "        sys.argv = [name, flag]\n"
        "        try: runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
        "        except SystemExit as stop: assert stop.code == status, (name, flag, stop.code)\n"
        "        else: raise AssertionError(name)\n"
        f"        heavy = {HEAVY} & set(sys.modules)\n"
        "        assert not heavy, f'{name} {flag} imported {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--help") >= len(PROGRAMS)
    assert done.stderr.count("error:") >= len(PROGRAMS)


@pytest.mark.parametrize(
    ("given", "running", "is_passive"), [(None, 99, True), (None, 1, False), ("active", 99, False)]
)
def test_waiting_threads_sleep_where_others_compute(given, running, is_passive):
    """OpenMP says what it read when it was loaded, which torch does when it is imported."""
    lib = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    libraries = sorted(map(str, lib.glob("libgomp*.so*")))
    if not libraries:
        pytest.skip("torch has another OpenMP here, which does not say what it read")
    known = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        known["OMP_WAIT_POLICY"] = given
    code = f"""
import builtins, ctypes, io
real = open
def fake(path, *arguments, **options):
    if path == "/proc/loadavg":
        return io.StringIO("0.1 0.1 0.1 {running}/200 4711")
    return real(path, *arguments, **options)
builtins.open = fake
import pretrain
ctypes.CDLL({libraries[0]!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**known, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("SPINCOUNT = '0'" in done.stderr) == is_passive, done.stderr
