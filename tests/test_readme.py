"""README says what the programs do: every command in it is one they accept, every file it names is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """The lines of README's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words]


def python_commands():
    """(module, flags) of the commands that start Python, directly or through torchrun."""
    for words in commands():
        if words[0] == "torchrun":
            words = ["python", *(word for word in words[1:] if not word.startswith("--nproc_per_node"))]
        if words[0] == "python":
            skip = 2 if words[1] == "-m" else 1
            yield words[skip].removesuffix(".py"), words[skip + 1 :]


def accepts(module, flags):
    """Parse flags as the program would. Raises SystemExit with a code other than 0 for a mistake."""
    if module == "train_gpt2":
        from pretrain.flags import parse
        from pretrain.settings import build_parser

        _, _, problems = parse(build_parser(), flags)
        assert not problems
    elif "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main(flags)
        assert stop.value.code == 0
    elif module == "fineweb":
        importlib.import_module(module).parse_args(flags)
    elif module == "pretrain.report":
        assert not [flag for flag in flags if flag.startswith("--")]
    else:
        importlib.import_module(module).build_parser().parse_args(flags)


@pytest.mark.parametrize(
    ("module", "flags"), [pytest.param(*c, id=" ".join([c[0], *c[1]])) for c in python_commands()]
)
def test_every_command_in_readme_is_one_its_program_accepts(module, flags, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    accepts(module, flags)


def test_a_flag_that_does_not_exist_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        accepts("fineweb", ["--no_such_flag", "1"])
    with pytest.raises(AssertionError):
        accepts("train_gpt2", ["--no_such_flag", "1"])
    with pytest.raises(SystemExit):
        accepts("hellaswag", ["--no_such_flag", "1"])


def test_readme_has_the_two_commands_and_the_three_stages():
    words = [" ".join(command) for command in commands()]
    assert {"make quickstart", "make test"} <= set(words)
    assert {"fineweb", "train_gpt2", "hellaswag", "sample"} <= {module for module, _ in python_commands()}


def test_make_has_every_target_that_readme_and_ci_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    named = {words[1] for words in commands() if words[0] == "make"}
    named |= set(re.findall(r"^make (\w+)", ci, re.MULTILINE))
    assert named and named <= targets


def test_every_file_of_the_project_that_readme_names_exists():
    folders = "pretrain|tests|benchmarks|configs|adapters"
    names = re.findall(rf"\b((?:{folders})/[\w./-]+\w|[\w-]+\.(?:py|txt))\b", README)
    missing = {name for name in names if not (ROOT / name).exists()}
    assert not missing


def test_readme_names_every_module_of_pretrain_and_no_other():
    table = re.search(r"\| in `pretrain/` \| \|\n(.*?)\n\n", README, re.DOTALL).group(1)
    named = re.findall(r"`([a-z_]+)/?`", table)
    there = {path.stem for path in (ROOT / "pretrain").glob("*.py")} - {"__init__"} | {"report"}
    assert sorted(named) == sorted(there)
