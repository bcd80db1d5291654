"""Which code points the two tokenizers put into different classes, and which documents hold one.

GPT-2 splits text by three Unicode classes (letter, number, white space; the rest is one more) before it merges bytes.
tiktoken and gigatoken carry Unicode tables of different age, so a newly assigned letter is a letter to one and a
symbol to the other. The set is derived from the packages themselves; the one for the versions we test with is stored.

    $ python -m pretrain.unicode_disagreement
    tiktoken 0.14.0, gigatoken 0.10.0: 4,657 code points in 26 ranges, as stored
"""

import argparse
import base64
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

STORED = Path(__file__).with_suffix(".json")
NUM_CODE_POINTS = 0x110000
PACKAGES = ("tiktoken", "gigatoken")
LETTER, NUMBER, SPACE, OTHER = range(4)
PROBES = {LETTER: b"a", NUMBER: b"1", OTHER: b"!"}  # a code point joins the probe of its own class into one piece


def installed_versions() -> dict[str, str]:
    """The versions that a set of disagreement belongs to, e.g. {"tiktoken": "0.14.0", "gigatoken": "0.10.0"}."""
    return {package: version(package) for package in PACKAGES}


def load_disagreement() -> np.ndarray:
    """Code points (int64, ascending) that the installed tiktoken and gigatoken class differently.

    Read from the stored file when it was derived for the installed versions, otherwise derived now (about 2 s).
    """
    stored = json.loads(STORED.read_text())
    if stored["versions"] == installed_versions():
        return from_ranges(stored["ranges"])
    return derive_disagreement()


def derive_disagreement() -> np.ndarray:
    """Ask both packages for the class of all 1,112,064 scalar values; return those (int64, ascending) that differ."""
    return np.flatnonzero(tiktoken_classes() != gigatoken_classes())


def scalar_values() -> np.ndarray:
    """Every code point that a string may hold: all but the surrogates, int64, ascending."""
    return np.concatenate([np.arange(0xD800), np.arange(0xE000, NUM_CODE_POINTS)])


def tiktoken_classes() -> np.ndarray:
    """Class of each code point (uint8, length 0x110000) by tiktoken's regular expressions.

    An encoding whose pattern is one class alone drops all other text, so what it decodes to is that class.
    """
    import tiktoken

    text = scalar_values().astype("<u4").tobytes().decode("utf-32-le")
    byte_ranks = {bytes([b]): b for b in range(256)}
    classes = np.full(NUM_CODE_POINTS, OTHER, np.uint8)
    for code, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
        probe = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
        members = probe.decode(probe.encode_ordinary(text))
        classes[np.frombuffer(members.encode("utf-32-le"), "<u4")] = code
    return classes


def gigatoken_classes() -> np.ndarray:
    """Class of each code point (uint8, length 0x110000) as gigatoken's GPT-2 splitting treats it.

    The vocabulary holds all bytes and every (byte, probe) pair: the pair's id ends a document "code point, probe" when
    both went into one piece, that is when they are of one class. White space joins no probe, U+0020 joins each.
    """
    from gigatoken import Tokenizer

    vocabulary = [bytes([b]) for b in range(256)]
    vocabulary += [bytes([b]) + probe for probe in PROBES.values() for b in range(256)]
    tokenizer = gigatoken_from_tokens(vocabulary)
    assert isinstance(tokenizer, Tokenizer)

    values = scalar_values()
    text = np.frombuffer(values.astype("<u4").tobytes().decode("utf-32-le").encode(), np.uint8)
    starts = np.flatnonzero((text & 0xC0) != 0x80)
    ends = np.append(starts[1:], len(text))
    offsets = np.append(starts, len(text)) + np.arange(len(values) + 1)  # each document is one byte longer
    joins = np.zeros((len(values), 4), bool)
    for code, probe in PROBES.items():
        encoded = tokenizer.encode_batch(utf8_strings(np.insert(text, ends, probe[0]), offsets), parallel=False).layout
        last = np.asarray(encoded.offsets.data)[1:] - 1
        joins[:, code] = np.asarray(encoded.content.data)[last] >= 256
    classes = np.full(NUM_CODE_POINTS, OTHER, np.uint8)
    classes[values] = np.where(joins.sum(axis=1) == 1, joins.argmax(axis=1), SPACE)
    return classes


def gigatoken_from_tokens(tokens: list[bytes]):
    """gigatoken's tokenizer for GPT-2's splitting and the given tokens (id = position), without special tokens."""
    from gigatoken import Tokenizer

    with tempfile.TemporaryDirectory() as folder:  # the format is read from a path only
        path = Path(folder, "ranks.tiktoken")
        path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
        return Tokenizer.from_tiktoken(path, pretokenizer="gpt2")


def utf8_strings(data: np.ndarray, offsets: np.ndarray):
    """Document i is data[offsets[i]:offsets[i + 1]] (uint8, int64), as the awkward array of strings gigatoken takes.

    Nothing is copied. Only 64-bit offsets are accepted there, which is why what `ak.from_arrow` gives is not.
    """
    import awkward as ak

    characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
    strings = ak.contents.ListOffsetArray(ak.index.Index64(offsets), characters, parameters={"__array__": "string"})
    return ak.Array(strings)


class CodePointSet:
    """Finds the documents that hold a code point of the set, at a fraction of the cost of tokenizing them."""

    def __init__(self, code_points: np.ndarray):
        self.code_points = code_points
        self.is_member = np.zeros(NUM_CODE_POINTS, bool)
        self.is_member[code_points] = True
        self.first_bytes = np.zeros((256, 256), bool)  # by the first two bytes of the UTF-8 of a member
        for encoded in {chr(c).encode()[:2] for c in code_points.tolist()}:
            self.first_bytes[encoded[0], encoded[1] if len(encoded) > 1 else slice(None)] = True
        self.min_lead = int(self.first_bytes.any(axis=1).argmax()) if len(code_points) else None

    def documents_holding_one(self, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Indices (int64, ascending) of the documents data[offsets[i]:offsets[i + 1]] (uint8, valid UTF-8)."""
        if self.min_lead is None or len(data) == 0:
            return np.empty(0, np.int64)
        at = np.flatnonzero(data >= self.min_lead)  # in ASCII text nothing is left to do after this line
        last = len(data) - 1
        at = at[self.first_bytes[data[at], data[np.minimum(at + 1, last)]]]
        lead = data[at]
        length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
        code_point = lead & np.array([0, 0x7F, 0x1F, 0x0F, 0x07])[length]
        for i in (1, 2, 3):
            continued = (code_point << 6) | (data[np.minimum(at + i, last)] & 0x3F)
            code_point = np.where(i < length, continued, code_point)
        return np.unique(np.searchsorted(offsets, at[self.is_member[code_point]], side="right") - 1)


def to_ranges(code_points: np.ndarray) -> list[str]:
    """Ascending code points as ["088F", "A7CE-A7CF", ...]."""
    runs = np.split(code_points, np.flatnonzero(np.diff(code_points) > 1) + 1) if len(code_points) else []
    return [f"{run[0]:04X}" if len(run) == 1 else f"{run[0]:04X}-{run[-1]:04X}" for run in runs]


def from_ranges(ranges: list[str]) -> np.ndarray:
    """The reverse of `to_ranges`: int64, ascending."""
    bounds = [[int(bound, 16) for bound in item.split("-")] for item in ranges]
    return np.array([c for bound in bounds for c in range(bound[0], bound[-1] + 1)], np.int64)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Derive the set for the installed versions; compare or store it.")
    parser.add_argument("--write", action="store_true", help=f"replace {STORED.name} (default: compare with it)")
    args = parser.parse_args(argv)
    code_points, versions = derive_disagreement(), installed_versions()
    ranges = to_ranges(code_points)
    found = f"{', '.join(' '.join(item) for item in versions.items())}: {len(code_points):,} code points"
    found += f" in {len(ranges)} ranges"
    if args.write:
        STORED.write_text(json.dumps({"versions": versions, "ranges": ranges}, indent=1) + "\n")
        print(f"{found}, written to {STORED.name}")
        return 0
    same = json.loads(STORED.read_text()) == {"versions": versions, "ranges": ranges}
    print(f"{found}, {'as stored' if same else 'NOT as stored; rerun with --write to store it'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
