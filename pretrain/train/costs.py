"""How fast a run is and what it costs, as its "train" records say.

meter = Meter(price_per_hour=24.0, ranks=ranks, log=out_dir / "metrics.jsonl")
log.write("train", ..., **throughput(model, setup, steps, seconds, ranks), **meter.values())
"""

import math
import time
from pathlib import Path
from typing import Any

from pretrain import distributed
from pretrain.distributed import Ranks
from pretrain.hardware import energy_joules
from pretrain.report.runlog import read_log
from pretrain.report.schema import number

SPENT = ("dollars", "kilowatt_hours")


def throughput(
    model: Any, setup: dict[str, Any], steps: int, seconds: float, ranks: Ranks
) -> dict[str, Any]:
    """Of `steps` updates made in so many seconds. setup: the run's "start" record."""
    speed = steps * setup["tokens_per_step"] / seconds  # tokens per second
    flops_per_token = model.flops_per_token(setup["run"]["block_size"])
    flops, peak = speed * flops_per_token / ranks.world_size, setup["peak_flops"]
    return {
        "tokens_per_second": speed,
        "milliseconds_per_step": 1000 * seconds / steps,
        "mfu": flops / peak if peak else None,
        "memory_bytes": distributed.peak_memory(ranks.device),
    }


class Meter:
    """What a run has used since it began, all its processes and parts together: dollars by the
    clock, evaluations and saves included, and the GPUs' energy where NVML counts it.

    A part that is killed leaves out what it used after its last line in the log.
    """

    def __init__(self, price_per_hour: float, ranks: Ranks, log: Path):
        """price_per_hour: of the whole machine, in dollars; 0: not known. log: where an earlier
        part of the run has said what it used. Every rank makes one."""
        self.price, self.ranks = price_per_hour, ranks
        self._before = spent(log) if ranks.is_first else dict.fromkeys(SPENT, 0.0)
        self._began = time.monotonic()
        self._joules = self._counted()

    def values(self) -> dict[str, float]:
        """{"dollars": ..., "kilowatt_hours": ...} as far as they are known. Every rank calls it."""
        found = {}
        if self.price:
            hours = (time.monotonic() - self._began) / 3600
            found["dollars"] = self._before["dollars"] + hours * self.price
        used = self._counted() - self._joules
        if math.isfinite(used):
            found["kilowatt_hours"] = self._before["kilowatt_hours"] + used / 3.6e6
        return found

    def _counted(self) -> float:
        """Joules of all ranks' GPUs; nan where one does not tell."""
        if self.ranks.device.type != "cuda":
            return math.nan
        joules = energy_joules(self.ranks.device)
        return self.ranks.sum(math.nan if joules is None else joules)[0]


def spent(log: Path) -> dict[str, float]:
    """What the last line of a log that tells says was used, 0 where none does."""
    records = read_log(log) if log.exists() else []
    found = dict.fromkeys(SPENT, 0.0)
    for record in records:
        for name in SPENT:
            if math.isfinite(value := number(record.get(name))):
                found[name] = value
    return found
