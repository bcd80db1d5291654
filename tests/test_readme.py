"""What README names is there: files, modules, targets of make. Its commands are run by
tests/test_readme_commands.py."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text=README):
    """The lines of README's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words]


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


def test_readme_names_every_room_and_every_module_of_the_ground_floor_and_no_other():
    table = re.search(r"\| in `pretrain/` \| \|\n(.*?)\n\n", README, re.DOTALL).group(1)
    rooms = re.findall(r"^\| `([a-z_]+)/`", table, re.MULTILINE)
    there = {path.parent.name for path in (ROOT / "pretrain").glob("*/*.py")}
    assert sorted(rooms) == sorted(there)
    ground = re.findall(r"`([a-z_]+)`", table.splitlines()[-1])
    modules = {path.stem for path in (ROOT / "pretrain").glob("*.py")} - {"__init__"}
    assert sorted(ground) == sorted(modules)
