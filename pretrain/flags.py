"""Command lines that report every mistake at once.

    args, given, problems = parse(parser, argv)   # problems: ["--batch_size: 0 must be at least 1", ...]

`given` holds the names of the flags that were on the command line, for what depends on a flag being left
alone. A switch is declared with argparse.BooleanOptionalAction and understood as --compile, --no-compile,
--compile True and --compile=False.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Sequence

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_UNSET = object()


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, set[str], list[str]]:
    """(all flags with their defaults, names given in argv, problems one line each). Flags with a problem keep
    their defaults. The parser must have been made with exit_on_error=False and allow_abbrev=False."""
    defaults = vars(parser.parse_args([]))
    flags, problems = _spell_switches(parser, list(argv)), []
    while True:
        found = argparse.Namespace(**dict.fromkeys(defaults, _UNSET))
        try:
            found, unknown = parser.parse_known_args(flags, found)
            break
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            problems.append(f"{names[0]}: {error.message}")
            kept = _without(flags, names)
            if kept == flags:
                return argparse.Namespace(**defaults), set(), problems
            flags = kept
    known = [name for action in parser._actions for name in action.option_strings]
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], known, n=1)
        problems.append(f"{word}: unknown" + (f" (did you mean {near[0]}?)" if near else ""))
    given = {name: value for name, value in vars(found).items() if value is not _UNSET}
    return argparse.Namespace(**{**defaults, **given}), set(given), problems


def _spell_switches(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """--compile True -> --compile, --compile False -> --no-compile."""
    switches = {
        action.option_strings[0]: action.option_strings[1]
        for action in parser._actions
        if isinstance(action, argparse.BooleanOptionalAction)
    }
    words, result = list(argv), []
    while words:
        word, equals, value = words.pop(0).partition("=")
        if word in switches and not equals and words and words[0].lower() in _TRUE + _FALSE:
            equals, value = "=", words.pop(0)
        if word in switches and equals and value.lower() in _TRUE + _FALSE:
            result.append(word if value.lower() in _TRUE else switches[word])
        else:
            result.append(word + equals + value)
    return result


def _without(argv: list[str], names: list[str]) -> list[str]:
    """argv without these flags and their values."""
    result, inside = [], False
    for word in argv:
        if word.startswith("--"):
            inside = word.split("=")[0] in names
        if not inside:
            result.append(word)
    return result


def number(kind: type, *, minimum: float, below: float = math.inf) -> Callable[[str], float]:
    """A type for add_argument: int or float, from `minimum` on and below `below`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_KINDS[kind]}") from None
        if not minimum <= value < below:
            limit = f" and below {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {minimum:g}{limit}")
        return value

    return read


_KINDS = {int: "a whole number", float: "a number"}
