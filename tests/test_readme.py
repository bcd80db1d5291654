"""What README and the pages under docs/ name is there: files, modules, targets of make, links.
Their commands are run by tests/test_readme_commands.py."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("**/*.md"))
WIDTH = 120


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text=README):
    """The commands of a page's bash blocks, word by word, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def without_code(text):
    """A page's prose: blocks and spans of code hold no links and no headings."""
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def anchors(text):
    """What GitHub makes of the headings of a page, to link to."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(name, text):
    """The links of a page that lead nowhere in this project."""
    broken = []
    for target in re.findall(r"\]\(([^()\s]+)\)", without_code(text)):
        if re.match(r"(https|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        there = file.exists() and file.resolve().is_relative_to(ROOT.resolve())
        own = text if not path else file.read_text(encoding="utf-8") if there and anchor else ""
        if not there or (anchor and anchor not in anchors(own)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_to_files_and_headings_that_exist(name):
    assert broken_links(name, page(name)) == []


def test_a_link_to_a_page_or_a_heading_that_is_not_there_is_found():
    text = (
        "# A title: of `two`\n[a](#a-title-of-two) [b](#b) [c](docs/none.md) `[d](e)` [f](LICENSE)"
    )
    assert broken_links("README.md", text) == ["#b", "docs/none.md"]
    text = "[a](../README.md#two-commands) [b](../README.md#three-commands)"
    assert broken_links("docs/x.md", text) == ["../README.md#three-commands"]


@pytest.mark.parametrize("name", PAGES)
def test_no_line_of_a_page_is_longer_than_120_characters(name):
    lines = enumerate(page(name).splitlines(), 1)
    assert [number for number, line in lines if len(line) > WIDTH] == []


def test_every_page_under_docs_is_reached_from_readme():
    reached = set(re.findall(r"\]\((docs/[\w./-]+\.md)\)", README))
    assert reached == {name for name in PAGES if name.startswith("docs/")}


def test_make_has_every_target_that_pages_and_ci_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    named = {words[1] for name in PAGES for words in commands(page(name)) if words[0] == "make"}
    named |= set(re.findall(r"^make (\w+)", ci, re.MULTILINE))
    assert named and named <= targets


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_every_file_of_the_project_that_a_page_names_exists(name):
    folders = "pretrain|tests|benchmarks|configs|adapters|scripts|docs"
    files = re.findall(rf"\b((?:{folders})/[\w./-]+\w|[\w-]+\.(?:py|txt))\b", page(name))
    places = [ROOT, ROOT / "benchmarks"]
    missing = {file for file in files if not any((place / file).exists() for place in places)}
    assert not {file for file in missing if "NAME" not in file}


def test_readme_names_every_room_and_every_module_of_the_ground_floor_and_no_other():
    table = re.search(r"\| in `pretrain/` \| \|\n(.*?)\n\n", README, re.DOTALL).group(1)
    rooms = re.findall(r"^\| `([a-z_]+)/`", table, re.MULTILINE)
    there = {path.parent.name for path in (ROOT / "pretrain").glob("*/*.py")}
    assert sorted(rooms) == sorted(there)
    ground = re.findall(r"`([a-z_]+)`", table.splitlines()[-1])
    modules = {path.stem for path in (ROOT / "pretrain").glob("*.py")} - {"__init__"}
    assert sorted(ground) == sorted(modules)
