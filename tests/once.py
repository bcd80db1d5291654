"""What takes seconds to make and is only read: made once for all workers of a run of the tests."""

import os
import shutil
from pathlib import Path

from filelock import FileLock


def folder(tmp_path_factory, name, make):
    """The folder `name` as make(folder) filled it: the first worker that asks makes it, others
    wait."""
    base = Path(tmp_path_factory.getbasetemp())
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(made, ignore_errors=True)  # half of one, where making it failed
            made.mkdir()
            make(made)
            done.touch()
    return made
