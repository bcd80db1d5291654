"""Engines: where units of work run. Results come in the order of the tasks, whoever makes them.

    with workers(work, num_proc=4) as callables:        # work(task) yields results
        for result in run_in_order(tasks, callables):   # those of the first task first
            ...

`run_in_order` needs callables alone: each is called with one task after the other, in a thread of
its own, and yields the task's results. That is the engine of one machine, of threads or processes.
A cluster builds in steps that are published (see staged.py), by an `Engine`; ENGINES has a line for
each.
"""

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pretrain.errors import UserError
from pretrain.tokens import transfer

# Where units run, by the name that --engine takes: the function that builds a request's shards.
# Its module is loaded when it is chosen.
ENGINES = {
    "local": "pretrain.tokens.command:build_here",
    "ray": "pretrain.tokens.ray_engine:build_on_ray",
}
# Threads of one process: on more cores than these gigatoken starts threads of its own.
MAX_THREADS = 8
NETWORK_THREADS = 4  # at least, where they wait for the network
WAITING_RESULTS = 4  # results that a task may be ahead of its reader: bounds the memory

Result = tuple[Any, Any]  # of a task: itself, and what a function made of it

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[T], Iterator[R]]


def load_engine(name: str) -> Callable[..., Any]:
    """The function of ENGINES that builds shards: (request, source, folder, work, *, name, tokens)
    to the manifest."""
    module, _, function = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), function)


class WorkerDied(UserError):
    """A worker process ended before its work did."""


class Engine(Protocol):
    """Where units run, and nothing else."""

    workers: int

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Result]:
        """(task, function(task)) for every task, in the order in which they end. `tasks` is read
        when a worker is free; None in it: read on after the next result. A worker that dies is
        replaced and its task is run again; an exception of the function is raised here."""


class DirectEngine:
    """One task after the other, in this process."""

    workers = 1

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Result]:
        """See Engine."""
        for task in tasks:
            if task is not None:
                yield task, function(task)


@contextlib.contextmanager
def workers(
    work: Work, num_proc: int = 1, *, waits_for_network: bool = False
) -> Iterator[Sequence[Work]]:
    """Callables that do `work`: threads of this process for num_proc 1, else so many processes."""
    if num_proc > 1:
        with worker_processes(num_proc, work, may_fork=not waits_for_network) as callables:
            yield callables
    else:
        least = NETWORK_THREADS if waits_for_network else 1
        yield [work] * max(min(cores(), MAX_THREADS), least)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_order(tasks: Iterable[T], workers: Sequence[Work]) -> Iterator[Any]:
    """Call a worker with each task, every worker in its own thread; yield what the calls yield, in
    task order.

    An exception of a call is raised at its place in the order. `tasks` is read as it is needed.
    """
    assigned: queue.SimpleQueue = queue.SimpleQueue()  # (task, where its results go); None: the end
    stopped = threading.Event()
    for worker in workers:
        threading.Thread(target=_serve, args=(worker, assigned, stopped), daemon=True).start()
    pending: deque[queue.Queue] = deque()
    tasks = iter(tasks)
    try:
        while True:
            while len(pending) < 2 * len(workers):
                try:
                    task = next(tasks)
                except StopIteration:
                    break
                pending.append(queue.Queue(WAITING_RESULTS))
                assigned.put((task, pending[-1]))
            if not pending:
                return
            yield from _results(pending.popleft())
    finally:
        stopped.set()
        for _ in workers:
            assigned.put(None)


@dataclass
class _End:
    """Ends the results of a task."""

    error: BaseException | None = None


def _serve(worker: Work, assigned: queue.SimpleQueue, stopped: threading.Event) -> None:
    while (item := assigned.get()) is not None and not stopped.is_set():
        task, results = item
        end = _End()
        try:
            for result in worker(task):
                if not _put(results, result, stopped):
                    return
        except BaseException as error:  # it belongs to the one who waits for the results
            end = _End(error)
        _put(results, end, stopped)


def _put(results: queue.Queue, item: Any, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        with contextlib.suppress(queue.Full):
            results.put(item, timeout=0.2)
            return True
    return False


def _results(results: queue.Queue) -> Iterator:
    while True:
        try:
            item = results.get(timeout=0.5)  # for ever, Windows would hear no Ctrl-C
        except queue.Empty:
            continue
        if isinstance(item, _End):
            if item.error:
                raise item.error
            return
        yield item


# ---- worker processes


@contextlib.contextmanager
def worker_processes(
    count: int, work: Work, *, may_fork: bool = False
) -> Iterator[list["_Worker"]]:
    """`count` processes for run_in_order: calling one runs `work` (picklable) in its process.

    They end with the block, and by themselves when this process is killed. may_fork: they may begin
    as copies of this one, in which everything is loaded already.
    """
    # A fresh process works everywhere and inherits no thread's locks, but loads everything anew.
    is_forked = may_fork and sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if is_forked else "spawn")
    started: list[_Worker] = []
    try:
        with (
            _interrupt_ignored()
        ):  # inherited: Ctrl-C reaches all, and what it means is ours to say
            for _ in range(count):
                started.append(_Worker(context, work))
        yield started
    finally:
        for worker in started:
            worker.process.kill()
        for worker in started:
            worker.process.join()


@contextlib.contextmanager
def _interrupt_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Worker:
    """A process that does one task after the other, as they are called for."""

    def __init__(self, context: Any, work: Work):
        tasks, self.tasks = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        transfer.widen(results)
        ends = (tasks, results)
        self.process = context.Process(target=_serve_process, args=(*ends, work), daemon=True)
        self.process.start()
        for end in ends:
            end.close()

    def __call__(self, task: Any) -> Iterator:
        try:
            self.tasks.send(task)
            while not isinstance(reply := transfer.receive(self.results), _End):
                yield reply
        except (EOFError, OSError):
            self.process.join(5)
            raise WorkerDied(
                f"worker process {self.process.pid} died (exit code {self.process.exitcode}; -9 "
                "often is a lack of memory, and --num_proc 1 needs the least); the same command "
                "continues"
            ) from None
        if reply.error:
            raise reply.error


def _serve_process(tasks: Any, results: Any, work: Work) -> None:
    for number in signal.valid_signals():  # a copy has its parent's handlers
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone or no longer interested
        while True:
            task = tasks.recv()
            end = _End()
            try:
                for result in work(task):
                    transfer.send(results, result)
            except (UserError, OSError, MemoryError) as error:
                end = _End(error)
            except Exception:
                end = _End(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            transfer.send(results, end)


def _end_with_parent() -> None:
    """A worker whose parent was killed must not live on, whatever it is waiting for."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
