"""YAML from outside: the same data as yaml.safe_load, and limits before any work."""

import time

import pytest
import yaml

from pretrain import flags
from pretrain.errors import UserError
from pretrain.flags import load_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(i)}: &{chr(i)} [{', '.join(['*' + chr(i - 1)] * 10)}]\n" for i in range(98, 110)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(i)}: &{chr(i)} {{<<: [{', '.join(['*' + chr(i - 1)] * 10)}]}}\n" for i in range(98, 110)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (BOMB, "aliases repeat values"),
        (MERGES, "aliases repeat values"),
        ("a: &a [*a]\n", r"\*a stands in itself"),
        ("a: " + "[" * 5000, "nested more than 100 deep"),
        ("- " * 5000, "nested more than 100 deep"),
        ("? " * 5000, "nested more than 100 deep"),
        ("a: " + "{b: " * 200 + "1" + "}" * 200, "nested more than 100 deep"),
        ("x" * 70_000, "more than 65,536 characters"),
        ("a: 2024-02-31", "not YAML: day"),
        ("a: 0x_", "not YAML"),
        ("a: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("a: 1" + ":59" * 5000, "not YAML: Exceeds the limit"),
        ("a: !!int ''", "not YAML"),
        ("a: !!bool maybe", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML in line 1: could not determine"),
        ("a: 1\nb: 2\na: 1", "not YAML in line 3: 'a' is given twice"),
        ("c: {a: 1, ? [x] : 2, 'a': 3}", "not YAML in line 1: 'a' is given twice"),
        ("a: *b", "not YAML in line 1: found undefined alias"),
        ("a: [1,\nb: 2", "not YAML in line 2"),
        ("a: \x00", "not YAML"),
        ("? [a]\n: b", "not YAML in line 1: found unhashable key"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("largest", [flags.LARGEST_YAML, 1 << 23])
def test_what_is_no_yaml_or_too_much_of_it_is_one_line_at_once(text, what, largest):
    if largest > len(text) > flags.LARGEST_YAML:
        return  # allowed there
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"^x.yaml: .*{what}") as error:
        load_yaml(text, "x.yaml", largest=largest)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: [x, no, 1e3, 2024-02-03, null]",
        "base: &b {x: 1}\none: {<<: *b, y: 2}\ntwo: [*b, *b]",
        "- &a x\n- *a",
        "a: " + "[" * 98 + "]" * 98,
        "text: |\n  of\n  lines\n",
    ],
)
def test_other_yaml_is_what_safe_load_gives(text):
    assert load_yaml(text, "x") == yaml.safe_load(text)
    assert load_yaml(text, "x", as_text=True) == yaml.load(text, Loader=yaml.BaseLoader)


def test_large_yaml_is_read_where_it_is_allowed():
    text = "".join(f"- {{config_name: c{i}, data_files: 'x/{i}/*'}}\n" for i in range(3000))
    assert len(text) > flags.LARGEST_YAML
    assert load_yaml(text, "x", largest=1 << 23) == yaml.safe_load(text)
