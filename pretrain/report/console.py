"""What a run shows while it trains: a bar on a terminal, a line now and then elsewhere.

    console = Console(max_iters=5000, step=0)
    console.train(record)          # a "train" record of the run log
    console.say("step 250/5000 | val loss ...")

Whatever happens to the terminal, a run goes on: its log has every number that is shown here.
"""

import contextlib
import shutil
import sys
import textwrap
import time
from typing import Any

from pretrain.errors import release_stdout
from pretrain.report.lines import COLUMNS, train_line
from pretrain.report.runlog import duration

SAMPLE_CHARACTERS = 200  # of a sample on the console; metrics.jsonl has all of it
# tqdm's own, without its steps per second: tokens per second say more.
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SHORTEST_BAR = 5
REDRAWN_EVERY = 0.1  # seconds


def columns() -> int:
    """Width of the window that lines are shown in; COLUMNS for what is no terminal."""
    try:
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else COLUMNS
    except (OSError, ValueError, AttributeError):
        return COLUMNS


def silent(what: str, done: int, total: int) -> None:
    """Console.progress for where there is no console."""


class Console:
    """Evaluations, samples and the rest as lines; the progress between them as a bar or as
    lines."""

    def __init__(self, max_iters: int, step: int, *, enabled: bool = True):
        """enabled=False shows nothing: for all ranks but the first."""
        self.enabled, self.max_iters = enabled, max_iters
        self._first_step, self._started, self._drawn = step, time.monotonic(), 0.0
        self._is_estimated = False
        self.bar: Any = None  # only on a terminal
        if enabled and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=max_iters,
                initial=step,
                bar_format=BAR,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def say(self, text: str) -> None:
        """A line that stays, above the bar where there is one. A reader of stdout that goes away
        (`| head`, a closed terminal) ends the lines and not the run."""
        if not self.enabled:
            return
        try:
            if self.bar is None:
                print(text, flush=True)
            else:
                self.bar.write(text, file=sys.stdout)
        except UnicodeEncodeError:  # a console that knows few letters
            encoding = sys.stdout.encoding or "ascii"
            self.say(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            self._fall_silent()

    def train(self, record: dict[str, Any]) -> None:
        """A "train" record as a line, or as the state of the bar."""
        if not self.enabled:
            return
        if self.bar is None:
            self.say(train_line(record, self.max_iters, self._times(record["step"]), columns()))
            self._estimate(record)
            return
        parts = [
            f"loss {record['loss']:.4f}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            f"norm {record['grad_norm']:.2f}",
        ]
        parts += [] if record.get("mfu") is None else [f"mfu {record['mfu']:.1%}"]
        try:
            self.bar.set_postfix_str(", ".join(self._that_fit(parts)), refresh=False)
            self.bar.update(record["step"] - self.bar.n)
        except (OSError, ValueError):
            self._fall_silent()

    def progress(self, what: str, done: int, total: int) -> None:
        """How far an evaluation is, before the bar: "val 3/50"; nothing where done is total."""
        now = time.monotonic()
        if not self.enabled or self.bar is None:
            return
        if done < total and now - self._drawn < REDRAWN_EVERY:
            return
        self._drawn = now
        try:
            self.bar.set_postfix_str("", refresh=False)
            self.bar.set_description_str(f"{what} {done}/{total} " if done < total else "")
        except (OSError, ValueError):
            self._fall_silent()

    def _that_fit(self, parts: list[str]) -> list[str]:
        """As many of the parts as the bar has room for: tqdm would cut the last in a number."""
        # 100%|...| 20/20 [0:00:00<0:00:00, ]
        room = columns() - SHORTEST_BAR - 2 * len(str(self.max_iters)) - 29
        while parts and len(", ".join(parts)) > room:
            parts = parts[:-1]
        return parts

    def _times(self, step: int) -> str:
        """Elapsed, and what is left at the speed so far, evaluations included."""
        elapsed = time.monotonic() - self._started
        left = elapsed * (self.max_iters - step) / max(step - self._first_step, 1)
        return f"{duration(elapsed)}, {duration(left)} left"

    def _estimate(self, record: dict[str, Any]) -> None:
        """Once, where no bar shows it: how long the rest takes at the speed of the first line."""
        left = self.max_iters - record["step"]
        if self._is_estimated or left <= 0:
            return
        self._is_estimated = True
        seconds = left * record["milliseconds_per_step"] / 1000
        self.say(
            f"about {duration(seconds)} for the other {left:,} updates at this speed, and the"
            " evaluations besides"
        )

    def sample(self, record: dict[str, Any]) -> None:
        """The beginning of a "sample" record's text, on one line."""
        text = " ".join(f"{record['prompt']}{record['text']}".split())
        width = len(str(self.max_iters))
        text = textwrap.shorten(text, SAMPLE_CHARACTERS, placeholder=" ...")
        self.say(f"step {record['step']:{width}d}/{self.max_iters} | {text}")

    def close(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self.bar.close()

    def _fall_silent(self) -> None:
        self.enabled = False
        if self.bar is not None:
            self.bar.disable = True
        release_stdout()  # what else is printed goes nowhere, and so does the flush at exit
