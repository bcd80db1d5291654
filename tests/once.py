"""What takes seconds to make and is only read: made once for all workers of a run of the tests."""

import fcntl
import os
import shutil
from pathlib import Path


def folder(tmp_path_factory, name, make):
    """The folder `name` as make(folder) filled it: the first worker that asks makes it, others
    wait."""
    base = Path(tmp_path_factory.getbasetemp())
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(made, ignore_errors=True)  # half of one, where making it failed
            made.mkdir()
            make(made)
            done.touch()
    return made
