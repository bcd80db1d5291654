"""Files that are whole but something else than their name says, and odd but whole ones."""

import base64
import gzip
import io
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from pretrain.text import foreign, stored
from pretrain.text.documents import SourceError, local_source, plan_units, read_unit
from pretrain.text.readers import blocks, parquet, txt

TABLE = pa.table({"text": ["one", "two"]})


def texts_of(path, **options):
    source = local_source([path])
    return [
        text
        for unit in plan_units(source, unit_bytes=100)
        for batch in read_unit(source, unit, **options)
        for text in batch.texts.to_pylist()
    ]


def made_by(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text " * 100)


def tarred(file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 500
        archive.addfile(member, io.BytesIO(b"text " * 100))


def sqlite(tmp_path):
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as database:
        database.execute("create table t (text)")
    return path.read_bytes()


PARQUET = made_by(lambda file: pq.write_table(TABLE, file))
FILES = {
    "a zip archive": made_by(zipped),
    "a tar archive": made_by(tarred),
    "a Parquet file": PARQUET,
    "an Arrow or Feather file": made_by(lambda file: pa.feather.write_feather(TABLE, file)),
    "an ORC file": made_by(lambda file: pa.orc.write_table(TABLE, file)),
    "gzip": gzip.compress(b"text"),
    "zstd": pa.compress(b"text", "zstd", asbytes=True),
    "UTF-16 text": "text of some kind".encode("utf-16"),
    "UTF-16LE text": "text of some kind".encode("utf-16-le"),
    "UTF-16BE text": "text of some kind".encode("utf-16-be"),
    "UTF-32 text": "text of some kind".encode("utf-32"),
    "a NumPy array": made_by(lambda file: np.save(file, np.arange(3))),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt", "jsonl.gz", "txt.zst"])
@pytest.mark.parametrize("what", FILES)
def test_a_whole_file_of_another_kind_is_named_with_the_way_out(tmp_path, what, ending):
    if what == {"parquet": "a Parquet file", "jsonl.gz": "gzip", "txt.zst": "zstd"}.get(ending):
        return
    path = tmp_path / f"a.{ending}"
    path.write_bytes(FILES[what])
    with pytest.raises(SourceError) as error:
        texts_of(path)
    message = str(error.value)
    assert message.startswith(f"{path}: is {what}, not ")
    assert "damaged" not in message and "cut short" not in message and "; " in message
    (tmp_path / "good.txt").write_text("good")
    assert texts_of(tmp_path, on_bad_document="skip") == ["good"]


def test_a_database_and_a_web_page_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(sqlite(tmp_path))
    with pytest.raises(SourceError, match="is an SQLite database, not JSON lines"):
        texts_of(path)
    path.write_text("<!DOCTYPE html>\n<html>Log in</html>")
    with pytest.raises(SourceError, match="is a web page, not JSON lines"):
        texts_of(path)


def test_an_archive_inside_of_gzip_is_named(tmp_path):
    for name, data in (("a.txt.gz", made_by(tarred)), ("b.jsonl.gz", made_by(zipped))):
        path = tmp_path / name
        path.write_bytes(gzip.compress(data))
        with pytest.raises(SourceError, match=r"compressed in it is a (tar|zip) archive"):
            texts_of(path)


def test_plain_text_named_gz_is_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_text("some plain text " * 100)
    with pytest.raises(SourceError, match=r"is plain text, not gzip; leave \.gz or \.zst out"):
        texts_of(path)


@pytest.mark.parametrize(
    "text",
    [
        "ORC and man",
        "PAR1 golf",
        "BZh",
        "%PDF- is a mark",
        "<html>as a text</html>",
        "é",
        "\x1b[1m",
        "PK",
        "a\0b",
        "\0\0",
        "日本語 " * 400,
        "Obj",
        "7z",
        "FEA1",
        "ARROW1",
    ],
)
def test_text_that_begins_like_a_binary_file_stays_text(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    assert "".join(texts_of(path)) == text


def test_a_text_whose_first_kilobyte_ends_inside_a_character_stays_text(tmp_path):
    for shift in range(4):
        data = ("x" * shift + "日本語" * 500).encode()
        assert foreign.is_plain_text(data[:1024])


# ---- gzip


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 511, 70_000])
def test_gzip_members_and_the_zeros_behind_them_are_read_as_gzip_reads_them(
    tmp_path, pieces, padding
):
    data = "".join(f"text {i}\n<|endoftext|>\n" for i in range(5000)).encode()
    step = -(-len(data) // pieces)
    packed = b"".join(gzip.compress(data[at : at + step]) for at in range(0, len(data), step))
    packed += b"\0" * padding
    assert gzip.decompress(packed) == data
    path = tmp_path / "a.txt.gz"
    path.write_bytes(packed)
    assert texts_of(path) == [f"text {i}\n" for i in range(5000)]


def test_every_cut_of_a_gzip_file_is_noticed(tmp_path):
    packed = gzip.compress(random.Random(0).randbytes(200).hex().encode())
    path = tmp_path / "a.txt.gz"
    for size in range(2, len(packed)):
        path.write_bytes(packed[:size])
        with pytest.raises(SourceError, match="damaged or cut short"):
            texts_of(path)
    path.write_bytes(packed[:-1] + bytes([packed[-1] ^ 1]))
    with pytest.raises(SourceError, match="damaged or cut short"):
        texts_of(path)


def packed(compression, content, times):
    """So many times the content, compressed."""
    if compression == "zstd":
        return pa.compress(content * times, "zstd", asbytes=True)
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(content) for _ in range(times)), packer.flush()])


@pytest.mark.parametrize("content", [b"x", b"\n", b" \n", b"{}\n", b'{"text":""}\n', b"\r\n\0"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst"])
def test_a_bomb_ends_in_one_line_and_in_bounded_memory(tmp_path, name, content, monkeypatch):
    block = 4 << 20  # as it is
    if "jsonl" in name and content.strip():  # what each of a million lines takes, 50,000 take too
        block >>= 5
        monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(stored, "LARGEST_FREELY", block * 5 // 4)  # a block is read before
    path = tmp_path / name
    compression = "zstd" if name.endswith("zst") else "gzip"
    path.write_bytes(packed(compression, content * ((block >> 6) // len(content)), 150))
    assert path.stat().st_size < block // 105  # and its content 2.4 blocks
    tracemalloc.start()
    refused = r"inflates to more than 200 times its size|no key 'text'|not JSON"
    with pytest.raises(SourceError, match=refused):
        texts_of(path)
    if content not in (b"{}\n", b"\r\n\0"):  # millions of documents to be counted as bad
        with pytest.raises(SourceError, match=r"inflates to more than 200 times its size"):
            texts_of(path, on_bad_document="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 75 * block


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_text_that_repeats_itself_as_text_does_is_read(tmp_path, compression, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1 << 19)  # an eighth of the usual ones
    monkeypatch.setattr(stored, "LARGEST_FREELY", 1 << 21)
    lines = "".join(
        json.dumps({"text": f"the river {n % 50} runs {n}"}) + "\n" for n in range(1000)
    )
    content = lines.encode() + random.Random(0).randbytes(100_000).hex().encode() + b"\n"
    path = tmp_path / f"a.jsonl.{'gz' if compression == 'gzip' else 'zst'}"
    path.write_bytes(packed(compression, content, 10))
    assert len(content) * 10 > stored.LARGEST_FREELY
    assert len(texts_of(path, on_bad_document="skip")) == 10_000


def test_a_text_beyond_the_limit_is_named_or_left_out_and_its_neighbours_stay(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(txt, "LARGEST_TEXT", 50)
    path = tmp_path / "a.txt"
    documents = ["a\n", "x" * 49 + "\n", "x" * 50 + "\n", "b\n", "y" * 3000 + "\n", "c"]
    path.write_text("<|endoftext|>\n".join(documents))
    for block in (7, 64, 1 << 20):
        monkeypatch.setattr(blocks, "BLOCK", block)
        assert texts_of(path, on_bad_document="skip") == [d for d in documents if len(d) <= 50]
        with pytest.raises(SourceError, match=r"a\.txt, line 5: a document of more than 50 bytes"):
            texts_of(path)


# ---- zstd


def zstd_frame(exponent, dictionary=0):
    """A frame's header of which the window is 2**(10 + exponent) bytes."""
    descriptor = 1 if dictionary else 0
    extra = bytes([dictionary]) if dictionary else b""
    return (
        b"\x28\xb5\x2f\xfd" + bytes([descriptor, exponent << 3]) + extra + b"\x01\0\0" + b"\0" * 16
    )


def test_a_zstd_window_too_large_is_no_damage(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd_frame(21))  # 2 GiB: zstd --long=31
    with pytest.raises(SourceError) as error:
        texts_of(path)
    assert "zstd --long made it with a window of 2048 MiB" in str(error.value)
    assert "zstd -d --long=31" in str(error.value) and "damaged" not in str(error.value)


def test_a_frame_with_a_large_window_behind_another_is_no_damage(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(pa.compress(b"text", "zstd", asbytes=True) + zstd_frame(21))
    with pytest.raises(SourceError, match="zstd --long made it"):
        texts_of(path)


def test_a_zstd_dictionary_is_named(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd_frame(10, dictionary=7))
    with pytest.raises(SourceError, match="is compressed with a dictionary"):
        texts_of(path)


def test_zstd_frames_that_hold_no_data_are_passed_over(tmp_path):
    note = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    frames = [pa.compress(part, "zstd", asbytes=True) for part in (b"one ", b"two")]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(note + frames[0] + note + frames[1] + note)
    assert texts_of(path) == ["one two"]


# ---- parquet


def test_two_columns_of_the_texts_name_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1])], ["text", "text", "id"])
    pq.write_table(table, path)
    with pytest.raises(
        SourceError, match=r"a\.parquet: 2 columns 'text'; choose --text_column fro"
    ):
        texts_of(path)


def test_two_columns_of_another_name_do_not_matter(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table(
        [pa.array([1]), pa.array([2]), pa.array(["b"])], ["token_count", "token_count", "text"]
    )
    pq.write_table(table, path)
    assert texts_of(path) == ["b"]


def test_a_part_without_any_text_has_rows_that_are_empty(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"text": pa.nulls(5), "token_count": [1, 2, 3, 4, 5]}), tmp_path / "b.parquet"
    )
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
    assert texts_of(tmp_path) == ["a", "c"]
    source = local_source([tmp_path / "b.parquet"])
    (batch,) = read_unit(source, next(plan_units(source, unit_bytes=1)))
    assert batch.skipped["empty"].tolist() == [0, 1, 2, 3, 4]


def encrypted(path, plaintext_footer):
    """A parquet file with an encrypted column of text."""

    class Keys(encryption.KmsClient):
        def wrap_key(self, key, master):
            return base64.b64encode(key)

        def unwrap_key(self, key, master):
            return base64.b64decode(key)

    settings = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["text"]}, plaintext_footer=plaintext_footer
    )
    properties = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(), settings
    )
    with pq.ParquetWriter(path, TABLE.schema, encryption_properties=properties) as writer:
        writer.write_table(TABLE)


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_file_is_no_damage_and_does_not_end_the_process(tmp_path, plaintext_footer):
    path = tmp_path / "a.parquet"
    encrypted(path, plaintext_footer)
    code = (
        "import sys; from pretrain.text.documents import *\n"
        "source = local_source([sys.argv[1]])\n"
        "try: [list(read_unit(source, unit)) for unit in plan_units(source, unit_bytes=1)]\n"
        "except SourceError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"a\.parquet: is .*encrypted.*; write it anew without", done.stdout)


def test_a_text_that_a_dictionary_repeats_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_PIECE", 1 << 26)  # an eighth of the usual ones
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    ids = pa.array([0, 1] * 1000, pa.int32())
    values = pa.array(["x" * 125_000, "y" * 125_000])
    repeated = pa.DictionaryArray.from_arrays(ids, values)
    for told in (True, False):  # whether Arrow is told that it is a dictionary
        pq.write_table(pa.table({"text": repeated}), path, store_schema=told)
        source = local_source([path])
        (unit,) = plan_units(source, unit_bytes=1)
        sizes, rows, texts = [], 0, set()
        for batch in read_unit(source, unit):
            sizes.append(batch.texts.nbytes)
            rows += batch.num_rows
            texts |= {batch.texts[0].as_py(), batch.texts[-1].as_py()}
        assert rows == len(ids) and texts == {"x" * 125_000, "y" * 125_000}
        assert max(sizes) < 75 << 20


def test_what_the_system_says_is_not_taken_for_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(PARQUET)
    source = local_source([path])

    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pretrain.text.readers.parquet.pq.ParquetFile", fail)
    with pytest.raises(SourceError, match=r"a\.parquet: Input/output error$"):
        list(read_unit(source, next(plan_units(source, unit_bytes=1))))


# ---- memory


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the peak there")
def test_a_line_of_50_megabytes_takes_less_than_one_gigabyte(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text":"\xf0\x9f\x98\x80')  # four bytes for each character in Python
        for _ in range(50):
            file.write(b"words and " * 100_000)
        file.write(b'"}\n')
    code = (
        "import re, sys; from pretrain.text.documents import *\n"
        "source = local_source([sys.argv[1]])\n"
        "for unit in plan_units(source, unit_bytes=8 << 20):\n"
        "    for batch in read_unit(source, unit): print(batch.texts.nbytes)\n"
        # not ru_maxrss, which a process inherits from the one that started it
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size > 50_000_000
    assert peak * 1024 < 1_000_000_000
