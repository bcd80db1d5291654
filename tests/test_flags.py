import argparse

import pytest

import fineweb
import hellaswag
import sample
from pretrain.flags import LARGEST, number, parse
from pretrain.train import arguments


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--batch_size", type=number(int, minimum=1), default=8)
    parser.add_argument("--dropout", type=number(float, minimum=0, below=1), default=0.0)
    parser.add_argument("--dtype", choices=["auto", "float32"], default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--out_dir", default="checkpoints")
    return parser


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--compile"], True),
        (["--compile", "True"], True),
        (["--compile", "false"], False),
        (["--compile=True"], True),
        (["--compile=0"], False),
        (["--no-compile"], False),
        (["--compile", "--out_dir", "True"], True),
        (["--compile", "True", "--no-compile"], False),
    ],
)
def test_a_switch_is_understood_in_all_its_forms(parser, words, value):
    args, _, problems = parse(parser, words)
    assert args.compile is value and problems == []


def test_a_folder_may_be_called_true(parser):
    assert parse(parser, ["--out_dir", "True"])[0].out_dir == "True"


def test_what_was_given_is_told_from_defaults(parser):
    args, given, problems = parse(parser, ["--batch_size", "8", "--no-compile"])
    assert (args.batch_size, args.dropout, given, problems) == (
        8,
        0.0,
        {"batch_size", "compile"},
        [],
    )


@pytest.mark.parametrize("words", [["--out_dir", "n\udcff"], ["--out_dir=n\udcff"], ["\udcff"]])
def test_what_is_not_utf8_is_refused_before_anything_is_made_of_it(parser, words):
    args, given, problems = parse(parser, words)
    assert args.out_dir == "checkpoints" and not given
    said = words[-1].replace("\udcff", "\\udcff")
    assert problems == [f"'{said}': not UTF-8; rename what it names"]


def test_all_mistakes_are_reported_together(parser):
    words = [
        "--batch_size",
        "eight",
        "--dropout",
        "1",
        "--dtype",
        "int4",
        "--compile",
        "maybe",
        "--drop_out=0.1",
        "x",
    ]
    args, given, problems = parse(parser, [*words, "--out_dir"])
    assert problems[0] == "--batch_size: 'eight' is not a whole number"
    assert problems[1] == "--dropout: 1 must be at least 0 and below 1"
    assert problems[2].startswith("--dtype: invalid choice: 'int4'")
    assert problems[3] == "--out_dir: expected one argument"
    assert problems[4:] == [
        "maybe: unknown",
        "--drop_out=0.1: unknown (did you mean --dropout?)",
        "x: unknown",
    ]
    assert (args.batch_size, args.dtype, args.compile, given) == (8, "auto", True, {"compile"})


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1.5", ""])
def test_numbers_out_of_range_are_refused(parser, text):
    _, _, problems = parse(parser, ["--dropout", text])
    assert len(problems) == 1 and problems[0].startswith("--dropout: ")
    _, _, problems = parse(parser, [f"--batch_size={text}"])
    assert len(problems) == 1 and problems[0].startswith("--batch_size: ")


PARSERS = {
    "train_gpt2.py": arguments.build_parser,
    "fineweb.py": fineweb.make_parser,
    "hellaswag.py": hellaswag.build_parser,
    "sample.py": sample.build_parser,
}


@pytest.mark.parametrize("name", PARSERS)
def test_a_limit_of_a_flag_stands_in_its_help(name):
    for action in PARSERS[name]()._actions:
        limit = getattr(action.type, "maximum", 1)
        if 1 < limit < min(LARGEST, 1e12):  # below what a whole number or a float can be
            assert f"at most {limit:,}" in action.help, action.option_strings


@pytest.mark.parametrize(
    ("name", "words", "limit"),
    [
        ("hellaswag.py", ["--batch_tokens", "1000000000000"], "262,144"),
        ("sample.py", ["--batch_size", "1000000000000"], "10,000"),
        ("train_gpt2.py", ["--sample_tokens", "100001"], "100,000"),
        ("fineweb.py", ["--num_proc", "1000000"], "1,024"),
    ],
)
def test_a_size_that_no_machine_holds_is_refused_before_anything_is_read(name, words, limit):
    _, _, problems = parse(PARSERS[name](), words)
    assert len(problems) == 1 and problems[0].startswith(words[0]) and limit in problems[0]
