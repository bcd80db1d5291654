"""Command lines that report every mistake at once.

    args, given, problems = parse(parser, argv)   # problems: ["--batch_size: 0 must be at least 1",
    ...]

`given` holds the names of the flags that were on the command line, for what depends on a flag being
left alone. A switch is declared with argparse.BooleanOptionalAction and understood as --compile,
--no-compile, --compile True and --compile=False.

parse_with_config does the same where a flag --config names a YAML file of flags: `batch_size: 16`.
"""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pretrain.errors import UserError, first_line
from pretrain.files import is_utf8

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_UNSET = object()
LARGEST_YAML = 1 << 16  # characters of a file of flags
DEEPEST_YAML = 100


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, set[str], list[str]]:
    """(all flags with their defaults, names given in argv, problems one line each). Flags with a
    problem keep their defaults. The parser must have been made with exit_on_error=False and
    allow_abbrev=False."""
    defaults = vars(parser.parse_args([]))
    # No manifest, checkpoint or page could record them.
    if foreign := [word for word in argv if not is_utf8(word)]:
        problems = [f"{word!a}: not UTF-8; rename what it names" for word in foreign]
        return argparse.Namespace(**defaults), set(), problems
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
    problems += unknown_flags(parser, unknown)
    given = {name: value for name, value in vars(found).items() if value is not _UNSET}
    return argparse.Namespace(**{**defaults, **given}), set(given), problems


def parse_with_config(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    overrides: Mapping[str, Collection[str]] | None = None,
) -> tuple[argparse.Namespace, set[str], list[str]]:
    """Like parse, with what the file of --config sets for flags that argv leaves alone.

    overrides: for a flag, those that it puts out of force in the file when it is in argv. Every
    value in the file is checked as flags are; `given` holds the names in force from either.
    """
    args, given, problems = parse(parser, argv)
    if not args.config:
        return args, given, problems
    words, wrong = _read_config(args.config, parser)
    preset, preset_given, more = parse(parser, words)
    wrong += [f"{args.config}: {problem.removeprefix('--')}" for problem in more]
    beaten = {other for name in given for other in (overrides or {}).get(name, ())}
    added = preset_given - given - beaten
    args = argparse.Namespace(**vars(args) | {name: getattr(preset, name) for name in added})
    return args, given | added, problems + wrong


def _read_config(path: str, parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(the flags of a YAML file as a command line, problems one line each)."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = load_yaml(file.read(LARGEST_YAML + 1), f"--config {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        return [], [f"--config {path}: cannot be read: {reason}"]
    except UserError as error:
        return [], [str(error)]
    if not isinstance(settings, dict):
        return [], [f"--config {path}: expected lines such as batch_size: 16"]
    actions = {
        action.dest: action for action in parser._actions if action.dest not in ("help", "config")
    }
    words, problems = [], []
    for name, value in settings.items():
        if name not in actions:
            problems.append(f"{path}: {name}: unknown{suggestion(str(name), actions)}")
        elif isinstance(value, list) and actions[name].nargs:
            words += [f"--{name}", *map(str, value)]
        elif value is None or isinstance(value, dict | list):
            shown = "nothing" if value is None else f"{value}"[:80]
            problems.append(f"{path}: {name}: one value expected, got {shown}")
        else:
            words.append(f"--{name}={value}")
    return words, problems


def load_yaml(text: str, what: str, *, largest: int = LARGEST_YAML, as_text: bool = False) -> Any:
    """A YAML document as plain data; as_text: all scalars as strings, as they are written.

    Raises UserError, beginning with `what`, for what is not YAML and for what would take long: more
    than `largest` characters, or as many values (aliases in a few lines can make billions of
    them), or nesting beyond DEEPEST_YAML.
    """
    import yaml

    if len(text) > largest:
        raise UserError(f"{what}: more than {largest:,} characters of YAML")
    fast = hasattr(yaml, "CSafeLoader") and len(text) > LARGEST_YAML
    safe = yaml.CSafeLoader if fast else yaml.SafeLoader
    try:
        if problem := _yaml_excess(yaml.parse(text, Loader=safe), largest):
            raise UserError(f"{what}: {problem}")
        if as_text:
            return yaml.load(text, Loader=yaml.BaseLoader)
        loader: Any = type("Loader", (safe,), {})  # plain data, as BaseLoader
        loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
        loader.add_constructor("tag:yaml.org,2002:map", _mapping)
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{what}: not YAML{where}: {said}") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML lets them through: a date of 32 March, a number of 5,000 digits
        raise UserError(f"{what}: not YAML: {first_line(error)}") from None


def _mapping(loader: Any, node: Any) -> Iterator[Any]:
    """A mapping, whose keys are all different: PyYAML would take the last of two, without a
    word."""
    import yaml

    names = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in names:
            problem = f"{key.value!r} is given twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        names.add(key.value)
    yield from loader.construct_yaml_map(node)


def _whole_number(loader: Any, node: Any) -> int:
    """An integer that can be shown: YAML's 1:59:59 can make one past Python's limit of digits."""
    value = loader.construct_yaml_int(node)
    str(value)  # ValueError
    return value


def _yaml_excess(events: Iterable, most_nodes: int) -> str | None:
    """What is too much in a document, found before any of it is built."""
    import yaml

    sizes: dict[str, int] = {}  # nodes that an anchor stands for, those of aliases in it included
    opened: list[tuple[str | None, int]] = []  # collections: (anchor, nodes before it)
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                return f"*{event.anchor} stands in itself"
            nodes += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            nodes += 1
            opened.append((event.anchor, nodes - 1))
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            sizes[event.anchor or ""] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor or ""] = nodes - before
        if nodes > most_nodes:
            return f"its aliases repeat values, to more than {most_nodes:,}"
        if len(opened) > DEEPEST_YAML:
            return f"nested more than {DEEPEST_YAML} deep"
    return None


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


# What people call a flag, in other programs or in short, and what it is called here.
SYNONYMS = {
    name: flag
    for flag, names in {
        "learning_rate": "lr max_lr peak_lr step_size",
        "min_lr": "lr_min final_lr",
        "batch_size": "batch bs micro_batch_size per_device_train_batch_size device_batch_size",
        "total_batch_tokens": "total_batch_size global_batch_size",
        "gradient_accumulation_steps": "accumulation grad_accum accum accumulate_grad_batches",
        "max_iters": "steps max_steps iters iterations num_iterations train_steps",
        "epochs": "epoch num_epochs n_epochs num_train_epochs max_epochs",
        "warmup_iters": "warmup warmup_steps num_warmup_steps",
        "weight_decay": "wd decay",
        "grad_clip": "clip max_grad_norm gradient_clip_val",
        "n_layer": "layers n_layers num_layers depth num_hidden_layers",
        "n_head": "heads n_heads num_heads num_attention_heads",
        "n_embd": "width d_model dim hidden_size embd n_embed",
        "block_size": "context context_length seq_len sequence_length max_length seq_length",
        "out_dir": "output output_dir out save_dir",
        "data_dir": "dataset_dir shards",
        "data": "text input train_file",
        "resume": "resume_from resume_from_checkpoint continue",
        "eval_interval": "eval_steps eval_every val_every",
        "log_interval": "logging_steps log_every",
        "seed": "random_seed",
        "max_new_tokens": "tokens length num_tokens",
        "temperature": "temp",
    }.items()
    for name in names.split()
}


def unknown_flags(parser: argparse.ArgumentParser, words: Iterable[str]) -> list[str]:
    """What to say of words that a parser does not know, a line each."""
    known = [name for action in parser._actions for name in action.option_strings]
    return [f"{word}: unknown{suggestion(word.split('=')[0], known)}" for word in words]


def suggestion(word: str, known: Collection[str]) -> str:
    """What to add to a message on an unknown flag: the known one that is meant, if any. known:
    flags with or without their dashes, as `word` has them.

    >>> suggestion("--lr", ["--learning_rate", "--min_lr"])
    ' (did you mean --learning_rate?)'
    """
    bare = word.lstrip("-").replace("-", "_").lower()
    flags = {flag.lstrip("-"): flag for flag in known}
    near = [name for name in (bare, SYNONYMS.get(bare)) if name in flags]
    near += difflib.get_close_matches(bare, flags, n=1)
    return f" (did you mean {flags[near[0]]}?)" if near else ""


class Gather(argparse.Action):
    """For a flag with nargs that may be given several times: the values of all of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *values])


def named_files(words: Iterable[str], alone: Collection[str] = ()) -> dict[str, str | None]:
    """{name: file} for words such as NAME=FILE, or NAME for those that need no file, `alone`.
    Raises UserError that says what is wrong with the first bad one.

    >>> named_files(["hellaswag"], alone=["hellaswag"])
    {'hellaswag': None}
    """
    found: dict[str, str | None] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not name or not name.replace("-", "_").isidentifier() or not name.isascii():
            raise UserError(f"{word!r} is not NAME=FILE with a name of letters, digits, - and _")
        if name in found:
            raise UserError(f"{name}: named twice")
        if not file and name not in alone:
            known = f" (known without: {', '.join(alone)})" if alone else ""
            raise UserError(f"{name}: give its file, {name}={name}.jsonl{known}")
        if file and not os.path.isfile(file):
            raise UserError(f"{name}: {file}: no such file")
        found[name] = file or None
    return found


def wrong_files(flag: str, words: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """What is wrong with the NAME=FILE words of a flag, or with names that are `taken`."""
    try:
        named = named_files(words)
    except UserError as error:
        return [f"{flag} {error}"]
    return [f"{flag} {name}: this name is taken" for name in named if name in taken]


def named_after_flags(folder: str, values: dict[str, Any]) -> str:
    """The folder with the value of a flag for each {flag} in its name; other braces stay.

    >>> named_after_flags("runs/lr{learning_rate}-{seed}", {"learning_rate": 3e-4, "seed": 1})
    'runs/lr0.0003-1'
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        known = name in values and name != "out_dir"
        return str(values[name]).replace(os.sep, "_") if known else found[0]

    return re.sub(r"\{(\w+)\}", value, folder)


def number(
    kind: Callable[[Any], float],
    *,
    minimum: float,
    maximum: float = math.inf,
    below: float = math.inf,
) -> Callable[[str], Any]:
    """A type for add_argument: int or float, finite, from `minimum` to `maximum` and below `below`.
    Whole numbers may be written 1_000_000 or 1e6."""
    noun = "a whole number" if kind is int else "a number"

    def read(text: str) -> float:
        try:
            value = kind(text) if kind is not int or "e" not in text.lower() else float(text)
            if value != kind(value):
                raise ValueError
            value = kind(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        if not (minimum <= value <= maximum and value < below):
            limits = f" and below {below:g}" if below < math.inf else ""
            limits += f" and at most {maximum:,}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {minimum:g}{limits}")
        return value

    read.maximum = maximum  # type: ignore[attr-defined]  # for those who write the help
    return read


LARGEST = 2**63 - 1  # what a signed 64-bit integer holds: no count is larger
COUNT = number(int, minimum=1, maximum=LARGEST)  # 1, 2, ...
AMOUNT = number(int, minimum=0, maximum=LARGEST)  # 0, 1, 2, ...
SEED = number(int, minimum=0, maximum=LARGEST)
REAL = number(float, minimum=0, maximum=1e12)
SHARE = number(float, minimum=0, below=1)  # [0, 1)
PROBABILITY = number(float, minimum=0, maximum=1)  # [0, 1]
