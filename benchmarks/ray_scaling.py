"""How `--engine ray` scales from one worker to two, beside the engine of one machine.

    $ python benchmarks/ray_scaling.py
    ray, 1 worker          ... s of start-up,    ... s of work

Whole processes of fineweb.py on the same text, in turns, so that other work on the machine falls on
all of them. Start-up, told apart, is the time of the same command on files of one line, enough of
them for every worker to start: it is paid once, however much there is to do. Ray's builds end with
a verification of all shards, the local engine's with one where `--verify` is run afterwards. Aims:
two workers at least 1.7 times as fast as one, and at least 0.85 of the local engine with two
processes, start-up left out. Needs requirements-ray.txt.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from data_prep import ROOT, make_corpus

VERIFY = "--verify"
KINDS = {
    "ray, 1 worker": ["--engine", "ray", "--num_proc", "1"],
    "ray, 2 workers": ["--engine", "ray", "--num_proc", "2"],
    "local, 2 processes": ["--num_proc", "2"],
    "the same, --verify": ["--num_proc", "2", VERIFY],
}
MIN_SPEEDUP, MIN_SHARE = 1.7, 0.85
SHARD_TOKENS = "20000000"  # so that there is packing to do side by side, too
LINES = 8  # files of a line each


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=300, help="of text in a file (300)")
    parser.add_argument("--files", type=int, default=6, help="copies of that file (6)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("ray") is None:
        print("Ray is not installed: pip install -r requirements-ray.txt", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        corpus, lines = Path(scratch, "corpus"), Path(scratch, "lines")
        corpus.mkdir()
        lines.mkdir()
        documents, size = make_corpus(corpus / "0.parquet", args.megabytes)
        for number in range(1, args.files):
            shutil.copy(corpus / "0.parquet", corpus / f"{number}.parquet")
        for number in range(LINES):
            (lines / f"{number}.txt").write_text("A line, so that all of it is start-up.\n")
        documents, size = documents * args.files, size * args.files
        print(f"{documents:,} documents, {size / 1e6:.0f} MB of text", flush=True)
        rounds = []
        for number in range(args.repeats):
            rounds.append({kind: measure(flags, corpus, lines) for kind, flags in KINDS.items()})
            print(f"round {number + 1}: {rounds[-1]}", flush=True)
    for kind in KINDS:
        starts, works = zip(*(each[kind] for each in rounds), strict=True)
        print(
            f"{kind:18s} {statistics.median(starts):6.2f} s of start-up,"
            f" {statistics.median(works):6.2f} s of work"
        )
    one, two, local, verified = ([each[kind][1] for each in rounds] for kind in KINDS)
    speedup, share, share_verified = (
        statistics.median(a / b for a, b in zip(others, two, strict=True))
        for others in (one, local, verified)
    )
    print(f"two workers: {speedup:.2f} times one (aim: {MIN_SPEEDUP}), {share:.2f} of the local")
    print(f"engine, {share_verified:.2f} of it with --verify (aim: {MIN_SHARE})")
    return 0


def measure(flags: list[str], corpus: Path, lines: Path) -> tuple[float, float]:
    """Seconds of start-up, and of the work on the corpus without it."""
    start = seconds(flags, lines)
    return round(start, 2), round(seconds(flags, corpus) - start, 2)


def seconds(flags: list[str], source: Path) -> float:
    """How long a build takes, all of it."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        program = [sys.executable, str(ROOT / "fineweb.py"), "--out_dir", folder]
        build = [flag for flag in flags if flag != VERIFY]
        commands = [[*program, "--source", str(source), "--shard_size", SHARD_TOKENS, *build]]
        if VERIFY in flags:
            commands.append([*program, VERIFY])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        t0 = time.perf_counter()
        for command in commands:
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - t0


if __name__ == "__main__":
    sys.exit(main())
