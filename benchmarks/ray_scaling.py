"""How `--engine ray` scales from one worker to two, beside the engine of one machine.

    $ python benchmarks/ray_scaling.py
    ray, 1 worker    12.3 s, of which 4.5 s before the first unit ...

Whole processes of fineweb.py on the same text, in turns, so that other work on the machine falls on
all of them. Start-up, told apart, is the time of the same command on a text of one line: it is
paid once, however much there is to do. Aims: two workers at least 1.7 times as fast as one, and at
least 0.85 of the local engine with two processes, start-up left out. Needs requirements-ray.txt.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from data_prep import ROOT, make_corpus

KINDS = {
    "ray, 1 worker": ["--engine", "ray", "--num_proc", "1"],
    "ray, 2 workers": ["--engine", "ray", "--num_proc", "2"],
    "local, 2 processes": ["--num_proc", "2"],
}
MIN_SPEEDUP, MIN_SHARE = 1.7, 0.85
SHARD_TOKENS = "5000000"  # so that there is packing to do side by side, too


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200, help="of text at most (200)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("ray") is None:
        print("Ray is not installed: pip install -r requirements-ray.txt", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        corpus, line = Path(scratch, "corpus.parquet"), Path(scratch, "line.txt")
        documents, size = make_corpus(corpus, args.megabytes)
        line.write_text("One line, so that all of it is start-up, and another.\n")
        print(f"{documents:,} documents, {size / 1e6:.0f} MB of text", flush=True)
        rounds = []
        for number in range(args.repeats):
            rounds.append({kind: measure(flags, corpus, line) for kind, flags in KINDS.items()})
            print(f"round {number + 1}: {rounds[-1]}", flush=True)
    for kind in KINDS:
        starts, works = zip(*(each[kind] for each in rounds), strict=True)
        print(
            f"{kind:18s} {statistics.median(starts):6.2f} s of start-up,"
            f" {statistics.median(works):6.2f} s of work"
        )
    one, two, local = ([each[kind][1] for each in rounds] for kind in KINDS)
    speedup = statistics.median(a / b for a, b in zip(one, two, strict=True))
    share = statistics.median(a / b for a, b in zip(local, two, strict=True))
    print(f"two workers: {speedup:.2f} times one (aim: {MIN_SPEEDUP}),", end=" ")
    print(f"{share:.2f} of the local engine (aim: {MIN_SHARE})")
    return 0 if speedup >= MIN_SPEEDUP and share >= MIN_SHARE else 1


def measure(flags: list[str], corpus: Path, line: Path) -> tuple[float, float]:
    """Seconds of start-up, and of the work on the corpus without it."""
    start = seconds(flags, line)
    return round(start, 2), round(seconds(flags, corpus) - start, 2)


def seconds(flags: list[str], source: Path) -> float:
    """How long a build takes, all of it."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, str(ROOT / "fineweb.py"), "--source", str(source), *flags]
        command += ["--out_dir", folder, "--shard_size", SHARD_TOKENS]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        t0 = time.perf_counter()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - t0


if __name__ == "__main__":
    sys.exit(main())
