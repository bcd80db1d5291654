"""What the three stages share: tokenizer, documents, shards, loader, optimizer, checkpoints, run
log."""

import os
import time

__version__ = "0.2.0"


def _is_busy() -> bool:
    """Whether others compute on this machine, more than a tenth of its cores' worth."""
    cores, seen = os.cpu_count() or 1, [0, 0]  # of 5 looks: quiet and busy ones
    try:
        while max(seen) < 3:  # 2 ms apart: what ran for a moment is not counted
            time.sleep(0.002 * any(seen))
            with open("/proc/loadavg") as file:
                running = int(file.read().split()[3].split("/")[0])
            seen[running - 1 >= max(1, cores // 10)] += 1  # without this one
    except (OSError, ValueError, IndexError):  # not Linux
        return hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2
    return seen[True] == 3


# OpenMP's threads spin while they wait for each other. On an idle machine that makes an update 1.6
# times as fast; where others compute, a spinning thread takes the time of the one that it waits
# for, and they sleep better. OpenMP reads this when torch is loaded, which is why it is set here,
# before it. What the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ and _is_busy():
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("KMP_BLOCKTIME", "0")
