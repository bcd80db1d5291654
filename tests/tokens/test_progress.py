"""What people see while shards are built."""

import numpy as np
import pytest

from pretrain.text.documents import Unit
from pretrain.tokens.estimate import Estimate
from pretrain.tokens.pipeline import TokenBatch
from pretrain.tokens.progress import ConsoleProgress, in_bytes, rounded
from pretrain.tokens.shards import Manifest


def batch_of(unit: Unit, tokens: int) -> TokenBatch:
    none = np.empty(0, np.int64)
    return TokenBatch(unit, np.zeros(tokens, np.uint16), none, none, None, 1, {}, None, 4 * tokens)


def begin(expected_tokens: int, max_tokens: int | None = None, text_bytes: int = 40_000_000):
    progress = ConsoleProgress(Estimate(None, False, text_bytes, expected_tokens), max_tokens)
    progress.begin("writing", Manifest("x", {}, {}, {}, 1))
    return progress


def test_the_total_is_corrected_by_whole_units_and_does_not_swing_within_one():
    progress = begin(20_000_000)  # of which there will be 10 million: four bytes a token
    totals = []
    for i in range(5):
        for _ in range(4):
            progress.batch(batch_of(Unit(0, i, i + 1, None, 8_000_000), 500_000))
            totals.append(progress.total_tokens())
    assert totals == [20_000_000] * 4 + [10_000_000] * 16
    assert progress.tokens == progress.bar.total == 10_000_000


def test_the_total_is_never_below_what_is_there_nor_above_max_tokens():
    progress = begin(1_000, max_tokens=1_700)
    progress.batch(batch_of(Unit(0, 0, 1, None, 10), 1_500))
    assert progress.total_tokens() == 1_500
    progress.batch(batch_of(Unit(0, 0, 1, None, 10), 1_500))
    assert progress.total_tokens() == 1_700


def test_without_a_terminal_a_line_says_the_same_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr("pretrain.tokens.progress.LINE_SECONDS", 0)
    progress = begin(3_000_000)
    progress.batch(batch_of(Unit(0, 0, 1, 0, 10), 1_500_000))
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1
    assert shown.out.startswith("writing: 1,500,000 of about 3,000,000 tokens, ")
    assert all(part in shown.out for part in ("tokens/s", "MB/s", "shard 0", "min left"))


def test_a_line_before_the_first_document_says_so(monkeypatch, capsys):
    monkeypatch.setattr("pretrain.tokens.progress.LINE_SECONDS", 0)
    progress = begin(3_000_000)
    progress.batch(batch_of(Unit(0, 0, 1, 0, 10), 0))
    assert capsys.readouterr().out.endswith("no document yet\n")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (950, "950 B"), (12_345, "12.3 kB"), (999_499, "999 kB"), (2.06e10, "20.6 GB")],
)
def test_sizes_have_three_digits_and_a_decimal_unit(number, text):
    assert in_bytes(number) == text


def test_large_numbers_are_rounded_to_three_digits():
    assert [rounded(n) for n in (0, 999, 41_349_123)] == ["0", "999", "41,300,000"]
