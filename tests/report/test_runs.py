import math
import statistics

import numpy as np
import pytest
from test_report import T0, healthy_run, write_run

from pretrain.report.page import key_figures
from pretrain.report.runs import Run, RunError, smooth, smoothing_window


def test_steps_that_a_kill_undid_are_left_out(tmp_path):
    first = healthy_run(100, seed=1, evals=0)
    resumed = {"event": "start", "time": T0 + 5000, "step": 600}
    again = [record for record in healthy_run(100, seed=2, evals=0) if record.get("step", 0) > 600]
    again = [{**record, "time": record["time"] + 5000 - 60} for record in again]
    records = [
        *first[:90],
        resumed,
        *again[:10],
    ]  # killed at step 890, resumed from 600, now at 700
    run = Run.load(write_run(tmp_path, records))
    expected = {record["step"]: record["loss"] for record in first[1:61]}
    expected |= {record["step"]: record["loss"] for record in again[:10]}
    assert dict(zip(run.steps.tolist(), run.loss.tolist(), strict=True)) == expected
    assert run.last_step == 700 and run.resumed_at == [600.0]
    assert run.seconds_running == pytest.approx(89 + 10), "not the hour in between"


def test_repeated_steps_without_a_start_between_keep_the_last_time(tmp_path):
    losses = ((1, 9), (2, 8), (2, 8.5), (3, 7))
    records = [{"event": "train", "step": step, "loss": loss} for step, loss in losses]
    assert Run.load(write_run(tmp_path, records)).loss.tolist() == [9, 8.5, 7]


def test_how_a_run_stands_is_said_on_the_page(tmp_path):
    going = Run.load(write_run(tmp_path, healthy_run()))
    end = going.records[-1]["time"]
    assert going.status(now=end + 60) == "still going"
    assert going.status(now=end + 7 * 86400) == "interrupted: the log breaks off"
    start = {"event": "start", "time": end + 100, "step": 1000}
    resumed = Run.load(write_run(tmp_path, [*healthy_run(), start]))
    assert resumed.status(now=end + 101) == "still going (resumed once)"
    assert "resumed at step 1,000" in [figure.note for figure in key_figures(resumed)]
    stopped = [{"event": "stop", "time": end + 200, "step": 1010, "reason": "signal 15"}]
    run = Run.load(write_run(tmp_path, [*healthy_run(), start, start, *stopped]))
    assert run.status() == "stopped by signal 15 (resumed 2 times)"


@pytest.mark.parametrize("n", [0, 1, 19, 20, 333])
def test_smoothing_is_the_median_of_neighbours(n):
    values = np.random.default_rng(n).standard_normal(n)
    values[7:8] = np.nan
    known = [value for value in values if not math.isnan(value)]
    half, medians = smoothing_window(n) // 2, []
    for i in range(len(known)):
        left = min(half, i)
        medians.append(statistics.median(known[i - left : i + left + 1]))
    expected = [math.nan if math.isnan(value) else medians.pop(0) for value in values]
    assert smooth(values) == pytest.approx(np.array(expected), nan_ok=True)


def test_run_errors_are_for_users(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        Run.load(tmp_path / "nothing")
