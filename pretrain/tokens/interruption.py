"""Signals that ask a build to stop: the main thread ends it, and says what a rerun will find."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from pretrain.errors import Outcome

# A closed terminal sends SIGHUP, Slurm before its time limit what --signal says, often SIGUSR1.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Stopped(BaseException):
    """One of STOP_SIGNALS came. `note` says what is there now."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.note = "no shard was finished yet, the same command starts again"


@contextlib.contextmanager
def stopped_by_signals(name: str, outcome: Outcome) -> Iterator[None]:
    """The first of STOP_SIGNALS raises Stopped in the main thread, which ends the block with a line
    and status 128 + its number; the second one ends the process at once. Signals that are ignored,
    as SIGHUP is under nohup, stay so."""

    def stop(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        numbers = [getattr(signal, each) for each in STOP_SIGNALS if hasattr(signal, each)]
        before = {each: signal.getsignal(each) for each in numbers}
        before = {each: was for each, was in before.items() if was != signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, stop)
        yield
    except Stopped as stopped:
        outcome.status = 128 + stopped.number
        line = f"{name}: stopped by {signal.Signals(stopped.number).name}; {stopped.note}"
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
