"""From units of documents to tokens: many units side by side, results in document order.

    for batch in tokenize_units(source, units, Tokenizer(), num_proc=2):     # TokenBatch, in
    document order
        ...                                                                  #
        pretrain.tokens.packing makes shards

Which process tokenizes which unit, and when, does not show: what comes out depends on the source
alone.
"""

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pretrain.text import arrow
from pretrain.text.documents import Source, SourceError, Unit, place, read_unit
from pretrain.tokens.tokenizer import Tokenizer, TokenMismatch

UNIT_BYTES = (
    8 << 20
)  # stored bytes of text in a unit: a few batches, so that their order holds nobody up
MAX_THREADS = (
    8  # that read and tokenize in one process: on more cores gigatoken starts threads of its own
)
HUB_THREADS = 4  # at least, where they wait for the network
WAITING_RESULTS = 4  # batches that a unit may be ahead of the packer: bounds the memory

Task = tuple[Unit, int]  # and the number of its rows to leave out
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class TokenBatch:
    """Consecutive rows of a unit as tokens."""

    unit: Unit
    tokens: np.ndarray  # (sum of counts,) uint16: [END_OF_TEXT] and ids per document
    counts: np.ndarray  # (documents,) int64, tokens per document with its END_OF_TEXT
    rows: np.ndarray  # (documents,) int64, counted from the unit's first row
    offsets: (
        np.ndarray | None
    )  # (documents,) int64, byte where each begins; plain jsonl and txt only
    next_row: int  # the row after this batch, counted from the unit's first row
    skipped: dict[str, np.ndarray]  # int64 rows left out, by reason
    token_counts: np.ndarray | None  # (documents,) int64, what the source itself says
    text_bytes: int  # UTF-8 bytes of the texts


def tokenize_unit(
    task: Task, source: Source, tokenizer: Tokenizer, on_bad_document: str
) -> Iterator[TokenBatch]:
    """Read and tokenize one unit. Raises SourceError, also where gigatoken and tiktoken differ."""
    unit, skip_rows = task
    # Which documents are checked against tiktoken must not need the count of those before the unit.
    # A start that differs by unit gives each document the same chance; the very first document is
    # always checked.
    index = zlib.crc32(b"%d %d" % (unit.file, unit.start)) if unit.file or unit.start else 0
    next_row = skip_rows
    for batch in read_unit(source, unit, skip_rows=skip_rows, on_bad_document=on_bad_document):
        try:
            tokens, counts = tokenizer.encode_documents(batch.texts, first_document=index)
        except TokenMismatch as mismatch:
            offset = None if batch.offsets is None else batch.offsets[mismatch.index]
            where = place(source.files[unit.file], unit, batch.rows[mismatch.index], offset)
            what = str(mismatch).partition(": ")[2]  # it knows the document by our index alone
            raise SourceError(f"{where}: {what}") from None
        index += len(counts)
        next_row += batch.num_rows
        yield TokenBatch(
            unit,
            tokens,
            counts,
            batch.rows,
            batch.offsets,
            next_row,
            batch.skipped,
            batch.token_counts,
            int(arrow.lengths(batch.texts).sum()),
        )


def tokenize_units(
    source: Source,
    units: Iterable[Unit],
    tokenizer: Tokenizer,
    *,
    num_proc: int = 1,
    skip_rows: int = 0,
    on_bad_document: str = "stop",
) -> Iterator[TokenBatch]:
    """The units' tokens in order; of the first unit the first `skip_rows` rows are left out.

    num_proc 1: threads of this process. More: that many worker processes, each on one core. Raises
    SourceError when a document or a worker fails.
    """
    work = functools.partial(
        tokenize_unit, source=source, tokenizer=tokenizer, on_bad_document=on_bad_document
    )
    tasks = ((unit, skip_rows if i == 0 else 0) for i, unit in enumerate(units))
    if num_proc == 1:
        threads = max(min(cores(), MAX_THREADS), HUB_THREADS if source.files[0].url else 1)
        yield from run_in_order(tasks, [work] * threads)
        return
    with worker_processes(num_proc, work) as workers:
        yield from run_in_order(tasks, workers)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_order(tasks: Iterable[T], lanes: Sequence[Callable[[T], Iterator[R]]]) -> Iterator[R]:
    """Call a lane with each task, every lane in its own thread; yield what the calls yield, in task
    order.

    An exception of a call is raised at its place in the order. `tasks` is read as it is needed.
    """
    assigned: queue.SimpleQueue = (
        queue.SimpleQueue()
    )  # (task, where its results go); None ends a lane
    stopped = threading.Event()
    for lane in lanes:
        threading.Thread(target=_serve_lane, args=(lane, assigned, stopped), daemon=True).start()
    pending: deque[queue.Queue] = deque()
    tasks = iter(tasks)
    try:
        while True:
            while len(pending) < 2 * len(lanes):
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
        for _ in lanes:
            assigned.put(None)


@dataclass
class _End:
    """Ends the results of a task."""

    error: BaseException | None = None


def _serve_lane(lane: Callable, assigned: queue.SimpleQueue, stopped: threading.Event) -> None:
    while (item := assigned.get()) is not None and not stopped.is_set():
        task, results = item
        end = _End()
        try:
            for result in lane(task):
                if not _put(results, result, stopped):
                    return
        except (
            BaseException
        ) as error:  # whatever it is, it belongs to the one who waits for the results
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
            item = results.get(
                timeout=0.5
            )  # not for ever: on Windows a wait without end hears no Ctrl-C
        except queue.Empty:
            continue
        if isinstance(item, _End):
            if item.error:
                raise item.error
            return
        yield item


# ---- worker processes


@contextlib.contextmanager
def worker_processes(count: int, work: Callable[[T], Iterator[R]]) -> Iterator[list["_Worker"]]:
    """`count` fresh processes as lanes for run_in_order: calling one runs `work` (picklable) in its
    process.

    They end with the block, and by themselves when this process is killed.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # works everywhere, and inherits no locks from our threads
    workers: list[_Worker] = []
    try:
        with (
            _interrupt_ignored()
        ):  # inherited: Ctrl-C reaches all, and what it means is ours to say
            for _ in range(count):
                workers.append(_Worker(context, work))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
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
    def __init__(self, context, work: Callable):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve_process, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, task: Any) -> Iterator:
        try:
            self.connection.send(task)
            while not isinstance(reply := self.connection.recv(), _End):
                yield reply
        except (EOFError, OSError):
            self.process.join(5)
            raise SourceError(
                f"worker process {self.process.pid} died (exit code {self.process.exitcode}; -9 often is a "
                "lack of memory, and --num_proc 1 needs the least); the same command continues"
            ) from None
        if reply.error:
            raise reply.error


def _serve_process(connection, work: Callable) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone or no longer interested
        while True:
            task = connection.recv()
            end = _End()
            try:
                for result in work(task):
                    connection.send(result)
            except SourceError as error:
                end = _End(error)
            except Exception:
                end = _End(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            connection.send(end)


def _end_with_parent() -> None:
    """A worker whose parent was killed must not live on, whatever it is waiting for."""
    multiprocessing.parent_process().join()
    os._exit(1)
