"""What the three stages share: tokenizer, documents, shards, loader, optimizer, checkpoints, run
log."""

import os

__version__ = "0.2.0"

# Threads that wait for each other sleep instead of spinning: on a machine with other work a
# spinning thread takes the time of the one that it waits for. OpenMP reads these when torch is
# loaded, which is why they are set here, before it. What the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("KMP_BLOCKTIME", "0")
