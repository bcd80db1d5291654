"""HellaSwag's files: reading, refusing, and the texts and tokens that are made of an example."""

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.eval import hellaswag as examples
from pretrain.eval.hellaswag import (
    DataUnavailable,
    HellaSwagError,
    data_sha256,
    encode,
    ensure_data,
    load_examples,
    prompt,
)
from pretrain.text import download
from pretrain.text.source import Patience
from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding

ITEMS = Path(__file__).parents[1] / "data" / "hellaswag_items.jsonl"
ENCODING = load_encoding()
GOOD = {
    "ind": 7,
    "activity_label": "Kite",
    "ctx_a": "A boy runs.",
    "ctx_b": "the kite",
    "ctx": "A boy runs. the kite",
    "endings": ["rises.", "barks.", "melts.", "votes."],
    "label": 0,
}


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def test_the_bundled_items_are_in_hellaswags_format():
    lines = [json.loads(line) for line in ITEMS.read_text().splitlines()]
    keys = [
        "ind",
        "activity_label",
        "ctx_a",
        "ctx_b",
        "ctx",
        "split",
        "split_type",
        "label",
        "endings",
    ]
    assert len(lines) >= 12
    for line in lines:
        assert list(line) == [*keys, "source_id"]
        assert line["ctx"] == f"{line['ctx_a']} {line['ctx_b']}".strip()
        assert len(set(line["endings"])) == 4
    assert {line["label"] for line in lines} == {0, 1, 2, 3}
    assert sum("[step]" in line["ctx"] for line in lines) >= 3


@pytest.mark.parametrize("choose", [min, max])
def test_the_bundled_items_are_not_given_away_by_the_length_of_their_endings(choose):
    """A loss summed over the tokens favours short endings: of a random model that should be
    chance."""
    items = [json.loads(line) for line in ITEMS.read_text().splitlines()]
    found = sum(
        len(item["endings"][item["label"]]) == choose(map(len, item["endings"])) for item in items
    )
    assert found <= 0.4 * len(items)


def test_labels_may_be_numbers_or_strings_and_blank_lines_do_not_count(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, "", {**GOOD, "label": "2", "ind": 9}, "  ")
    assert [(e.ind, e.label) for e in load_examples(path)] == [(7, 0), (9, 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<!DOCTYPE html>", "not JSON"),
        (json.dumps(GOOD)[:-9], "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ({**GOOD, "endings": ["a", "b", "c"]}, "four strings"),
        ({**GOOD, "endings": "abcd"}, "four strings"),
        ({**GOOD, "endings": ["a", "b", "c", None]}, "four strings"),
        ({k: v for k, v in GOOD.items() if k != "ctx"}, "ctx must be a string"),
        (
            {k: v for k, v in GOOD.items() if k != "activity_label"},
            "activity_label must be a string",
        ),
        ({k: v for k, v in GOOD.items() if k != "ctx_b"}, "ctx_a and ctx_b"),
        ({**GOOD, "label": 4}, "label must be 0, 1, 2 or 3, got 4"),
        ({**GOOD, "label": True}, "label must be"),
        ({**GOOD, "label": ""}, "no label .*test file has none"),
        ({k: v for k, v in GOOD.items() if k != "label"}, "no label .*test file has none"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(HellaSwagError, match=f"a.jsonl, line 3: .*{message}") as error:
        load_examples(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"ctx": "caf\xe9"}\n')
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-12])
    for name, message in [
        ("latin.jsonl", "line 1: not UTF-8"),
        ("empty.jsonl", "no examples"),
        ("cut.jsonl.gz", "end-of-stream"),
        ("missing.jsonl", "No such file"),
        (".", "Is a directory"),
    ]:
        with pytest.raises(HellaSwagError, match=message) as error:
            load_examples(tmp_path / name)
        assert str(tmp_path) in str(error.value)


def test_a_compressed_file_is_the_same_file(tmp_path):
    packed = tmp_path / "items.gz"
    packed.write_bytes(gzip.compress(ITEMS.read_bytes()))
    assert load_examples(packed) == load_examples(ITEMS)
    assert (
        data_sha256(packed) == data_sha256(ITEMS) == hashlib.sha256(ITEMS.read_bytes()).hexdigest()
    )


def test_a_limit_takes_a_random_choice_that_contains_those_of_smaller_limits():
    everything = load_examples(ITEMS)
    some, few = load_examples(ITEMS, 12), load_examples(ITEMS, 5)
    assert (len(some), len(few)) == (12, 5)
    assert set(few) < set(some) < set(everything)
    assert [e for e in everything if e in some] == some != everything[:12]
    assert load_examples(ITEMS, 0) == load_examples(ITEMS, 1000) == everything


def example(**changes):
    fields = {key: GOOD[key] for key in ("ind", "activity_label", "ctx", "ctx_a", "ctx_b", "label")}
    return examples.Example(**{**fields, "endings": tuple(GOOD["endings"]), **changes})


def test_completion_style_takes_the_texts_as_they_are():
    marked = example(ctx="[header] Kites [title] Run. ", endings=("[step] a", " b", "c  d", ""))
    assert prompt(marked, "completion") == (
        "[header] Kites [title] Run. ",
        ["[step] a", " b", "c  d", ""],
    )


def test_lm_eval_style_makes_the_harness_texts():
    assert prompt(example(), "lm-eval") == ("Kite: A boy runs. The kite", GOOD["endings"])
    marked = example(
        activity_label="Home and Garden",
        ctx_a="[header] How to fly [title] Find a hill. [step] A bare one is best. "
        "[substeps] No trees.",
        ctx_b="",
        endings=("[title] Run. [step] Into the wind.", " [step] Wait.", "a   b", "no [mark"),
    )
    assert prompt(marked, "lm-eval") == (
        "Home and Garden: How to fly. Find a hill. A bare one is best. No trees.",
        [" Run. Into the wind.", " Wait.", "a  b", "no [mark"],
    )
    assert prompt(example(ctx_b="the KITE of Bob"), "lm-eval")[0].endswith("The kite of bob")


def test_lm_eval_style_takes_a_file_without_ctx_a_as_preprocessed():
    whole = example(
        ctx_a=None, ctx_b=None, ctx="A boy [runs]. the kite", endings=("a", "b", "[c]", "d")
    )
    assert prompt(whole, "lm-eval") == ("Kite: A boy [runs]. the kite", ["a", "b", "[c]", "d"])


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="completion, lm-eval"):
        prompt(example(), "both")


def test_completion_style_tokenizes_apart_and_counts_tokens():
    item, lengths = encode(example(ctx="A boy runs. "), "completion", ENCODING)
    assert item.context == ENCODING.encode_ordinary("A boy runs. ")
    assert item.endings == [ENCODING.encode_ordinary(" " + ending) for ending in GOOD["endings"]]
    assert lengths == [len(ending) for ending in item.endings]


def test_lm_eval_style_tokenizes_together_and_counts_characters():
    trailing = example(ctx_a=None, ctx_b=None, ctx="A boy  ", endings=("rises é.", "", "x", "42"))
    item, lengths = encode(trailing, "lm-eval", ENCODING)
    assert item.context == ENCODING.encode_ordinary("Kite: A boy")
    for ending, tokens in zip(trailing.endings, item.endings, strict=True):
        assert ENCODING.decode(item.context + tokens) == "Kite: A boy   " + ending
        assert item.context + tokens == ENCODING.encode_ordinary("Kite: A boy   " + ending)
    assert lengths == [8, 0, 1, 2]


@pytest.mark.parametrize("style", ["completion", "lm-eval"])
def test_empty_texts_still_have_tokens_to_predict_and_to_predict_from(style):
    empty = example(ctx="", ctx_a=None, ctx_b=None, activity_label="", endings=("", "a", "b", "c"))
    item, _ = encode(empty, style, ENCODING)
    assert item.context == (
        [END_OF_TEXT] if style == "completion" else ENCODING.encode_ordinary(":")
    )
    assert all(item.endings)


def test_texts_with_special_tokens_in_them_are_plain_text():
    item, _ = encode(replace(example(), ctx="a <|endoftext|>"), "completion", ENCODING)
    assert END_OF_TEXT not in item.context


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "URL", "http://127.0.0.1:9/hellaswag_{split}.jsonl")
    monkeypatch.setattr(
        download, "PATIENCE", Patience(give_up_seconds=0.3, first_wait_seconds=0.05)
    )
    monkeypatch.setenv("HELLASWAG_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_file_and_no_network_is_an_error_of_its_own(offline):
    with pytest.raises(
        DataUnavailable, match=r"no .*hellaswag_val.jsonl, and it cannot be downloaded: http"
    ):
        ensure_data()
    assert issubclass(DataUnavailable, HellaSwagError)


def test_the_published_file_is_used_without_network_and_no_other_in_its_place(offline, monkeypatch):
    content = ITEMS.read_bytes()
    monkeypatch.setitem(
        examples.PUBLISHED_FILES, "val", (len(content), hashlib.sha256(content).hexdigest())
    )
    offline.mkdir()
    (offline / "hellaswag_val.jsonl").write_bytes(content)
    assert ensure_data() == offline / "hellaswag_val.jsonl"
    assert ensure_data("val", offline) == offline / "hellaswag_val.jsonl"
    (offline / "hellaswag_val.jsonl").write_bytes(content.replace(b"fern", b"farm"))
    with pytest.raises(DataUnavailable):
        ensure_data()


def test_splits_without_a_known_hash_are_judged_by_their_lines(offline):
    offline.mkdir()
    (offline / "hellaswag_train.jsonl").write_bytes(ITEMS.read_bytes())
    assert ensure_data("train").name == "hellaswag_train.jsonl"
    for bad in (b"", b"<html>\n</html>\n", ITEMS.read_bytes()[:-40]):
        (offline / "hellaswag_train.jsonl").write_bytes(bad)
        with pytest.raises(DataUnavailable):
            ensure_data("train")
