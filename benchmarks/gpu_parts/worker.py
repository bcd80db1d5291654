"""Where things run: a process of its own on a GPU, since one that fails there takes all that its
process holds along; the same process in small.

    worker = Process(place_words, log)          # or Here(place, folder)
    worker.ask({"do": "check", "name": "resume"}, seconds=60)

An answer is a dict: {"ok": ...}, {"skipped": why} or {"failed": why}. Gone is raised for a process
that ended or took too long; it is no longer there then.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class Gone(Exception):
    """A worker ended, or did not answer in time."""


class Process:
    """A worker in a process of its own."""

    def __init__(self, words: list[str], log: Path):
        """words: the command; log: where its stderr goes."""
        self.log = log
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
            )

    def tell(self, message: Answer) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):  # what it has died of is said by hear()
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, seconds: float) -> Answer:
        """Its next answer. Raises Gone."""
        line, deadline = b"", time.monotonic() + seconds
        assert self._process.stdout
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise Gone(f"no answer within {seconds:.0f} s")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    status = self._process.wait()
                    raise Gone(f"ended with status {status}: {self._last_words()}")
                line += part
        return json.loads(line)

    def ask(self, message: Answer, seconds: float) -> Answer:
        self.tell(message)
        return self.hear(seconds)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "nothing on stderr"


class Here:
    """A worker in this process. What it prints goes to a file, as that of others does."""

    def __init__(self, session: "Session", log: Path):
        self._session, self._log, self._answers = session, log, []

    def tell(self, message: Answer) -> None:
        with (
            open(self._log, "a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            self._answers.append(self._session.answer(message))

    def hear(self, seconds: float) -> Answer:
        return self._answers.pop(0)

    def ask(self, message: Answer, seconds: float) -> Answer:
        self.tell(message)
        return self.hear(seconds)

    def close(self) -> None:
        import torch

        self._session.close()
        torch._dynamo.reset()  # with a process, what it has compiled is gone too


class Session:
    """What a worker holds between two messages: the variant that it has built."""

    def __init__(self, place: Any, folder: Path):
        self.place, self.folder = place, folder
        self._stack, self._step = contextlib.ExitStack(), None

    def answer(self, message: Answer) -> Answer:
        from pretrain.errors import UserError, first_line

        from .checks import Skipped

        try:
            return getattr(self, f"do_{message['do']}")(message)
        except (Skipped, UserError) as error:
            return {"skipped": first_line(error)}
        except Exception as error:
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {first_line(error)[:300]}"}

    def do_task(self, message: Answer) -> Answer:
        from . import tasks

        known = tasks.TASKS | {"machine": tasks.machine}
        return {"ok": known[message["name"]](self.place, self.folder)}

    def do_check(self, message: Answer) -> Answer:
        import torch

        from .checks import CHECKS

        torch.set_float32_matmul_precision("highest")  # a check before may have changed it
        return {"ok": CHECKS[message["name"]](self.place, self.folder)}

    def do_build(self, message: Answer) -> Answer:
        """Build a variant and make its first updates, in which it is compiled."""
        from .variants import Variant, build, timed

        self.close()
        self._step, about = build(Variant(**message["variant"]), self.place, self._stack)
        first = [timed(self._step, self.place.device) for _ in range(message["warm_up"])]
        return {"ok": about | {"first_loss": first[0][1], "first_seconds": first[0][0]}}

    def do_step(self, message: Answer) -> Answer:
        from pretrain.distributed import peak_memory

        from .variants import timed

        done = [timed(self._step, self.place.device) for _ in range(message["count"])]
        memory = peak_memory(self.place.device)
        return {"ok": {"seconds": [s for s, _ in done], "loss": done[-1][1], "memory": memory}}

    def close(self) -> None:
        self._step = None
        self._stack.close()
        self._stack = contextlib.ExitStack()


def serve(place: Any, folder: Path) -> int:
    """Answer messages on stdin until it ends. What else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session(place, folder)
    for line in sys.stdin:
        print(json.dumps(session.answer(json.loads(line))), file=answers, flush=True)
    return 0
