"""Processes that are begun as forks are what subprocess would have begun."""

import os
import signal
import subprocess
import sys

import forked
import pytest

TELL = (
    "import os, sys\n"
    "name = sys.stdin.read()\n"
    "print(os.getppid(), os.getcwd(), sys.argv[1:], os.environ.get('MARK'), name)\n"
    "print('warned', file=sys.stderr)\n"
    "sys.exit(7)\n"
)


def test_a_fork_and_a_new_interpreter_tell_the_same(tmp_path):
    options = {"cwd": tmp_path, "env": {**os.environ, "MARK": "here"}, "input": "someone"}
    options |= {"capture_output": True, "text": True}
    command = [sys.executable, "-c", TELL, "a", "b c"]
    mine = forked.run(command, **options)
    theirs = subprocess.run(command, check=False, **options)
    assert mine.returncode == theirs.returncode == 7
    assert mine.stdout == theirs.stdout and str(os.getpid()) in mine.stdout
    assert mine.stderr == theirs.stderr == "warned\n"


@pytest.mark.parametrize(
    "last", ["sys.exit(7)", "sys.exit('a message')", "sys.exit()", "raise KeyError('odd')", ""]
)
def test_a_fork_ends_as_an_interpreter_ends(last):
    """After its threads and what it registered, with what it printed and its status."""
    code = (
        "import atexit, sys, threading, time\n"
        "atexit.register(lambda: print('at the end', flush=False))\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('a thread'))).start()\n"
        f"{last}\n"
    )
    command = [sys.executable, "-c", code]
    mine = forked.run(command, capture_output=True, text=True)
    theirs = subprocess.run(command, capture_output=True, text=True, check=False)
    assert mine.returncode == theirs.returncode
    assert mine.stdout == theirs.stdout == "a thread\nat the end\n"
    assert mine.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


@pytest.mark.parametrize("kind", ["a script", "a module"])
def test_scripts_and_modules_find_what_lies_beside_them(kind, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 5\n")
    (tmp_path / "program.py").write_text(
        "import beside, sys\nprint(beside.VALUE, __name__, sys.argv[1:], 'torch' in sys.modules)\n"
    )
    words = ["-m", "program"] if kind == "a module" else ["program.py"]
    done = forked.run([sys.executable, *words, "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "5 __main__ ['x'] True\n", "torch shows that it was a fork"


def test_signals_end_a_fork_and_an_error_is_its_traceback():
    wait = "import time; print('ready', flush=True); time.sleep(60)"
    with forked.Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n" and process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    done = forked.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
