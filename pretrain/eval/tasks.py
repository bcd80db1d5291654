"""What a model can be asked at evaluations besides its loss: a table of tasks, and their protocol.

    tasks = [HellaSwag(limit=200), MultipleChoice("mine", "mine.jsonl")]
    for task in tasks:
        summary = task.score(model, dtype=torch.bfloat16, ranks=ranks, interrupted=stop.is_set)
        if summary is not None:        # {"style": "completion", "n": 200, "acc": 0.28, ...}
            summaries[task.name] = summary

A further task is a class here with a line in TASKS. The log, the report, the console and the model
card know summaries by their name and nothing else of a task. All ranks make a task and score it
together. A task stops no training: what is wrong is one warning, and then there is no summary.
"""

import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pretrain.distributed import Ranks, environment
from pretrain.errors import UserError
from pretrain.eval.hellaswag import Example, data_path, ensure_data, load_with_hash
from pretrain.eval.scoring import score_examples
from pretrain.flags import named_files
from pretrain.report.console import silent
from pretrain.report.known import title
from pretrain.tokens.tokenizer import TokenizerUnavailable, load_encoding
from pretrain.train.settings import TrainSettings


class Task(Protocol):
    """Something that a model is scored on."""

    name: str  # in the log: [a-z0-9_-]

    def score(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        ranks: Ranks,
        interrupted: Callable[[], bool],
        progress: Callable[[str, int, int], None] = silent,
    ) -> dict[str, Any] | None:
        """The numbers as JSON takes them, the same on every rank: n, acc, acc_norm, acc_stderr,
        acc_norm_stderr, style. None: there are none (yet), or `interrupted` said so on a rank.
        progress is told the task, and how many of how many batches are done."""
        ...


class MultipleChoice:
    """A file in HellaSwag's format, .jsonl or .jsonl.gz: a context and four endings a line."""

    def __init__(
        self,
        name: str,
        file: str | Path,
        limit: int | None = None,
        *,
        style: str = "completion",
        batch_tokens: int | None = None,
    ):
        """limit: examples, always the same random choice (None or 0: all). batch_tokens: positions
        in a batch, which bounds the memory (default: by device)."""
        self.name, self.limit, self.style = name, limit, style
        self.batch_tokens = batch_tokens
        self._file = Path(file)
        self._examples: list[Example] | None = None
        self._is_left_out = False

    def score(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        ranks: Ranks,
        interrupted: Callable[[], bool] = lambda: False,
        progress: Callable[[str, int, int], None] = silent,
    ) -> dict[str, Any] | None:
        """See Task.score."""
        if self._is_left_out or not self._is_ready(ranks):
            return None
        try:
            if self._examples is None:
                self._examples = self._load(ranks)
            result = score_examples(
                model,
                self._examples,
                style=self.style,
                batch_tokens=self.batch_tokens,
                dtype=dtype,
                rank=ranks.rank,
                world_size=ranks.world_size,
                group=ranks.control,
                interrupted=interrupted,
                advance=partial(progress, self.name),
            )
        except (UserError, TokenizerUnavailable) as error:
            self._leave_out(str(error), ranks)
            return None
        return result.summary() if result else None

    def _is_ready(self, ranks: Ranks) -> bool:
        """Whether the file is where `_file` says, on every node; the same answer on every rank."""
        return True

    def _load(self, ranks: Ranks) -> list[Example]:
        """The examples, by every rank from the disk of its node."""
        ranks.on_all(load_encoding)  # so that a rank without it does not leave the others waiting
        examples, sha256 = ranks.on_all(load_with_hash, self._file, self.limit)
        refuse_other_files(self._file, sha256, ranks)
        return examples

    def _leave_out(self, problem: str, ranks: Ranks) -> None:
        self._is_left_out = True
        if ranks.is_first:
            print(f"warning: {title(self.name)} is left out: {problem}", file=sys.stderr)


def refuse_other_files(path: Path, sha256: str, ranks: Ranks) -> None:
    """Called by all ranks: UserError where a node has another file than the others, whose losses
    could not be added up."""
    if len(set(ranks.gather(sha256))) > 1:
        error = UserError(f"{path}: not the same file on all nodes; copy one to all")
        error.on_all_ranks = True
        raise error


class HellaSwag(MultipleChoice):
    """The published file, once it is there: on each node the first process of that node downloads
    it beside the training."""

    def __init__(
        self,
        file: str | Path | None = None,
        limit: int | None = None,
        *,
        wait_seconds: float | None = 2.0,
        **options: Any,
    ):
        """file: a copy to take instead. wait_seconds: for a download to end, at most (None: as
        long as it takes)."""
        super().__init__("hellaswag", file or data_path(), limit, **options)
        self._is_here = file is not None or environment("LOCAL_RANK", 0) > 0
        self._problem: str | None = None
        if not self._is_here:
            self._thread = threading.Thread(target=self._download, daemon=True)
            self._thread.start()
            self._thread.join(wait_seconds)

    def _download(self) -> None:
        # Its retries are not for the console of a run.
        logging.getLogger("pretrain.text.ranges").setLevel(logging.ERROR)
        try:
            ensure_data()
            self._is_here = True
        except Exception as error:  # nothing that a download does is a reason to stop
            self._problem = str(error)

    def _is_ready(self, ranks: Ranks) -> bool:
        if self._examples is not None:  # on one rank, then on all
            return True
        states = ranks.gather((self._is_here, self._problem))
        if problem := next((problem for _, problem in states if problem), None):
            self._leave_out(problem, ranks)
        return problem is None and all(is_here for is_here, _ in states)


TASKS: dict[str, Callable[..., Task]] = {"hellaswag": HellaSwag}


def parse_tasks(words: list[str]) -> dict[str, str | None]:
    """{name: file} for words such as NAME=FILE, a file in HellaSwag's format, or the NAME of a task
    in TASKS. Raises UserError that says what is wrong with the first bad one.

    >>> parse_tasks(["trivia=trivia.jsonl"])
    {'trivia': 'trivia.jsonl'}
    """
    return named_files(words, TASKS)


def open_tasks(
    wanted: dict[str, str | None], limit: int | None = None, wait_seconds: float | None = 2.0
) -> list[Task]:
    """The tasks that parse_tasks found, on every rank."""
    tasks: list[Task] = []
    for name, file in wanted.items():
        if name in TASKS:
            tasks.append(TASKS[name](file, limit, wait_seconds=wait_seconds))
        elif file is not None:
            tasks.append(MultipleChoice(name, file, limit))
    return tasks


def tasks_of(settings: TrainSettings, device: torch.device) -> list[Task]:
    """The tasks of a training run, on every rank: HellaSwag where it is wanted, and each --task."""
    is_chosen = "hellaswag_limit" in settings.given or device.type == "cuda"
    limit = settings.hellaswag_limit if is_chosen else 200
    tasks = open_tasks(parse_tasks(settings.task or []), limit)
    if settings.hellaswag:
        wait = None if settings.eval_only else 2.0
        tasks.insert(0, HellaSwag(settings.hellaswag_data, limit, wait_seconds=wait))
    return tasks
