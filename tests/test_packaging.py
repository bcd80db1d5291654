"""The project as a package: what a wheel holds, what its commands do far from the checkout, and
that no two files disagree on versions or requirements."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import published_vocabulary
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pretrain

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = ("fineweb.py", "train_gpt2.py", "hellaswag.py", "sample.py", "model.py")
PACKAGES = ("pretrain", "adapters")
NOT_INSTALLED = {"__pycache__"}
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, built by the backend itself: no network, no pip."""
    folder = tmp_path_factory.mktemp("sources")
    for name in (*SCRIPTS, "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in (
        *PACKAGES,
        "benchmarks",
        "tests/data",
        "configs",
    ):  # what must stay out is there too
        ignore = shutil.ignore_patterns(*NOT_INSTALLED)
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    code = "import setuptools.build_meta as b; b.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the project as pip would lay it out, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_command(name, installed, where, *argv):
    """An entry point, as the launcher that pip writes for it would start it."""
    module, function = PROJECT["project"]["scripts"][name].split(":")
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); sys.argv[0] = {name!r}\n"
    code += f"import {module} as m; assert m.__file__.startswith({str(installed)!r})\n"
    code += f"sys.exit(m.{function}())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *argv],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_holds_every_module_and_data_file_of_the_product_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if not NOT_INSTALLED & set(path.parts) and path.suffix != ".pyc"
    }
    assert names == expected | set(SCRIPTS)
    assert {"pretrain/report/page.css", "pretrain/tokens/fast_bpe_inexact.json"} <= names


def test_the_version_has_one_source(wheel):
    assert wheel.name.startswith(f"gpt2_pretrain-{pretrain.__version__}-")
    assert "version" not in PROJECT["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        assert f"\nVersion: {pretrain.__version__}\n" in archive.read(name).decode()
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changes, re.MULTILINE)[1] == pretrain.__version__


@pytest.mark.parametrize("name", sorted(PROJECT["project"]["scripts"]))
def test_every_command_answers_from_another_folder(name, installed, tmp_path):
    done = run_command(name, installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert list(tmp_path.iterdir()) == []


# ---- requirements


def requirements(lines):
    """{name: specifier}; extras of the project itself name a requirements file, as `-r` does."""
    parsed = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {
        canonicalize_name(r.name): str(r.specifier) for r in parsed if r.name != "gpt2-pretrain"
    }


EXTRAS = PROJECT["project"]["optional-dependencies"]
# Those that requirements.txt has besides what pip installs by itself.
STAGES = ("hub", "plots", "fast", "offline")


@pytest.mark.parametrize(
    ("file", "listed"),
    [
        (
            "requirements.txt",
            [*PROJECT["project"]["dependencies"], *(line for e in STAGES for line in EXTRAS[e])],
        ),
        ("requirements-adapters.txt", EXTRAS["adapters"]),
        ("requirements-ray.txt", EXTRAS["ray"]),
        ("requirements-stores.txt", EXTRAS["stores"]),
        ("requirements-dev.txt", EXTRAS["dev"]),
    ],
)
def test_a_requirements_file_and_pyproject_say_the_same(file, listed):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert requirements(lines) == requirements(listed)


def test_the_stages_work_where_no_extra_is_installed(tmp_path):
    """In one process that cannot import them; what does need one says so in a line. GPT-2's
    vocabulary is where tiktoken keeps what it has downloaded."""
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        kept = tmp_path / "vocabulary" / hashlib.sha1(url.encode()).hexdigest()
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(published_vocabulary.serve(url))
    assert EXTRAS["all"] == [f"gpt2-pretrain[{','.join(STAGES)}]"]
    absent = [name for extra in STAGES for name in requirements(EXTRAS[extra])]
    absent = [name.replace("-", "_") for name in absent if name != "requests"]  # tiktoken's
    code = f"""
import sys
sys.modules |= dict.fromkeys({absent}) | dict.fromkeys(["transformers", "lightning", "lm_eval"])
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "program"
import fineweb, hellaswag, sample, train_gpt2
from pretrain.report import __main__ as report
data = ["--source", {str(ROOT / "input.txt")!r}, "--max_tokens", "4000", "--num_proc", "1"]
items = {str(ROOT / "tests/data/hellaswag_items.jsonl")!r}
size = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 16 --max_iters 2 --eval_iters 1"
print(fineweb.main([*data, "--out_dir", "d"]))
print(train_gpt2.main([*size.split(), "--warmup_iters", "1", "--lr_decay_iters", "2",
    "--data_dir", "d", "--out_dir", "r", "--device", "cpu", "--no-hellaswag"]))
print(hellaswag.main(["--checkpoint", "r", "--data", items, "--limit", "2", "--device", "cpu"]))
print(sample.main(["--checkpoint", "r", "--prompt", "A", "--max_new_tokens", "2"]))
print(report.main(["r"]))
print(fineweb.main(["--dataset", "some/where", "--out_dir", "e"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "TIKTOKEN_CACHE_DIR": str(tmp_path / "vocabulary"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    statuses = [line for line in done.stdout.splitlines() if line in ("0", "1", "2")]
    assert statuses == ["0", "0", "0", "0", "1", "1"], done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 2 and "Traceback" not in done.stderr
    assert "matplotlib is not installed" in errors[0] and "pip install" in errors[0]
    assert "is not installed" in errors[1] and "extra hub" in errors[1]


def test_every_import_of_the_product_is_required():
    """Third-party modules that a source names, by the names under which they are installed."""
    installed_as = {"yaml": "pyyaml", "PIL": "pillow"}
    # Those that come with a requirement, and what is imported only where somebody installed it.
    allowed = {"urllib3", "tiktoken-ext", "torchmetrics", "fsspec", "trackio"}
    groups = PROJECT["project"]["optional-dependencies"]
    known = set(requirements(PROJECT["project"]["dependencies"])) | allowed
    for extra in groups.values():
        known |= set(requirements(extra))
    ours = {Path(name).stem for name in SCRIPTS} | set(PACKAGES)
    files = [ROOT / name for name in SCRIPTS]
    files += [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    missing = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            tops = {name.split(".")[0] for name in names} - ours - set(sys.stdlib_module_names)
            tops = {canonicalize_name(installed_as.get(top, top)) for top in tops}
            missing |= {(path.name, top) for top in tops - known}
    assert not missing


def test_tools_that_judge_the_form_are_pinned():
    listed = PROJECT["project"]["optional-dependencies"]["dev"]
    dev = {r.name: str(r.specifier) for r in map(Requirement, listed)}
    judges = [name for name in dev if name in ("ruff", "mypy") or name.startswith("types-")]
    assert len(judges) == 5
    assert all(dev[name].startswith("==") for name in judges)


# ---- Python versions


def promised():
    text = "\n".join(PROJECT["project"]["classifiers"])
    return re.findall(r"Python :: (3\.\d+)", text)


def test_pyproject_readme_makefile_and_the_workflow_agree_on_python():
    versions = promised()
    oldest = versions[0]
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"Python (3\.\d+) or newer", readme)) == {oldest}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"({oldest.replace('.', ', ')}) and" in makefile
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == versions


def test_the_sources_use_nothing_newer_than_the_oldest_python():
    minor = int(promised()[0].split(".")[1])
    files = [*ROOT.glob("*.py"), *ROOT.glob("pretrain/**/*.py"), *ROOT.glob("adapters/*.py")]
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, minor))


# ---- one way to run each thing


def test_the_workflow_and_the_hooks_run_what_make_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    steps = [
        step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step
    ]
    made = {step.split()[1] for step in steps if step.startswith("make ")}
    assert made == {"lint", "test", "quickstart"}
    assert made <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = {hook["entry"].split("/")[-1] for repo in hooks["repos"] for hook in repo["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    for entry in entries:
        assert f"$(BIN)/{entry.removesuffix(' --fix')}" in lint


def test_make_bench_runs_every_benchmark():
    done = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"benchmarks/{path.name}" in done.stdout


def test_mypy_looks_at_the_whole_product():
    assert set(PROJECT["tool"]["mypy"]["files"]) == {*SCRIPTS, *PACKAGES}
