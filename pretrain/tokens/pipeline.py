"""From units of documents to tokens: many units side by side, results in document order.

    for batch in tokenize_units(source, units, Tokenizer(), num_proc=2):    # in document order
        packer.add(batch)                                                   # TokenBatch -> shards

Which process tokenizes which unit, and when, does not show: what comes out depends on the source
alone.
"""

import functools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.text import arrow
from pretrain.text.documents import Source, SourceError, Unit, place, read_unit
from pretrain.tokens import engines
from pretrain.tokens.tokenizer import Tokenizer, TokenMismatch

# Stored bytes of text in a unit: a few batches, so that their order keeps nobody waiting.
UNIT_BYTES = 8 << 20

Task = tuple[Unit, int]  # and the number of its rows to leave out


@dataclass
class TokenBatch:
    """Consecutive rows of a unit as tokens."""

    unit: Unit
    tokens: np.ndarray  # (sum of counts,) uint16: [END_OF_TEXT] and ids per document
    counts: np.ndarray  # (documents,) int64, tokens per document with its END_OF_TEXT
    rows: np.ndarray  # (documents,) int64, counted from the unit's first row
    # (documents,) int64, byte where each begins; plain jsonl and txt only
    offsets: np.ndarray | None
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
    SourceError when a document fails, WorkerDied when a process does.
    """
    work = functools.partial(
        tokenize_unit, source=source, tokenizer=tokenizer, on_bad_document=on_bad_document
    )
    tasks = ((unit, skip_rows if i == 0 else 0) for i, unit in enumerate(units))
    waits = source.files[0].url is not None
    with engines.workers(work, num_proc, waits_for_network=waits) as callables:
        yield from engines.run_in_order(tasks, callables)
