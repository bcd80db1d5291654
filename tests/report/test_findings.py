"""Each rule on a log that shows the fault and on logs that look a little like it and do not."""

import math
import re

import numpy as np
import pytest
from test_report import T0, healthy_run, of, write_run

from pretrain.report import findings
from pretrain.report.findings import find, noise
from pretrain.report.runs import Run
from pretrain.report.spikes import RECENT, WINDOW, find_spikes
from pretrain.train.settings import build_parser


@pytest.fixture
def titles(tmp_path):
    """Records -> the titles of what is found in them."""
    return lambda records: [
        finding.title for finding in find(Run.load(write_run(tmp_path, records)))
    ]


@pytest.fixture
def only(tmp_path):
    """Records -> the one finding that there is."""

    def only(records):
        (finding,) = find(Run.load(write_run(tmp_path, records)))
        return finding

    return only


def change(records, event, key, value):
    """The records with `value(step, old)` under `key` in those of one event."""
    return [{**r, key: value(r["step"], r[key])} if r["event"] == event else r for r in records]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"noise": 0.3},
        {"points": 1000, "noise": 0.01},
        {"points": 8},
        {"points": 25, "noise": 0.3},
        {"points": 60, "noise": 0.15},
        {"points": 2000, "noise": 0.15, "interval": 1},
        {"evals": 0},
        {"evals": 200, "noise": 0.1},
    ],
    ids=str,
)
def test_nothing_is_wrong_with_a_healthy_run(titles, kind, seed):
    assert titles(healthy_run(seed=seed, **kind)) == []


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_uneven_speed_and_restless_gradients_are_no_fault(titles, seed):
    rng = np.random.default_rng(seed)
    records = healthy_run(600, seed=seed)
    records = change(records, "train", "loss", lambda step, loss: loss + 0.05 * rng.standard_t(5))
    records = change(
        records, "train", "tokens_per_second", lambda step, _: 5e4 * (1 + 0.2 * rng.random())
    )
    records = change(records, "train", "grad_norm", lambda step, norm: norm * rng.lognormal(0, 0.6))
    assert titles(records) == []


def test_every_part_of_a_healthy_run_is_healthy_while_it_goes_on(titles):
    records = healthy_run(300)
    for end in range(1, len(records), 17):
        assert titles(records[:end]) == []


# ---- validation loss rising


def overfit(records, by):
    return change(
        records, "eval", "val_loss", lambda step, loss: loss + by * max(0, step - 1000) / 1000
    )


def test_validation_loss_that_rises_while_training_loss_falls_is_found(only):
    records = overfit(healthy_run(), by=1.0)
    finding = only(records)
    vals = {record["step"]: record["val_loss"] for record in of(records, "eval")}
    best = min(vals, key=vals.get)
    assert (
        finding.title == "Validation loss rises while training loss falls" and finding.step == best
    )
    for value in (vals[best], vals[2000]):
        assert f"{value:.4f}" in finding.text
    assert f"best_val_loss.pt is from step {best:,}" in finding.advice


def test_the_logged_training_loss_stands_in_where_evaluations_lack_it(titles):
    records = overfit(healthy_run(), by=1.0)
    for record in of(records, "eval"):
        del record["train_loss"]
    assert titles(records) == ["Validation loss rises while training loss falls"]


def test_a_validation_loss_that_wavers_is_not_overfitting(titles):
    rng = np.random.default_rng(1)
    for _ in range(10):
        shaky = change(
            healthy_run(evals=20), "eval", "val_loss", lambda step, v: v + 0.03 * rng.normal()
        )
        assert titles(shaky) == []
    last_is_worse = healthy_run()
    of(last_is_worse, "eval")[-1]["val_loss"] += 0.3
    assert titles(last_is_worse) == [], "once is no trend"


def test_both_losses_rising_is_divergence_and_not_overfitting(titles):
    def up(step, loss):
        return loss + max(0, step - 1000) / 500

    records = change(healthy_run(), "train", "loss", up)
    for key in ("val_loss", "train_loss"):
        records = change(records, "eval", key, up)
    assert titles(records) == ["Training loss rises"]


# ---- spikes


def test_a_spike_is_found_with_its_height_and_its_end(only):
    heights = {1200: 2.0, 1210: 3.5, 1220: 1.5, 1230: 0.8}
    records = change(healthy_run(), "train", "loss", lambda step, loss: loss + heights.get(step, 0))
    peak = next(record["loss"] for record in of(records, "train") if record["step"] == 1210)
    finding = only(records)
    assert finding.title == "A loss spike" and finding.step == 1200
    assert "At step 1,210" in finding.text and f"to {peak:.3f}" in finding.text
    assert "gradient norm" in finding.text
    assert re.search(r"back at that level by step 1,2[345]0", finding.text)


def test_a_spike_during_warm_up_is_found_after_ten_lines(only):
    records = change(healthy_run(), "train", "loss", lambda step, loss: loss + 9.0 * (step == 120))
    assert only(records).step == 120


def test_several_spikes_are_one_finding_that_lists_them(only):
    heights = {600: 2.0, 1200: 3.0, 1800: 2.5}
    finding = only(
        change(healthy_run(), "train", "loss", lambda step, loss: loss + heights.get(step, 0))
    )
    assert finding.title == "Loss spikes" and finding.step == 600
    assert (
        "At step 1,200" in finding.text
        and "highest of 3, at steps 600, 1,200, 1,800" in finding.text
    )


def test_a_spike_that_stays_is_said_to_stay(tmp_path):
    records = change(healthy_run(), "train", "loss", lambda step, loss: loss + 3.0 * (step > 1200))
    found = {f.title: f for f in find(Run.load(write_run(tmp_path, records)))}
    assert "it has not come back" in found["A loss spike"].text
    assert found["Training loss rises"].step == pytest.approx(1100, abs=150)


def test_a_spike_at_the_end_is_left_open(only):
    records = change(healthy_run(), "train", "loss", lambda step, loss: loss + 3.0 * (step == 2000))
    assert "ends too soon" in only(records).text


def test_noise_of_the_size_of_the_jump_hides_it(titles):
    records = change(
        healthy_run(noise=0.5), "train", "loss", lambda step, loss: loss + 1.0 * (step == 1200)
    )
    assert titles(records) == []


def test_the_median_before_is_right_beyond_the_first_part():
    values = np.random.default_rng(0).standard_normal(25_000) * 0.01
    places = [WINDOW - 1, WINDOW, 9_999 + WINDOW, 10_000 + WINDOW, 24_999]
    values[places] += 5.0
    found = find_spikes(values)
    assert sorted({spike.first for spike in found} | {spike.last for spike in found}) == places
    for spike in found:
        assert spike.level == np.median(values[spike.first - RECENT : spike.first])


# ---- loss not moving


@pytest.mark.parametrize("level", [10.9, 7.4])
def test_a_loss_that_never_moves_is_found(only, level):
    rng = np.random.default_rng(0)
    stuck = change(
        healthy_run(evals=0), "train", "loss", lambda step, _: level + 0.05 * rng.normal()
    )
    finding = only(stuck)
    assert finding.title == "Loss does not move" and finding.step == 10
    assert f"{level:.1f}"[:3] in finding.text and "learning rate of 6." in finding.text


def test_a_loss_that_stops_moving_half_way_is_found(only):
    rng = np.random.default_rng(0)

    def plateau(step, loss):
        return loss if step < 3200 else 3.58 + 0.05 * rng.normal()

    finding = only(change(healthy_run(800, evals=0), "train", "loss", plateau))
    assert finding.title == "Loss does not move any more" and finding.step == 4010


def test_a_loss_may_stand_still_during_warm_up_and_once_it_is_near_zero(titles):
    rng = np.random.default_rng(0)
    warming = change(
        healthy_run(evals=0), "train", "loss", lambda step, _: 10.9 + 0.03 * rng.normal()
    )
    assert titles(change(warming, "train", "learning_rate", lambda step, _: 1e-7 * step)) == []
    memorised = change(
        healthy_run(evals=0), "train", "loss", lambda step, _: 0.05 + 9 * math.exp(-step / 50)
    )
    assert titles(memorised) == []


def test_a_log_too_noisy_to_tell_is_not_called_stuck(titles):
    rng = np.random.default_rng(0)
    assert (
        titles(
            change(healthy_run(evals=0), "train", "loss", lambda step, _: 4 + 0.5 * rng.normal())
        )
        == []
    )


# ---- gradient norm


def test_a_gradient_norm_that_keeps_growing_is_found(only):
    def grow(step, norm):
        return norm * math.exp(max(0, step - 1500) / 1000)

    finding = only(change(healthy_run(400), "train", "grad_norm", grow))
    assert finding.title == "Gradient norm grows" and 1500 < finding.step < 2500
    assert "above --grad_clip 1" in finding.text


@pytest.mark.parametrize(
    "factor",
    [
        lambda part: 1 + part,  # twofold over the run, as healthy runs do
        lambda part: 1 + 9 * (0.4 < part < 0.6),  # up, and down again
        lambda part: 1 + 9 * (part > 0.97),  # the last lines only
    ],
    ids=["slowly", "a hill", "the end"],
)
def test_gradient_norms_that_drift_or_pass_over_a_hill_are_no_finding(titles, factor):
    records = change(
        healthy_run(400), "train", "grad_norm", lambda step, norm: norm * factor(step / 4000)
    )
    assert titles(records) == []


# ---- throughput


def test_throughput_that_drops_for_good_is_found(only):
    finding = only(
        change(
            healthy_run(), "train", "tokens_per_second", lambda s, v: v * (0.6 if s > 1500 else 1)
        )
    )
    assert finding.title == "Throughput drops" and finding.step == pytest.approx(1510, abs=20)
    assert (
        "From step 1,5" in finding.text and " on it is " in finding.text and "-40%" in finding.text
    )


def test_throughput_that_drops_for_a_while_is_found_with_its_end(only):
    finding = only(
        change(
            healthy_run(),
            "train",
            "tokens_per_second",
            lambda s, v: v * (0.5 if 800 < s <= 1200 else 1),
        )
    )
    assert "to step 1,2" in finding.text


def test_slow_first_steps_single_stalls_and_a_smaller_machine_are_no_drop(titles):
    def slow(step, speed):
        return speed * (0.1 if step <= 20 or step % 370 == 0 else 1)

    assert titles(change(healthy_run(), "train", "tokens_per_second", slow)) == []
    records = change(
        healthy_run(), "train", "tokens_per_second", lambda s, v: v * (0.5 if s > 1000 else 1)
    )
    middle = next(i for i, record in enumerate(records) if record["step"] > 1000)
    resumed = {"event": "start", "time": T0 + 1000, "step": 1000, "processes": 1}
    assert titles([*records[:middle], resumed, *records[middle:]]) == []


# ---- not finite


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_found(titles, only, value):
    records = change(
        healthy_run(), "train", "loss", lambda step, loss: value if step >= 1500 else loss
    )
    finding = only(records)
    assert (finding.title, finding.step) == (
        "Loss not finite",
        1500,
    ) and f"loss {value}" in finding.text
    skipped = change(
        healthy_run(), "train", "grad_norm", lambda step, norm: "inf" if step == 500 else norm
    )
    assert titles(skipped) == [], "float16 skips such a step"


def test_a_run_that_stopped_itself_is_found_though_no_line_shows_it(only):
    stop = {"event": "stop", "time": T0 + 999, "step": 1234, "reason": "not finite", "loss": "nan"}
    finding = only([*healthy_run(), stop])
    assert finding.step == 1234 and "loss nan" in finding.text


def test_findings_come_in_the_order_of_their_steps(tmp_path):
    records = overfit(healthy_run(), by=1.0)
    records = change(records, "train", "loss", lambda step, loss: loss + 3 * (step == 1900))
    records = change(
        records, "train", "tokens_per_second", lambda s, v: v * (0.5 if 500 < s < 900 else 1)
    )
    steps = [finding.step for finding in find(Run.load(write_run(tmp_path, records)))]
    assert len(steps) == 3 and steps == sorted(steps)


def test_the_noise_of_a_trend_is_that_around_it():
    x = np.linspace(0, 1, 2000)
    values = 10 / (1 + 20 * x) + np.random.default_rng(0).normal(0, 0.07, 2000)
    values[[5, 900]] = 100.0
    assert noise(values) == pytest.approx(0.07, rel=0.1)


def test_advice_names_flags_that_exist():
    with open(findings.__file__, encoding="utf-8") as file:
        named = set(re.findall(r"--[a-z][a-z0-9_]*", file.read())) - {"--verify"}  # fineweb.py's
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert named and named <= known
