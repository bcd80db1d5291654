"""EleutherAI's harness on a checkpoint, without an export: any of its tasks, and one's own.

    $ python -m adapters.lm_eval --checkpoint checkpoints/mine --tasks hellaswag,lambada_openai,piqa
    step 3,400, hellaswag        acc 0.2891 +- 0.0045   acc_norm 0.3108 +- 0.0046   10,042 examples
    ...
    $ python -m adapters.lm_eval --checkpoint checkpoints/mine --tasks piqa --follow

The numbers are appended to lm_eval.jsonl beside the checkpoint, from where python -m
pretrain.report and the model card of an export take them. What the harness itself reports, with
versions and settings, goes into lm_eval-{step}.json. --follow scores each new checkpoint of a
training that goes on, and ends with it.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import AdapterError, require
from pretrain import files
from pretrain.errors import UserError, program, say
from pretrain.eval.arguments import add_device_flags, add_model_flags, new_parser, parse_or_exit
from pretrain.flags import AMOUNT, COUNT, REAL
from pretrain.report.runlog import FILE_NAME, provenance
from pretrain.report.runs import HARNESS, LOCK, harness_records

if TYPE_CHECKING:
    from adapters.harness_model import CheckpointModel

PROGRAM = "python -m adapters.lm_eval"
STYLE = "lm-eval"
AT_EVALUATIONS = re.compile(r"iter-(\d+)-loss-.*\.pt")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        PROGRAM,
        f"{PROGRAM} [--checkpoint PATH | --model NAME] --tasks NAME,NAME [options]",
        "Score a checkpoint on tasks of EleutherAI's lm-evaluation-harness.",
    )
    add_model_flags(parser)
    # fmt: off
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", default="", metavar="NAME,NAME",
        help="tasks or groups of the harness, such as hellaswag,lambada_openai,arc_easy,piqa")
    add("--include_path", type=Path, metavar="DIR",
        help="a folder with further tasks as the harness's YAML files, which may name local data")
    add("--num_fewshot", type=AMOUNT, metavar="N",
        help="solved examples in front of each question (default: as the task has it)")
    add("--limit", type=COUNT, metavar="N", help="only the first N examples of each task")
    group = parser.add_argument_group("computation")
    group.add_argument("--batch_tokens", type=COUNT, metavar="N",
        help="positions in a batch, which bounds the memory (default: 1024 on cpu, 16384 on cuda)")
    add_device_flags(group, "computation")
    add = parser.add_argument_group("results").add_argument
    add("--output", type=Path, metavar="DIR",
        help=f"folder for {HARNESS} and lm_eval-STEP.json (default: that of the checkpoint)")
    add("--follow", action="store_true",
        help="score the checkpoints that are there and each new one, until the training ends")
    add("--poll_seconds", type=REAL, default=10.0, metavar="S",
        help="how often to look for a new one (default: 10)")
    # fmt: on
    return parser


class Harness:
    """The harness with its tasks, for one checkpoint after the other."""

    def __init__(self, args: argparse.Namespace):
        """Raises UserError where a task does not exist or its data cannot be had."""
        require("lm_eval")
        from lm_eval.tasks import TaskManager

        self.args = args
        self.tasks = [name for name in args.tasks.split(",") if name]
        folder = str(args.include_path) if args.include_path else None
        # The harness reads thousands of files to know its own tasks: not where none is asked for.
        self.manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder and self._unknown():
            self.manager = TaskManager(include_path=folder)
        if unknown := self._unknown():
            raise AdapterError(
                f"--tasks {','.join(unknown)}: not known to the harness; `lm_eval ls tasks` lists"
                " its tasks, --include_path adds a folder of your own"
            )

    def _unknown(self) -> list[str]:
        return [name for name in self.tasks if not self.manager.match_tasks([name])]

    def score(self, model: "CheckpointModel") -> dict[str, Any]:
        """What the harness reports. Raises UserError where it cannot get a task's data."""
        import lm_eval

        try:
            return lm_eval.simple_evaluate(
                model,
                tasks=self.tasks,
                num_fewshot=self.args.num_fewshot,
                limit=self.args.limit,
                task_manager=self.manager,
                log_samples=False,
            )
        except (OSError, ValueError) as error:  # data sets that are not here, and no network
            raise AdapterError(f"{','.join(self.tasks)}: {error}") from error


def open_for_harness(
    args: argparse.Namespace, checkpoint: Path | None
) -> tuple["CheckpointModel", dict[str, Any]]:
    """The model as the harness takes it, and what pretrain.eval.loading says about it."""
    from pretrain.distributed import pick_device, pick_dtype
    from pretrain.eval.loading import open_model, user_errors

    model, about = open_model(checkpoint, args.model, any_tokenizer=args.any_tokenizer)
    with user_errors():
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
    from adapters.harness_model import CheckpointModel

    asked = CheckpointModel(
        model.to(device), device=device, dtype=dtype, batch_tokens=args.batch_tokens
    )
    return asked, about


def summaries(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{task: numbers} of what the harness reports: "acc,none" is acc, "acc_stderr,none" its
    standard error, "exact_match,strict-match" keeps its filter."""
    found: dict[str, dict[str, Any]] = {}
    for task, values in report["results"].items():
        count = report.get("n-samples", {}).get(task, {}).get("effective")
        numbers = {} if count is None else {"n": count}
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind:
                numbers[name if kind == "none" else key] = value
        found[task] = {"style": STYLE, **numbers}
    return found


def lines(step: int | None, tasks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for people for each task."""
    where = "" if step is None else f"step {step:,}, "
    width = max(map(len, tasks), default=0)
    for task, numbers in tasks.items():
        parts = []
        for name, value in numbers.items():
            if name in ("style", "n") or "_stderr" in name:
                continue
            metric, comma, kind = name.partition(",")
            error = numbers.get(f"{metric}_stderr{comma}{kind}")
            parts.append(f"{name} {value:.4f}" + (f" +- {error:.4f}" if error else ""))
        if "n" in numbers:
            parts.append(f"{numbers['n']:,} examples")
        yield f"{where}{task:{width}}  " + "   ".join(parts)


def score_one(args: argparse.Namespace, harness: Harness, checkpoint: Path | None) -> None:
    """Score, write, print."""
    model, about = open_for_harness(args, checkpoint)
    report = harness.score(model)
    tasks, step = summaries(report), about.get("step")
    read = Path(about["name"])
    folder = args.output or (read if read.is_dir() else read.parent)
    if folder.is_dir():  # not so for a model of the hub, without --output
        record = {"event": "eval", "time": round(time.time(), 3), "step": step or 0, "tasks": tasks}
        append(folder / HARNESS, record)
        whole = {"model": about, **_plain(report), **provenance()}
        files.write_json(folder / f"lm_eval-{step or 0}.json", whole)
    for line in lines(step, tasks):
        print(line, flush=True)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line. Written anew as a whole, so that no reader ever sees half of one."""
    with files.lock(path.with_name(f".{path.name}.lock"), f"{path}: another process writes here"):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        files.write_text(path, before + json.dumps(record) + "\n")


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """What of the harness's report is JSON; functions of a task's configuration are named."""
    return json.loads(json.dumps(report, default=str))


def follow(args: argparse.Namespace, harness: Harness) -> None:
    """Score each checkpoint of a run's folder once, in the order of their steps, until the run is
    over. One that cannot be read is one that was replaced meanwhile, and is passed over."""
    run = args.checkpoint
    seen = {record["step"] for record in harness_records(run) if _has(record, harness)}
    while True:
        going = files.is_locked(run / LOCK)  # asked first: what a run leaves at its end is seen
        new = sorted(
            (int(match[1]), path)
            for path in run.glob("iter-*.pt")
            if (match := AT_EVALUATIONS.fullmatch(path.name)) and int(match[1]) not in seen
        )
        for step, path in new:
            seen.add(step)
            try:
                score_one(args, harness, path)
            except UserError as error:
                if path.exists():
                    say(PROGRAM, str(error), kind="warning")
        if not going and not new:
            return
        if not new:
            time.sleep(args.poll_seconds)


def _has(record: dict[str, Any], harness: Harness) -> bool:
    return set(harness.tasks) <= set(record.get("tasks", {}))


def run(args: argparse.Namespace) -> None:
    harness = Harness(args)
    if args.follow:
        follow(args, harness)
    else:
        score_one(args, harness, args.checkpoint)


def problems_of(args: argparse.Namespace) -> list[str]:
    """What is missing or contradicts itself among the flags."""
    found = [] if args.tasks else ["--tasks: name at least one, such as hellaswag,piqa"]
    if args.follow and (args.checkpoint is None or not (args.checkpoint / FILE_NAME).is_file()):
        found.append(f"--follow: --checkpoint must name the folder of a run, with a {FILE_NAME}")
    for name in ("include_path", "output"):
        folder = getattr(args, name)
        if folder and not folder.is_dir():
            found.append(f"--{name} {folder}: no such folder")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_or_exit(build_parser(), argv)
    if problems := problems_of(args):
        for problem in problems:
            say(PROGRAM, problem)
        return 2
    with program(PROGRAM, less_memory="a smaller --batch_tokens") as outcome:
        run(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
