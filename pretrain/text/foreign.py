"""Whole files of another kind than their name says: what they are, by their first bytes, and how
they become documents.

>>> foreign(b"PK\\x03\\x04...", "txt", None)
'is a zip archive, not text; unpack it and give what is in it'
"""

import re

EXPECTED = {
    "parquet": "Parquet",
    "jsonl": "JSON lines",
    "txt": "text",
    "gzip": "gzip",
    "zstd": "zstd",
}
UNPACK = "unpack it and give what is in it"
TO_UTF8 = "convert it: iconv -f {} -t UTF-8 FILE > NEW"
TO_PARQUET = "read it with {} and write it as Parquet"
LARGEST_WINDOW = 1 << 27  # bytes that decoders grant a zstd frame unless told otherwise

# (where, first bytes, what it is, how to have its documents)
MAGIC = [
    (0, b"PAR1", "a Parquet file", "name it .parquet"),
    (0, b"PARE", "a Parquet file with an encrypted footer", "write it anew without encryption"),
    (0, b"PK\x03\x04", "a zip archive", UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", UNPACK),
    (0, b"\x1f\x8b", "gzip", "let its name end in .gz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd", "let its name end in .zst"),
    (0, b"BZh", "bzip2", "unpack it with bunzip2"),
    (0, b"\xfd7zXZ\0", "xz", "unpack it with unxz"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (0, b"\x04\x22\x4d\x18", "lz4", "unpack it with unlz4"),
    (0, b"\xff\x06\0\0sNaPpY", "snappy", "unpack it with snzip -d"),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"ARROW1", "an Arrow or Feather file", TO_PARQUET.format("pyarrow.feather.read_table")),
    (0, b"FEA1", "a Feather file", TO_PARQUET.format("pyarrow.feather.read_table")),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", TO_PARQUET.format("pyarrow.ipc.open_stream")),
    (0, b"ORC", "an ORC file", TO_PARQUET.format("pyarrow.orc.read_table")),
    (0, b"Obj\x01", "an Avro file", TO_PARQUET.format("fastavro")),
    (0, b"SQLite format 3\0", "an SQLite database", "export its texts as JSON lines"),
    (0, b"\x89HDF\r\n", "an HDF5 file", "export its texts as JSON lines"),
    (0, b"\x93NUMPY", "a NumPy array", "export its texts as JSON lines"),
    (0, b"%PDF-", "a PDF", "extract its text (pdftotext)"),
    (0, b"version https://git-lfs.github.com/", "a pointer of Git LFS", "run git lfs pull"),
    (0, b"\xff\xfe\0\0", "UTF-32 text", TO_UTF8.format("UTF-32")),
    (0, b"\0\0\xfe\xff", "UTF-32 text", TO_UTF8.format("UTF-32")),
    (0, b"\xff\xfe", "UTF-16 text", TO_UTF8.format("UTF-16")),
    (0, b"\xfe\xff", "UTF-16 text", TO_UTF8.format("UTF-16")),
]
# What plain text may well begin with, and no gzip, zstd or binary file does
TEXT_TOO = {b"ORC", b"BZh", b"PAR1", b"PARE", b"FEA1", b"ARROW1", b"%PDF-", b"ustar"}
CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")


def foreign(head: bytes, kind: str, compression: str | None) -> str | None:
    """What is wrong with a file of this kind that begins with `head`, None where nothing is.

    A beginning that belongs to nothing known is None too: whether it can be read, its reader says.
    head: at least 512 bytes, or the whole file.
    """
    expected = compression or kind
    found = identify(head)
    if found is None and compression and head and is_plain_text(head):
        found = "plain text", "leave .gz or .zst out of its name"
    if found is None and kind != "txt" and re.match(rb"\s*<(!doctype|html)\b", head, re.I):
        found = "a web page", "get the file anew: a server's error or login page was saved"
    if found is None or found[0].lower() == expected or found[0] == f"a {EXPECTED[expected]} file":
        return None
    if kind == "parquet" and "Parquet" in found[0]:
        return f"is {found[0]}; {found[1]}"
    return f"is {found[0]}, not {EXPECTED[expected]}; {found[1]}"


def identify(head: bytes) -> tuple[str, str] | None:
    """(what it is, how to have its documents) of a known kind of file that is not UTF-8 text."""
    for at, magic, what, way_out in MAGIC:
        if head[at : at + len(magic)] == magic and not (magic in TEXT_TOO and is_plain_text(head)):
            return what, way_out
    for first, order in ((0, "BE"), (1, "LE")):  # without a mark: every other byte is zero
        zeros = head[first:64:2]
        if len(zeros) > 3 and not any(zeros) and all(head[1 - first : 64 : 2]):
            return f"UTF-16{order} text", TO_UTF8.format(f"UTF-16{order}")
    return None


def is_plain_text(head: bytes) -> bool:
    """Whether these bytes can be the beginning of UTF-8 text."""
    try:
        head[:-4].decode() if len(head) >= 512 else head.decode()
    except UnicodeDecodeError as error:
        return len(head) >= 512 and error.start >= len(head) - 8
    return not CONTROL.search(head)


def zstd_problem(head: bytes) -> str | None:
    """Why a whole zstd file cannot be decompressed here, from its first frame's header.

    Layout: RFC 8878, section 3.1.1.1.
    """
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 18:
        return None
    descriptor, at = head[4], 5
    single, dictionary = descriptor >> 5 & 1, (0, 1, 2, 4)[descriptor & 3]
    if single:
        size = (1, 2, 4, 8)[descriptor >> 6]
        window = int.from_bytes(head[at + dictionary :][:size], "little")
    else:
        exponent, mantissa = head[at] >> 3, head[at] & 7
        window = (1 << 10 + exponent) + (mantissa << 7 + exponent)
        at += 1
    if any(head[at : at + dictionary]):
        return "is compressed with a dictionary; decompress it with zstd -d -D DICTIONARY"
    if window > LARGEST_WINDOW:
        return long_window(window)
    return None


def long_window(window: int | None = None) -> str:
    size = f" of {window >> 20} MiB" if window else ""
    return (
        f"is whole, but zstd --long made it with a window{size}, more than the "
        f"{LARGEST_WINDOW >> 20} MiB that are granted here; decompress it with zstd -d --long=31"
    )
