"""The order of sources in a mixture: even, exact, and a function of the sequence's number alone."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.train.mixture import (
    LONGEST_PERIOD,
    MixtureError,
    MixturePlan,
    MixtureSchedule,
    is_mixture,
    parse_mixture,
)

WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def test_after_every_one_of_10_000_steps_each_share_is_within_one_sequence_of_its_weight():
    weights, batch = np.array([0.7, 0.2, 0.07, 0.03]), 24
    sources, _ = MixturePlan(weights.tolist()).pick(np.arange(10_000 * batch))
    had = np.cumsum(sources[:, None] == np.arange(4), axis=0)
    wanted = np.arange(1, len(sources) + 1)[:, None] * weights
    assert np.abs(had - wanted).max() < 1  # at every sequence, so at every step too


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_no_source_is_ever_a_sequence_ahead_or_behind(weights):
    plan = MixturePlan(weights)
    length = 3 * len(plan.sources)
    sources, _ = plan.pick(np.arange(length))
    had = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    total = sum(weights)
    for s, weight in enumerate(weights):
        for count in range(length):
            off = Fraction(int(had[count, s])) - Fraction(weight * (count + 1), total)
            assert abs(off) < 1 or len(weights) == 1


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_numbers_within_a_source_count_up_without_a_gap_from_any_start(weights, start):
    plan = MixturePlan(weights)
    sources, within = plan.pick(start + np.arange(200))
    counted = plan.taken(start)
    for source, number in zip(sources.tolist(), within.tolist(), strict=True):
        assert number == counted[source]
        counted[source] += 1
    assert counted.tolist() == plan.taken(start + 200).tolist()


def test_a_changed_weight_holds_from_its_step_on_and_skips_no_sequence():
    sources = parse_mixture(["web=a:0.7", "books=b:0.3@100:0.6@150:0"])
    schedule = MixtureSchedule(sources, sequences_per_step=8)
    picked, within = schedule.pick(np.arange(8 * 400))
    for s in range(2):
        assert within[picked == s].tolist() == list(range((picked == s).sum()))
    for first, last, share in ((0, 100, 0.3), (100, 150, 0.6 / 1.3), (150, 400, 0.0)):
        had = (picked[8 * first : 8 * last] == 1).sum()
        assert abs(had - 8 * (last - first) * share) < 1
    for count in (0, 1, 799, 800, 801, 1200, 3000):
        assert schedule.taken(count).tolist() == np.bincount(picked[:count], minlength=2).tolist()


def test_the_order_of_any_part_is_that_of_the_whole():
    schedule = MixtureSchedule(parse_mixture(["a=x:3@7:1", "b=y:2@5:4", "c=z:1"]), 4)
    whole = schedule.pick(np.arange(400))
    shuffled = np.random.default_rng(1).permutation(400)
    part = schedule.pick(shuffled)
    assert np.array_equal(part[0], whole[0][shuffled])
    assert np.array_equal(part[1], whole[1][shuffled])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["web=data:0.7", "web=more:0.3"], "two sources are named web"),
        (["web=data"], "NAME=FOLDER:WEIGHT"),
        (["web=data:0", "books=b:0"], "every weight is 0"),
        (["web=data:1@10:0"], "from step 10 on every weight is 0"),
        (["web=data:1@10:2@10:3"], "have to rise"),
        (["web=data:1@0:3"], "have to rise"),
        (["web=data:1.2.3"], "a weight is a number"),
    ],
)
def test_a_mixture_that_says_nothing_clear_is_refused_in_a_line(words, said):
    with pytest.raises(MixtureError, match="(?s)" + said) as error:
        parse_mixture(words)
    assert "\n" not in str(error.value)


def test_weights_without_a_short_common_period_are_refused():
    with pytest.raises(MixtureError, match=f"{LONGEST_PERIOD:,}"):
        MixturePlan([0.7000001, 0.3])


def test_one_folder_is_no_mixture_and_windows_paths_and_colons_are_folders():
    assert not is_mixture(["data/fineweb"])
    assert not is_mixture(["C:/data/x"])
    assert is_mixture(["web=C:/data/x:0.5"])
    assert parse_mixture(["web=C:/data/x:0.5"])[0].folder == "C:/data/x"
