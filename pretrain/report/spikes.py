"""Spikes in a noisy, falling curve.

    for spike in find_spikes(loss):
        print(spike.peak, loss[spike.peak], "from", spike.level)

A slope, a ramp and noise of any size are none.
"""

import math
from dataclasses import dataclass

import numpy as np

WINDOW = 50  # values that each value is compared with
RECENT = 7  # and the last of them, which tell a spike from a slope


@dataclass
class Spike:
    first: int  # indices of the first high value, the highest, the last
    peak: int
    last: int
    level: float  # median of the RECENT values before the first


def find_spikes(values: np.ndarray) -> list[Spike]:
    """Stretches of values far above those before them.

    High is what exceeds both the median of the WINDOW values before and that of the last RECENT
    ones by 0.2 and by 8 times their spread (12 times where it stands alone). The spread around
    their trend is the larger of two robust estimates; the second sees heavy tails.
    """
    recent = _median_before(values, RECENT)
    levels = np.maximum(recent, _median_before(values, WINDOW, at_least=10))
    high: dict[int, float] = {}  # index: by how many spreads
    for i in np.flatnonzero(values > levels + 0.2).tolist():
        # Second differences know no trend, and have 1 + 4 + 1 times the variance.
        apart = np.abs(np.diff(values[max(0, i - WINDOW) : i], 2)) / math.sqrt(6)
        # Of a normal distribution, half lies within sd / 1.4826 and nine tenths within 1.645 sd.
        spread = max(1.4826 * float(np.median(apart)), float(np.quantile(apart, 0.9)) / 1.645, 1e-9)
        if values[i] > levels[i] + 8 * spread:
            high[i] = (values[i] - levels[i]) / spread
    found: list[Spike] = []
    for i in high:
        if found and i - found[-1].last < WINDOW // 2:
            found[-1].last = i
            found[-1].peak = max(found[-1].peak, i, key=lambda index: values[index])
        else:
            found.append(Spike(i, i, i, float(recent[i])))
    return [spike for spike in found if spike.last > spike.first or high[spike.first] > 12]


def first_index_back(values: np.ndarray, spike: Spike, near: float) -> int | None:
    """The first index after a spike from which five values have a median within `near` of its
    level."""
    for i in range(spike.last + 1, len(values) - 4):
        if np.median(values[i : i + 5]) <= spike.level + near:
            return i
    return None


def _median_before(values: np.ndarray, window: int, at_least: int = RECENT) -> np.ndarray:
    """Per value the median of the `window` values before it, at first of fewer; inf under
    `at_least`."""
    medians = np.full(len(values), np.inf)
    for i in range(at_least, min(window, len(values))):
        medians[i] = np.median(values[:i])
    for begin in range(window, len(values), 10_000):  # in parts: each copies its windows
        end = min(begin + 10_000, len(values))
        windows = np.lib.stride_tricks.sliding_window_view(values[begin - window : end - 1], window)
        medians[begin:end] = np.median(windows, axis=1)
    return medians
