"""gigatoken's exceptions: derived, stored, found in documents; and its cache."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.tokens import fast_bpe, tokenizer
from pretrain.tokens.fast_bpe import CodePointSet, from_ranges, to_ranges
from pretrain.tokens.tokenizer import Tokenizer, utf8_buffers

INEXACT = [chr(c) for c in (0x088F, 0x0C5C, 0xA7CE, 0x10940, 0x11DE0, 0x323B0, 0x33479)]


@pytest.fixture(scope="module")
def classes():
    """The class of every code point, by either package."""
    return fast_bpe.tiktoken_classes(), fast_bpe.gigatoken_classes()


def test_the_stored_set_is_what_the_packages_say(classes, monkeypatch, capsys):
    if json.loads(fast_bpe.STORED.read_text())["versions"] != fast_bpe.installed_versions():
        pytest.skip("stored for other versions: with these, the set is derived at each start")
    monkeypatch.setattr(fast_bpe, "tiktoken_classes", lambda: classes[0])
    monkeypatch.setattr(fast_bpe, "gigatoken_classes", lambda: classes[1])
    assert fast_bpe.main([]) == 0
    assert capsys.readouterr().out.endswith("code points in 26 ranges, as stored\n")
    assert {ord(c) for c in INEXACT} <= set(fast_bpe.load_inexact().tolist())


def test_a_stored_set_that_is_not_what_the_packages_say_is_told_and_replaced(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(fast_bpe, "derive_inexact", lambda: np.array([0x41, 0x42, 0x44]))
    monkeypatch.setattr(fast_bpe, "STORED", tmp_path / "stored.json")
    (tmp_path / "stored.json").write_text(json.dumps({"versions": {}, "ranges": []}))
    assert fast_bpe.main([]) == 1
    assert "3 code points in 2 ranges, not as in stored.json" in capsys.readouterr().out
    assert fast_bpe.main(["--write"]) == 0
    assert fast_bpe.main([]) == 0
    assert fast_bpe.load_inexact().tolist() == [0x41, 0x42, 0x44]


def test_classes_are_those_of_pythons_unicode_data_where_that_knows_the_code_point(classes):
    categories = [unicodedata.category(chr(c)) for c in range(0x110000)]
    known = np.array([category not in ("Cn", "Cs") for category in categories])
    known[fast_bpe.load_inexact()] = False
    names = {"L": fast_bpe.LETTER, "N": fast_bpe.NUMBER}
    wanted = np.array([names.get(category[0], fast_bpe.OTHER) for category in categories], np.uint8)
    wanted[[c for c in range(0x110000) if chr(c).isspace()]] = fast_bpe.SPACE
    wanted[0x1C:0x20] = fast_bpe.OTHER  # Python's own addition to Unicode's white space
    for found in classes:
        assert np.array_equal(found[known], wanted[known])


def test_other_versions_get_a_set_of_their_own(monkeypatch):
    monkeypatch.setattr(
        fast_bpe, "installed_versions", lambda: {"tiktoken": "0.14.0", "gigatoken": "0.99.0"}
    )
    monkeypatch.setattr(fast_bpe, "derive_inexact", lambda: np.array([0x41]))
    tok = Tokenizer("gigatoken")
    assert tok._fast.inexact.code_points.tolist() == [0x41]
    monkeypatch.setattr(
        fast_bpe, "derive_inexact", lambda: pytest.fail("a worker derives the set again")
    )
    assert pickle.loads(pickle.dumps(tok))._fast.inexact.code_points.tolist() == [0x41]


@given(
    members=st.sets(st.characters(exclude_categories=["Cs"]), max_size=5),
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_documents_with_a_member_are_found_as_a_plain_loop_finds_them(members, texts, data):
    for i in range(len(texts)):
        if members and data.draw(st.booleans()):
            texts[i] += data.draw(st.sampled_from(sorted(members)))
    wanted = [i for i, text in enumerate(texts) if members & set(text)]
    found = CodePointSet(np.array(sorted(map(ord, members)), np.int64))
    assert found.documents_with_one(*utf8_buffers(pa.array(texts, pa.string()))).tolist() == wanted


def test_a_member_is_found_across_the_borders_of_the_search():
    block = fast_bpe.SCAN_BYTES
    text = "".join("a" * (block - 2) + INEXACT[-1] for _ in range(3))
    data, offsets = utf8_buffers(pa.array(["b" * (block - 1), text, "c", INEXACT[0]]))
    assert CodePointSet(fast_bpe.load_inexact()).documents_with_one(data, offsets).tolist() == [
        1,
        3,
    ]


@given(st.sets(st.integers(0, 0x10FFFF)))
def test_ranges_read_back_as_they_were_written(code_points):
    ascending = np.array(sorted(code_points), np.int64)
    assert np.array_equal(from_ranges(to_ranges(ascending)), ascending)


@pytest.fixture(autouse=True)
def _tokenizers_of_this_test_alone():
    """A process has one for all: here each test begins with one that has encoded nothing yet."""
    tokenizer._fast_bpe.cache_clear()
    yield
    tokenizer._fast_bpe.cache_clear()


@pytest.mark.parametrize("sizes_known", [True, False])
def test_a_full_cache_is_dropped_and_the_tokens_stay_the_same(sizes_known, monkeypatch):
    size = iter(range(0, 10**6, 100))
    monkeypatch.setattr(fast_bpe, "resident_bytes", lambda: next(size) if sizes_known else None)
    monkeypatch.setattr(fast_bpe, "MAX_CACHE_BYTES", 250)
    monkeypatch.setattr(fast_bpe, "MAX_CACHED_TEXT", 25)
    started = []
    load = fast_bpe.load_gigatoken
    monkeypatch.setattr(
        fast_bpe, "load_gigatoken", lambda tokens: started.append(1) or load(tokens)
    )
    tok = Tokenizer("gigatoken")
    started.clear()
    for _ in range(10):  # full after each third; the next one loads another
        assert tok.encode_documents(pa.array(["Hello", "world"]))[0].tolist() == [
            50256,
            15496,
            50256,
            6894,
        ]
    assert len(started) == 3


@functools.cache
def load_tokenizer():
    return Tokenizer("gigatoken", check_every=0)


@given(st.lists(st.one_of(st.text(max_size=5), st.text(min_size=6, max_size=300)), max_size=40))
@settings(max_examples=50, deadline=None)
def test_documents_become_the_same_tokens_with_awkward_and_without(documents):
    tok = load_tokenizer()
    data, offsets = utf8_buffers(pa.array(documents, pa.string()))
    backend = tok._fast._free[0]
    for parallel in (False, True):
        ids, starts = fast_bpe.encode_rows(backend, data, offsets, parallel)
        theirs, borders = fast_bpe.encode_awkward(backend, data, offsets, parallel)
        assert ids.dtype == theirs.dtype and np.array_equal(ids, theirs)
        assert starts.dtype == borders.dtype and np.array_equal(starts, borders)


def test_awkward_serves_long_texts_alone_and_can_be_missing(monkeypatch):
    monkeypatch.setattr(fast_bpe, "AWKWARD_FROM_BYTES", 10)
    encode, used = fast_bpe.encode_awkward, []
    monkeypatch.setattr(fast_bpe, "encode_awkward", lambda *given: used.append(1) or encode(*given))
    tok, texts = Tokenizer("gigatoken", check_every=0), pa.array(["Hello world"])
    expected = [50256, 15496, 995]
    for times in (0, 1, 2):
        assert tok.encode_documents(texts)[0].tolist() == expected and len(used) == times
    monkeypatch.setitem(sys.modules, "awkward", None)
    assert tok.encode_documents(texts)[0].tolist() == expected and len(used) == 2


def test_shards_of_a_small_source_are_made_without_the_packages_that_take_longest_to_load(tmp_path):
    (tmp_path / "a.txt").write_text("The mill stands still. " * 50)
    code = (
        "import sys, fineweb\n"
        "assert fineweb.main(['--source', 'a.txt', '--out_dir', 'out']) == 0\n"
        "assert not {'awkward', 'asyncio', 'datasets', 'torch'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fast_bpe.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_the_size_of_this_process_is_the_one_its_status_tells():
    status = Path("/proc/self/status")
    if not status.exists():
        assert fast_bpe.resident_bytes() is None
        return
    told = int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024
    assert fast_bpe.resident_bytes() == pytest.approx(told, rel=0.2)
