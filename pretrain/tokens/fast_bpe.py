"""gigatoken with GPT-2's vocabulary, and where it is not GPT-2's tokenizer: some code points need
tiktoken.

GPT-2 splits text by Unicode class (letter, number, white space, anything else) before it merges
bytes. tiktoken and gigatoken carry Unicode tables of different age, so a new letter is a letter to
one and a symbol to the other. The set of these code points is derived from the packages themselves.
The one for the versions that this is tested with is stored; with others it is derived when a
tokenizer is made, in about two seconds.

    $ python -m pretrain.tokens.fast_bpe
    tiktoken 0.14.0, gigatoken 0.10.0: 4,657 code points in 26 ranges, as stored
"""

import argparse
import binascii
import json
import mmap
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import awkward as ak
    import gigatoken

STORED = Path(__file__).with_name("fast_bpe_inexact.json")
NUM_CODE_POINTS = 0x110000
LETTER, NUMBER, OTHER, SPACE = range(4)

# gigatoken 0.10 remembers the tokens of every word it has met and never forgets one.
MAX_CACHE_BYTES = 512 << 20  # growth of the process that makes it start afresh
MAX_CACHED_TEXT = (
    1 << 30
)  # bytes of text after which it does, where the size of the process is not known
SCAN_BYTES = 256 << 10  # searched at a time: fits a core's cache
# Of text, after which documents are handed over as awkward's arrays: to load that package takes as
# long as tokenizing some 60 MB, and it saves a fifth of the time from then on.
AWKWARD_FROM_BYTES = 256 << 20
SEPARATOR = b"\xff"  # which no UTF-8 text holds


class FastBPE:
    """Encodes UTF-8 documents with gigatoken, given the bytes of each token in the order of the
    ids.

    `inexact`: the code points (int64) that gigatoken classes otherwise than tiktoken does.
    `parallel`: on all cores (True), on one (False), or on all except in a multiprocessing worker
    (None).

    Threads encode side by side: gigatoken lets one at a time use a tokenizer, so there are as many
    of these as threads at work.
    """

    def __init__(self, tokens: list[bytes], inexact: np.ndarray, parallel: bool | None = None):
        self.tokens = tokens
        self.inexact = CodePointSet(inexact)
        self.parallel = parallel
        self._free = [load_gigatoken(tokens)]
        self._text_bytes, self._bytes_at_start = 0, resident_bytes()
        self._encoded_bytes = 0  # since the beginning

    def encode(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the documents data[offsets[i]:offsets[i + 1]] (uint8, int64).

        Returns the ids of all documents (uint32) and where each begins and ends in them (int64, one
        more than documents). No special token exists here: a literal <|endoftext|> is ordinary
        text.
        """
        try:
            tokenizer = self._free.pop()
        except IndexError:
            tokenizer = load_gigatoken(self.tokens)
        is_long = self._encoded_bytes >= AWKWARD_FROM_BYTES and find_spec("awkward") is not None
        encode = encode_awkward if is_long else encode_rows
        ids, starts = encode(tokenizer, data, offsets, self.parallel)
        self._text_bytes += len(data)
        self._encoded_bytes += len(data)
        if self._cache_is_full():
            self._free.clear()
            del tokenizer  # the last one: their caches go with them
            self._text_bytes, self._bytes_at_start = 0, resident_bytes()
        else:
            self._free.append(tokenizer)
        return ids, starts

    def _cache_is_full(self) -> bool:
        resident = resident_bytes()
        if resident is None:
            return self._text_bytes > MAX_CACHED_TEXT
        return resident - (self._bytes_at_start or 0) > MAX_CACHE_BYTES


def resident_bytes() -> int | None:
    """Memory that this process occupies, or None on a system that has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return None


def load_gigatoken(tokens: list[bytes]) -> "gigatoken.Tokenizer":
    """gigatoken's GPT-2 splitting with these tokens (their order: ids and merges) and no special
    token."""
    from gigatoken import Tokenizer

    encode = binascii.b2a_base64
    lines = [b"%s %d\n" % (encode(token, newline=False), i) for i, token in enumerate(tokens)]
    with tempfile.TemporaryDirectory() as folder:  # this format is read from a path only
        path = Path(folder, "ranks.tiktoken")
        path.write_bytes(b"".join(lines))
        return Tokenizer.from_tiktoken(path, pretokenizer="gpt2")


def encode_rows(
    tokenizer: "gigatoken.Tokenizer", data: np.ndarray, offsets: np.ndarray, parallel: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and starts as FastBPE.encode gives them, without loading awkward.

    gigatoken then gives a matrix with a row for each document, padded to the longest: documents of
    like length (within a power of 2) go together, so that it stays small.
    """
    from gigatoken import BytesSource

    rows = [np.empty(0, np.uint32)] * (len(offsets) - 1)
    sizes = np.frexp(np.diff(offsets))[1]  # 0 for an empty document, which has no row
    text, bounds = memoryview(data), offsets.tolist()  # type: ignore[arg-type]
    for size in np.unique(sizes[sizes > 0]).tolist():
        chosen = np.flatnonzero(sizes == size).tolist()
        joined = SEPARATOR.join([text[bounds[i] : bounds[i + 1]] for i in chosen])
        matrix, counts = tokenizer.encode_batch_padded(
            BytesSource(joined, SEPARATOR), 0, parallel=parallel
        )
        for i, row, count in zip(chosen, matrix, counts.tolist(), strict=True):
            rows[i] = row[:count]
    starts = np.cumsum([0, *map(len, rows)])
    return np.concatenate([np.empty(0, np.uint32), *rows]), starts


def encode_awkward(
    tokenizer: "gigatoken.Tokenizer", data: np.ndarray, offsets: np.ndarray, parallel: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """The same, faster once awkward is loaded."""
    encoded = tokenizer.encode_batch(awkward_strings(data, offsets), parallel=parallel).layout
    return np.asarray(encoded.content.data), np.asarray(encoded.offsets.data)


def awkward_strings(data: np.ndarray, offsets: np.ndarray) -> "ak.Array":
    """The strings data[offsets[i]:offsets[i + 1]] (uint8, int64) as gigatoken takes them, without
    copying.

    It wants 64-bit offsets and contiguous memory, so what `ak.from_arrow` makes of an Arrow array
    is refused.
    """
    import awkward as ak

    characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
    strings = {"__array__": "string"}
    return ak.Array(
        ak.contents.ListOffsetArray(ak.index.Index64(offsets), characters, parameters=strings)
    )


class CodePointSet:
    """Finds the documents that hold a code point of a set, in a few percent of the time encoding
    takes."""

    def __init__(self, code_points: np.ndarray):
        self.code_points = code_points
        self._is_member = np.zeros(NUM_CODE_POINTS, bool)
        self._is_member[code_points] = True
        self._may_begin = np.zeros((256, 256), bool)  # by the first two bytes of a member's UTF-8
        for first in {chr(code_point).encode()[:2] for code_point in code_points.tolist()}:
            self._may_begin[first[0], first[1] if len(first) > 1 else slice(None)] = True
        self._leads = np.flatnonzero(self._may_begin.any(axis=1)).astype(np.uint8)

    def documents_with_one(self, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Their indices (int64, ascending); document i is data[offsets[i]:offsets[i + 1]], valid
        UTF-8."""
        at = self._find_leads(data)  # ASCII text is done with here
        last = len(data) - 1
        at = at[self._may_begin[data[at], data[np.minimum(at + 1, last)]]]
        lead = data[at]
        length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
        code_point = lead & np.array([0, 0x7F, 0x1F, 0x0F, 0x07])[length]
        for i in (1, 2, 3):
            longer = code_point << 6 | data[np.minimum(at + i, last)] & 0x3F
            code_point = np.where(i < length, longer, code_point)
        return np.unique(
            np.searchsorted(offsets, at[self._is_member[code_point]], side="right") - 1
        )

    def _find_leads(self, data: np.ndarray) -> np.ndarray:
        found = [np.empty(0, np.int64)]
        for start in range(0, len(data), SCAN_BYTES):
            block = data[start : start + SCAN_BYTES]
            is_lead = np.zeros(len(block), bool)
            for lead in self._leads:
                is_lead |= block == lead
            found.append(np.flatnonzero(is_lead) + start)
        return np.concatenate(found)


def installed_versions() -> dict[str, str]:
    """What a set of inexact code points holds for, e.g. {"tiktoken": "0.14.0", "gigatoken":
    "0.10.0"}."""
    return {package: version(package) for package in ("tiktoken", "gigatoken")}


def load_inexact() -> np.ndarray:
    """The inexact code points (int64, ascending) for the installed versions: as stored, else
    derived now."""
    stored = json.loads(STORED.read_text())
    if stored["versions"] == installed_versions():
        return from_ranges(stored["ranges"])
    return derive_inexact()


def derive_inexact() -> np.ndarray:
    """Ask both packages for the class of every code point; return those that differ (int64,
    ascending)."""
    return np.flatnonzero(tiktoken_classes() != gigatoken_classes())


def scalar_values() -> np.ndarray:
    """Every code point that text can hold, which is all but the surrogates (int64, ascending)."""
    return np.concatenate([np.arange(0xD800), np.arange(0xE000, NUM_CODE_POINTS)])


def tiktoken_classes() -> np.ndarray:
    """Class of each code point (uint8, length 0x110000) by tiktoken's regular expressions.

    An encoding whose pattern matches one class drops all other text: what it keeps of Unicode is
    that class.
    """
    import tiktoken

    text = scalar_values().astype("<u4").tobytes().decode("utf-32-le")
    ranks = {bytes([byte]): byte for byte in range(256)}
    classes = np.full(NUM_CODE_POINTS, OTHER, np.uint8)
    for name, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
        probe = tiktoken.Encoding(
            "probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        members = probe.decode(probe.encode_ordinary(text))
        classes[np.frombuffer(members.encode("utf-32-le"), "<u4")] = name
    return classes


def gigatoken_classes() -> np.ndarray:
    """Class of each code point (uint8, length 0x110000) as gigatoken splits text.

    Two characters of one class make one piece. So each code point is encoded before a letter, a
    digit and a symbol, with a vocabulary that has a token for any byte and one of these three:
    where that token shows up, both were in one piece. White space joins none of the three, except
    U+0020, which joins all.
    """
    probes = {LETTER: b"a", NUMBER: b"1", OTHER: b"!"}
    single = [bytes([byte]) for byte in range(256)]
    tokenizer = load_gigatoken(
        single + [byte + probe for probe in probes.values() for byte in single]
    )
    values = scalar_values()
    text = np.frombuffer(values.astype("<u4").tobytes().decode("utf-32-le").encode(), np.uint8)
    ends = np.append(np.flatnonzero((text & 0xC0) != 0x80), len(text))[1:]
    offsets = np.append(0, ends + np.arange(1, len(ends) + 1))  # a probe after each code point
    joins = np.empty((len(values), len(probes)), bool)
    for name, probe in probes.items():
        documents = awkward_strings(np.insert(text, ends, probe[0]), offsets)
        encoded = tokenizer.encode_batch(documents, parallel=False).layout
        last = np.asarray(encoded.offsets.data)[1:] - 1
        joins[:, name] = np.asarray(encoded.content.data)[last] >= len(single)
    classes = np.full(
        NUM_CODE_POINTS, OTHER, np.uint8
    )  # tiktoken_classes says the same of surrogates
    classes[values] = np.where(joins.sum(axis=1) == 1, joins.argmax(axis=1), SPACE)
    return classes


def to_ranges(code_points: np.ndarray) -> list[str]:
    """Ascending code points as ["088F", "A7CE-A7CF", ...]."""
    runs = (
        np.split(code_points, np.flatnonzero(np.diff(code_points) > 1) + 1)
        if len(code_points)
        else []
    )
    return [f"{run[0]:04X}" if len(run) == 1 else f"{run[0]:04X}-{run[-1]:04X}" for run in runs]


def from_ranges(ranges: list[str]) -> np.ndarray:
    """The reverse of `to_ranges` (int64, ascending)."""
    bounds = [[int(bound, 16) for bound in item.split("-")] for item in ranges]
    return np.concatenate([np.empty(0, np.int64), *(np.arange(b[0], b[-1] + 1) for b in bounds)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Derive where the installed gigatoken and tiktoken differ."
    )
    parser.add_argument(
        "--write", action="store_true", help=f"store it in {STORED.name} (else: compare)"
    )
    args = parser.parse_args(argv)
    code_points = derive_inexact()
    versions, ranges = installed_versions(), to_ranges(code_points)
    derived = {"versions": versions, "ranges": ranges}
    named = ", ".join(f"{package} {number}" for package, number in versions.items())
    print(f"{named}: {len(code_points):,} code points in {len(ranges)} ranges", end=", ")
    if args.write:
        STORED.write_text(json.dumps(derived, indent=1) + "\n")
    same = json.loads(STORED.read_text()) == derived
    print("as stored" if same else f"not as in {STORED.name}; --write stores them")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
