"""Raw text as the Hugging Face course prepares it: chunks of equal length, cut from each document.

    chunks = text_chunks(load_text(["input.txt"]), build_tokenizer(128), 128)
    train, val = split_chunks(chunks)

Chunks do not overlap, and what is shorter at a document's end is left out.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters import AdapterError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
VAL_SHARE = 0.1  # of raw text, taken from its end


def load_text(paths: Sequence[str | Path], text_column: str = "text") -> "datasets.Dataset":
    """.txt (a file is a document), .jsonl or .parquet files of one kind, as a Dataset with a column
    "text". Raises AdapterError."""
    import datasets

    suffixes = {Path(path).suffix for path in paths}
    missing = [str(path) for path in paths if not Path(path).is_file()]
    if missing or len(suffixes) != 1 or not suffixes <= set(BUILDERS):
        problem = (
            f"{missing[0]}: no such file"
            if missing
            else "files must be all .txt, .jsonl or .parquet"
        )
        raise AdapterError(problem)
    builder = BUILDERS[suffixes.pop()]
    how = {"sample_by": "document"} if builder == "text" else {}
    column = "text" if builder == "text" else text_column
    found = datasets.load_dataset(
        builder, data_files=[str(path) for path in paths], split="train", **how
    )
    if column not in found.column_names:
        raise AdapterError(
            f"{paths[0]}: no column {column!r}; it has {', '.join(found.column_names)}"
        )
    return found.select_columns([column]).rename_columns(
        {column: "text"} if column != "text" else {}
    )


def text_chunks(
    texts: "datasets.Dataset", tokenizer: "PreTrainedTokenizerBase", length: int
) -> "datasets.Dataset":
    """Rows {"input_ids": length tokens}: each text cut into chunks, the shorter one at its end left
    out."""

    named = _Named(tokenizer)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        cut = named.tokenizer(
            batch["text"],
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            return_length=True,
        )
        full = zip(cut["input_ids"], cut["length"], strict=True)
        return {"input_ids": [ids for ids, size in full if size == length]}

    chunks = texts.map(tokenize, batched=True, remove_columns=texts.column_names)
    if len(chunks) < 2:
        raise AdapterError(
            f"{len(chunks)} chunks of {length} tokens in the text: too few to train on"
        )
    return chunks


class _Named:
    """A tokenizer that pickles as one string: map() pickles its function to name what it keeps of
    it, and the 100,000 entries of a vocabulary take half a second."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.tokenizer.backend_tokenizer.to_str(),)


def split_chunks(chunks: "datasets.Dataset") -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """Training and validation parts, without shuffling: no passage is in both."""
    parts = chunks.train_test_split(test_size=max(1, int(VAL_SHARE * len(chunks))), shuffle=False)
    return parts["train"], parts["test"]


class ChunkWindows:
    """Chunks of block_size + 1 tokens with the interface of TokenWindows."""

    def __init__(self, chunks: "datasets.Dataset", seed: int):
        self.chunks = chunks.with_format("numpy")
        self.seed = seed
        self.permutation = cache(self._permutation)  # of an epoch, drawn once

    def __len__(self) -> int:
        return len(self.chunks)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        return self.chunks[numbers]["input_ids"]

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Window numbers at these positions, every epoch in an order of its own."""
        epochs, places = np.divmod(positions, len(self))
        return np.array(
            [self.permutation(e)[p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)]
        )

    def in_order(self, positions: np.ndarray) -> np.ndarray:
        return positions % len(self)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))
