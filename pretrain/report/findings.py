"""What looks wrong in a run, in words: where it begins, the numbers, and what to try.

    for finding in find(Run.load("checkpoints")):
        print(finding.step, finding.title, finding.text, finding.advice)

Every rule compares with the noise of the run's own log, so that a small batch does not look like a
fault, and stays silent while there are too few lines to tell.
"""

import math
from dataclasses import dataclass

import numpy as np

from pretrain.report.runs import Run, column, smooth
from pretrain.report.spikes import find_spikes, first_index_back

MIN_POINTS = 40  # logged steps below which nothing is said about trends


@dataclass(frozen=True)
class Finding:
    title: str
    step: int  # where it begins
    text: str
    advice: str


def find(run: Run) -> list[Finding]:
    """All findings of a run, the earliest first."""
    rules = (
        not_finite,
        overfitting,
        spikes,
        rising,
        not_moving,
        gradient_norm_growing,
        throughput_dropping,
    )
    found = [finding for rule in rules if (finding := rule(run)) is not None]
    return sorted(found, key=lambda finding: finding.step)


def not_finite(run: Run) -> Finding | None:
    """The loss became nan or infinite, or the run stopped itself because something did.

    A gradient norm alone is no fault: with float16 it is infinite now and then, and the step is
    left out.
    """
    ends = [run.stop] if run.stop and "finite" in str(run.stop.get("reason")) else []
    broken = [record for record in run.train if record.get("loss") in ("nan", "inf", "-inf")] + ends
    if not broken:
        return None
    step = int(broken[0].get("step", run.last_step or 0))
    values = ", ".join(
        f"{name} {broken[0][name]}" for name in ("loss", "grad_norm") if name in broken[0]
    )
    values = values or broken[0]["reason"]
    return Finding(
        "Loss not finite",
        step,
        f"At step {step:,} the run met numbers that are not finite: {values}.",
        "Continue from the last checkpoint with a lower --learning_rate or a longer "
        "--warmup_iters; with "
        "float16 try --dtype bfloat16 or float32.",
    )


def overfitting(run: Run) -> Finding | None:
    """Validation loss rises after its best while training loss goes on falling."""
    steps, val, train = (column(run.evals, key) for key in ("step", "val_loss", "train_loss"))
    if not np.isfinite(train).all():
        train = _at(steps, run.steps, smooth(run.loss))
    steps, val, train = _finite(steps, val, train)
    if len(val) < 4:
        return None
    best = int(np.argmin(val))
    margin = max(0.02, 0.01 * val[best], 4 * noise(val))
    after = val[best + 1 :]
    if len(after) < 2 or min(after[-2:]) < val[best] + margin or train[-1] >= train[best]:
        return None
    return Finding(
        "Validation loss rises while training loss falls",
        int(steps[best]),
        f"Validation loss was best at step {steps[best]:,.0f}, {val[best]:.4f}, and is "
        f"{val[-1]:.4f} at step "
        f"{steps[-1]:,.0f}; training loss fell from {train[best]:.4f} to {train[-1]:.4f} "
        "meanwhile. The "
        "model learns its training text by heart.",
        f"best_val_loss.pt is from step {steps[best]:,.0f}: use it. More text helps most; "
        "otherwise "
        "--dropout 0.1 to 0.2, a higher --weight_decay, or a smaller model.",
    )


def spikes(run: Run) -> Finding | None:
    """Training loss far above the steps before it."""
    steps, loss, norms = _finite(run.steps, run.loss, column(run.train, "grad_norm"))
    found = find_spikes(loss)
    if not found:
        return None
    worst = max(found, key=lambda spike: loss[spike.peak] - spike.level)
    back = first_index_back(loss, worst, near=max(0.1, 2 * noise(loss)))
    if back is not None:
        after = f"it was back at that level by step {steps[back]:,.0f}"
    elif len(loss) - worst.last > 20:
        after = f"it has not come back: {np.median(loss[-5:]):.3f} at step {steps[-1]:,.0f}"
    else:
        after = "the log ends too soon after it to say whether it comes back"
    norm = f" (gradient norm {norms[worst.peak]:.2f})" if math.isfinite(norms[worst.peak]) else ""
    text = (
        f"At step {steps[worst.peak]:,.0f} training loss jumped from {worst.level:.3f} to "
        f"{loss[worst.peak]:.3f}{norm}; {after}."
    )
    if len(found) > 1:
        listed = ", ".join(f"{steps[spike.peak]:,.0f}" for spike in found[:5])
        listed += " and later" if len(found) > 5 else ""
        text += f" It is the highest of {len(found)}, at steps {listed}."
    return Finding(
        "Loss spikes" if len(found) > 1 else "A loss spike",
        int(steps[found[0].first]),
        text,
        "A spike that heals does no harm. If they come again or stay: a lower --learning_rate, a "
        "longer "
        "--warmup_iters, a lower --grad_clip, or --beta2 0.95 where it is higher.",
    )


def rising(run: Run) -> Finding | None:
    """Training loss ends well above where it already was."""
    steps, loss = _finite(run.steps, run.loss)
    if len(loss) < MIN_POINTS:
        return None
    parts, medians = _parts(loss, 10)
    low = int(np.argmin(medians))
    margin = max(0.15, 0.03 * medians[low], 5 * noise(loss) / math.sqrt(len(parts[-1])))
    if low >= 8 or min(medians[-2:]) < medians[low] + margin:
        return None
    low_step = steps[parts[low]].mean()
    return Finding(
        "Training loss rises",
        int(low_step),
        f"Training loss was about {medians[low]:.3f} around step {low_step:,.0f} and is about "
        f"{medians[-1]:.3f} from step {steps[parts[-1][0]]:,.0f} to {steps[-1]:,.0f}.",
        "The run diverges: go back to a checkpoint before the rise with half the "
        "--learning_rate, or begin "
        "again with a longer --warmup_iters.",
    )


def not_moving(run: Run) -> Finding | None:
    """Training loss over the last quarter of the log is what it was over the quarter before."""
    steps, loss, rate = _finite(run.steps, run.loss, column(run.train, "learning_rate"))
    if len(loss) < MIN_POINTS or (
        np.isfinite(rate).all() and rate[-1] > 1.01 * rate[len(rate) // 2]
    ):
        return None  # while the learning rate still warms up, nothing need move
    half, last = len(loss) // 2, 3 * len(loss) // 4
    level, now = loss[half:last].mean(), loss[last:].mean()
    error = noise(loss) * math.sqrt(2 / (len(loss) - last))
    if level < 0.5 or abs(level - now) > 0.005 * level or 2 * error > 0.005 * level:
        return None
    start = float(np.median(loss[: max(3, len(loss) // 50)]))
    at_rate = f", at a learning rate of {rate[-1]:.2e}" if math.isfinite(rate[-1]) else ""
    if start - now < 0.03 * start:
        return Finding(
            "Loss does not move",
            int(steps[0]),
            f"Training loss was {start:.3f} at step {steps[0]:,.0f} and is {now:.3f} at step "
            f"{steps[-1]:,.0f}"
            f"{at_rate}.",
            "Nothing is learned: check that --learning_rate is neither far too small nor so "
            "large that the "
            "model broke at once (6e-4 suits 124M parameters); check the shards with fineweb.py "
            "--verify.",
        )
    return Finding(
        "Loss does not move any more",
        int(steps[half]),
        f"Training loss was {level:.3f} from step {steps[half]:,.0f} to {steps[last]:,.0f} and "
        f"{now:.3f} "
        f"from there to step {steps[-1]:,.0f}{at_rate}.",
        "If the learning rate is at its floor, this run is done: a longer --lr_decay_iters, more "
        "text or a "
        "larger model would go lower. If it is not, try half and twice the --learning_rate.",
    )


def gradient_norm_growing(run: Run) -> Finding | None:
    """The gradient norm climbs, after warm-up, to a multiple of what it was."""
    norms, rates = column(run.train, "grad_norm"), column(run.train, "learning_rate")
    warm = int(np.argmax(rates >= 0.999 * np.nanmax(rates))) if np.isfinite(rates).any() else 0
    steps, norms = _finite(run.steps[warm:], norms[warm:])
    if len(norms) < MIN_POINTS:
        return None
    parts, medians = _parts(norms, 8)
    low = int(np.argmin(medians[:-2]))
    least = medians[low]
    if medians[-1] < max(2.5 * least, least + 3 * noise(norms[parts[low]])):
        return None
    if (
        medians[-2] < 1.5 * least or medians[-1] < 0.9 * medians[-2]
    ):  # one late bump, or on its way back
        return None
    begins = parts[low][0] + int(np.argmax(smooth(norms)[parts[low][0] :] > 1.5 * least))
    clip = run.setting("grad_clip")
    return Finding(
        "Gradient norm grows",
        int(steps[begins]),
        f"The gradient norm was about {least:.2f} around step {steps[parts[low]].mean():,.0f}, "
        "passed half "
        f"as much again at step {steps[begins]:,.0f}, and is about {medians[-1]:.2f} at step "
        f"{steps[-1]:,.0f}"
        f"{f', above --grad_clip {clip:g}' if 0 < clip < medians[-1] else ''}.",
        "It often grows before the loss spikes or while the model learns its text by heart: "
        "watch both "
        "losses. A lower --learning_rate or a higher --weight_decay holds it.",
    )


def throughput_dropping(run: Run) -> Finding | None:
    """Tokens/s well below what the same process reached, for many log lines in a row."""
    lines = [record for record in run.processes()[-1] if record.get("event") == "train"]
    lines = lines[2:]  # compilation is in the first ones
    steps, rates = _finite(column(lines, "step"), column(lines, "tokens_per_second"))
    if len(rates) < 20:
        return None
    level = np.array([np.median(rates[max(0, i - 2) : i + 3]) for i in range(len(rates))])
    usual = float(np.quantile(level, 0.8))
    begin, end = _longest_stretch(
        level < usual * (1 - max(0.2, 3 * noise(rates) / max(usual, 1e-9)))
    )
    if end - begin < max(5, len(rates) // 20):
        return None
    slow = float(np.median(rates[begin:end]))
    until = "on" if end == len(rates) else f"to step {steps[end - 1]:,.0f}"
    return Finding(
        "Throughput drops",
        int(steps[begin]),
        f"From step {steps[begin]:,.0f} {until} it is {slow:,.0f} tokens/s instead of {usual:,.0f} "
        f"({slow / usual - 1:+.0%}).",
        "Look for another process on the machine (nvidia-smi, top), a hot or throttled device, "
        "swapping, or "
        "shards on a slow disk.",
    )


def noise(values: np.ndarray) -> float:
    """Standard deviation of the values around their trend, from second differences; outliers weigh
    little."""
    bends = np.diff(values[np.isfinite(values)], 2)
    # The second difference of independent values has (1 + 4 + 1) times their variance; 1.4826: MAD
    # to sd.
    return float(1.4826 * np.median(np.abs(bends)) / math.sqrt(6)) if len(bends) else 0.0


def _finite(steps: np.ndarray, values: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """All arrays without the entries where `values` is not finite."""
    keep = np.isfinite(values)
    return tuple(array[keep] for array in (steps, values, *others))


def _parts(values: np.ndarray, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The indices of `count` equal stretches, and their medians."""
    parts = np.array_split(np.arange(len(values)), count)
    return parts, np.array([np.median(values[part]) for part in parts])


def _at(wanted: np.ndarray, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at the wanted steps, between the known ones; nan where nothing is known."""
    known = np.isfinite(values)
    return (
        np.interp(wanted, steps[known], values[known])
        if known.any()
        else np.full(len(wanted), np.nan)
    )


def _longest_stretch(flags: np.ndarray) -> tuple[int, int]:
    """[begin, end) of the longest run of true values; (0, 0) where there is none."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8)))
    pairs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return max(pairs, key=lambda pair: pair[1] - pair[0], default=(0, 0))
