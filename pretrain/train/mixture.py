"""Which source each training sequence of a mixture comes from, as a pure function of its number.

    sources = parse_mixture(["web=data/fineweb:0.7", "books=data/books:0.3@10000:0.6"])
    plan = MixturePlan([0.7, 0.3])
    plan.pick(np.arange(10))      # sources [0 1 0 0 ...] and the numbers 0, 0, 1, 2 ... within each

Sequence p of a run is sequence number n of source s; both follow from p alone, so nothing has to be
saved, any world size and any interruption train on the same sequences, and each source goes through
epochs of its own. After any p sequences, each source has had its weight times p of them, to within
one sequence: random draws would be off by hundreds after 10,000 steps.

Such an even order is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics
32, 1980): weights that are fractions with a common denominator repeat after that many sequences, so
one period in a table answers for any p.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from pretrain.errors import UserError

LONGEST_PERIOD = 100_000  # sequences: weights of up to five decimal digits
NUMBER = r"[0-9.]{1,20}"
SOURCE_PATTERN = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)=(?P<folder>.+?)"
    rf":(?P<weight>{NUMBER})(?P<later>(?:@[0-9]{{1,12}}:{NUMBER})*)"
)


class MixtureError(UserError):
    """A mixture that cannot be trained on; one line for the user."""


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture: its shards and its weight from given steps on."""

    name: str
    folder: str
    weights: tuple[tuple[int, Fraction], ...]  # (step, weight from this step on), the first at 0

    def weight_at(self, step: int) -> Fraction:
        """The weight in force for the batch of this step."""
        return [weight for start, weight in self.weights if start <= step][-1]


def is_mixture(words: Sequence[str]) -> bool:
    """Whether --data_dir means a mixture rather than one folder; what looks like neither, such as
    web=data without a weight, is taken for a mixture and refused as one."""
    return len(words) > 1 or ("=" in words[0] and not os.path.isdir(words[0]))


def parse_mixture(words: Sequence[str]) -> list[MixtureSource]:
    """NAME=FOLDER:WEIGHT[@STEP:WEIGHT ...] for each source. Weights are relative: they need not add
    up to 1. Raises MixtureError that names what is wrong and how it is written."""
    sources, problems = read_mixture(words)
    if problems:
        raise MixtureError(problems[0])
    return sources


def read_mixture(words: Sequence[str]) -> tuple[list[MixtureSource], list[str]]:
    """(the sources, all problems, one line each): only without problems is it a mixture."""
    sources, problems = [], []
    for word in words:
        try:
            sources.append(_parse_source(word))
        except MixtureError as error:
            problems.append(str(error))
    names = [source.name for source in sources]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        problems.append(f"two sources are named {name}; give each a name of its own")
    folders: dict[str, str] = {}
    for source in sources:
        first = folders.setdefault(os.path.realpath(source.folder), source.name)
        if first != source.name:
            problems.append(
                f"{first} and {source.name} are one folder, {source.folder}; name it once, with the"
                " sum of its weights"
            )
    return sources, problems or _problems_of_weights(sources)


def _problems_of_weights(sources: Sequence[MixtureSource]) -> list[str]:
    for step in sorted({start for source in sources for start, _ in source.weights}):
        weights = [source.weight_at(step) for source in sources]
        if not any(weights):
            return [f"from step {step} on every weight is 0; give one source a weight"]
        try:
            _shares_and_period(weights)
        except MixtureError as error:
            return [str(error)]
    return []


def _parse_source(word: str) -> MixtureSource:
    parts = SOURCE_PATTERN.fullmatch(word)
    if not parts:
        form = "NAME=FOLDER:WEIGHT, such as web=data/fineweb:0.7 or books=data/books:0.3@10000:0.6"
        raise MixtureError(f"{word!r} is not a source of a mixture; write {form}")
    weights = [(0, parts["weight"])]
    weights += [
        (int(step), weight) for step, weight in re.findall(rf"@([0-9]+):({NUMBER})", parts["later"])
    ]
    steps = [step for step, _ in weights]
    if steps != sorted(set(steps)):
        raise MixtureError(
            f"{word!r}: the steps at which its weight changes have to rise from 1 on"
        )
    try:
        return MixtureSource(
            parts["name"], parts["folder"], tuple((step, Fraction(text)) for step, text in weights)
        )
    except ValueError:
        raise MixtureError(f"{word!r}: a weight is a number such as 0.7 or 3") from None


def _shares_and_period(weights: Sequence[Fraction]) -> tuple[list[Fraction], int]:
    """What each source has of the whole, and after how many sequences the order repeats. Raises
    MixtureError where that is after more than LONGEST_PERIOD."""
    shares = [weight / sum(weights) for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        raise MixtureError(
            f"weights {', '.join(str(float(w)) for w in weights)} repeat only after {period:,} "
            f"sequences; round them so that they do within {LONGEST_PERIOD:,}"
        )
    return shares, period


class MixturePlan:
    """The order of sources for constant weights: a table of one period."""

    def __init__(self, weights: Sequence[float | Fraction]):
        """weights: relative, not negative, one at least positive. Raises MixtureError where their
        fractions have no common denominator of up to LONGEST_PERIOD."""
        exact = [w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights]
        self.shares, period = _shares_and_period(exact)
        self.counts = np.array([int(share * period) for share in self.shares])  # per period
        self.sources = _even_order(self.counts.tolist())  # (period,) int64
        # Of each place: how many earlier places of the period have the same source.
        taken = self.sources[:, None] == np.arange(len(exact))
        self.before = np.cumsum(taken, axis=0) - taken  # (period, sources)

    def pick(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within the source) of sequences, each int64 like `numbers`."""
        periods, places = np.divmod(numbers, len(self.sources))
        sources = self.sources[places]
        return sources, periods * self.counts[sources] + self.before[places, sources]

    def taken(self, count: int) -> np.ndarray:
        """How many of the first `count` sequences come from each source, int64 (sources,)."""
        periods, places = divmod(count, len(self.sources))
        within = np.bincount(self.sources[:places], minlength=len(self.counts))
        return periods * self.counts + within


def _even_order(counts: Sequence[int]) -> np.ndarray:
    """One period of Tijdeman's order: after t places, source s has had t * counts[s] / period of
    them to within 1 - 1 / (2k - 2), k being the number of sources with a count.

    At each place, of the sources that would fall behind by 1 / (2k - 2) at least, the one whose
    deadline comes first. All numbers are whole, multiplied by period * (2k - 2), so that nothing
    depends on rounding.
    """
    period, used = sum(counts), [s for s, count in enumerate(counts) if count]
    if len(used) == 1:
        return np.full(period, used[0])
    slack = 2 * len(used) - 2
    order, had = [], dict.fromkeys(used, 0)
    for place in range(1, period + 1):
        best, deadline = -1, Fraction(0)
        for s in used:
            behind = slack * (place * counts[s] - period * had[s])
            if behind < period:  # it may wait
                continue
            latest = Fraction(slack * period - period - behind, counts[s])
            if best < 0 or latest < deadline:
                best, deadline = s, latest
        order.append(best)
        had[best] += 1
    return np.array(order)


class MixtureSchedule:
    """The order of sources where weights change at given steps: a MixturePlan for each stretch."""

    def __init__(self, sources: Sequence[MixtureSource], sequences_per_step: int):
        """sequences_per_step: of the global batch. Raises MixtureError like MixturePlan."""
        self.steps = sorted({start for source in sources for start, _ in source.weights})
        self.starts = np.array(self.steps, np.int64) * sequences_per_step
        self.plans = [MixturePlan([s.weight_at(step) for s in sources]) for step in self.steps]
        self.offsets = [np.zeros(len(sources), np.int64)]  # taken before each stretch
        for plan, length in zip(self.plans, np.diff(self.starts).tolist(), strict=False):
            self.offsets.append(self.offsets[-1] + plan.taken(length))

    def pick(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within the source) of the run's sequences, each int64 like `numbers`."""
        stretches = np.searchsorted(self.starts, numbers, side="right") - 1
        sources, within = np.empty_like(numbers), np.empty_like(numbers)
        for i in np.unique(stretches).tolist():
            here = stretches == i
            sources[here], found = self.plans[i].pick(numbers[here] - self.starts[i])
            within[here] = found + self.offsets[i][sources[here]]
        return sources, within

    def taken(self, count: int) -> np.ndarray:
        """How many of the run's first `count` sequences come from each source, int64 (sources,)."""
        i = int(np.searchsorted(self.starts, count, side="right")) - 1
        return self.offsets[i] + self.plans[i].taken(count - int(self.starts[i]))

    def shares_at(self, step: int) -> list[Fraction]:
        """What each source has of the batch of this step."""
        return self.plans[int(np.searchsorted(self.steps, step, side="right")) - 1].shares
