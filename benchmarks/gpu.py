"""One command on a machine with a GPU: does everything compute what it should, and how fast?

    $ python benchmarks/gpu.py --pack gpu-data              # where everything is installed
    $ python benchmarks/gpu.py --data gpu-data --out_dir gpu-results      # on the GPU machine
    check      resume                          weights after 8 updates ...: 0.0e+00 apart
    124M       train_gpt2.py                   ... tokens/s  ... x plain  MFU ... %  ... GB
    ...
    gpu-results/gpu.md, gpu-results/gpu.json

The second one needs torch (2.11 or later), numpy and tiktoken, this repository and the folder that
the first one made, of a few megabytes; no network. It takes --minutes at most (8.5), writes what it
has after each measurement, and begins with what tells most: checks; an update of 64 x 1024 tokens
with the 124M and 350M models, as nanoGPT's loop makes it and as train_gpt2.py does, without and
with its switches; the loader; saving. What the machine lacks is skipped by name, what fails is
named too, and then it goes on; exit status 1 if anything failed.

On a CPU everything runs in small, to see that it works: the numbers mean nothing there.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere
from benchmarks.gpu_parts.tables import table  # noqa: E402
from benchmarks.gpu_parts.worker import Gone, Here, Process, Session, serve  # noqa: E402

WORKER_BYTES = 24e9  # of GPU memory that a variant is given when several are held at a time
CHECK_SECONDS = 100  # for one of them: two compile
ESTIMATES = {"loader": 15, "save": 20, "whole run": 90, "evaluation": 35, "several GPUs": 120}
PLAN = [
    ("checks", ""),
    ("group", "124M"),
    ("task", "loader"),
    ("task", "save"),
    ("group", "350M"),
    ("group", "modern"),
    ("group", "one switch"),
    ("task", "whole run"),
    ("task", "evaluation"),
    ("task", "several GPUs"),
    ("group", "not compiled"),
    ("group", "max-autotune"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="auto", help="cuda, cuda:N or cpu (a GPU where there is one)")
    add("--small", action="store_true", help="tiny models, to see that it works (on without a GPU)")
    add("--out_dir", type=Path, default=Path("gpu-results"), metavar="DIR", help="for the results")
    add("--data", type=Path, default=Path("gpu-data"), metavar="DIR", help="what --pack made")
    add("--pack", type=Path, metavar="DIR", help="make the folder for --data, and nothing else")
    add("--shards", type=Path, metavar="DIR", help="with --pack: take tokens of these shards")
    add("--minutes", type=float, default=8.5, help="at most (%(default)s)")
    add("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.pack:
        from benchmarks.gpu_parts.pack import make_pack

        make_pack(args.pack, args.shards)
        return 0
    place = find_place(args)
    if args.work:
        return serve(place, args.out_dir)
    return Measurement(place, args).run()


def find_place(args: argparse.Namespace) -> Any:
    """Device, data and size of it all. Without a folder of data one is made, where that works."""
    from benchmarks.gpu_parts.pack import make_pack, open_pack
    from benchmarks.gpu_parts.variants import Place
    from pretrain.distributed import pick_device
    from pretrain.train import loader

    device = pick_device(args.device)
    small = args.small or device.type != "cuda"
    if small:
        loader.READ_AHEAD_TOKENS = 2**10  # a million would be thousands of such batches
    if not (args.data / "pack.json").is_file():
        args.data = args.out_dir / "data"
        if not (args.data / "pack.json").is_file():
            make_pack(args.data, None, train_tokens=20_000 if small else 8_000_000)
    return Place(device, open_pack(args.data), small)


class Measurement:
    """Goes through PLAN while there is time and keeps what comes of it."""

    def __init__(self, place: Any, args: argparse.Namespace):
        self.place, self.out_dir, self.data = place, args.out_dir, args.data
        self.began, self.seconds = time.monotonic(), 60 * args.minutes
        self.results: dict[str, Any] = {"small": place.small, "seconds": 0.0, "machine": {}}
        self.results |= {name: [] for name in ("checks", "speed", "others", "skipped", "failed")}
        self.plain: dict[str, float] = {}  # tokens a second of the plain loop, by size
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        self.one("machine", "")
        for kind, name in PLAN:
            getattr(self, kind)(name)
            self.write()
        self.say("done", f"{self.out_dir / 'gpu.md'}, {self.out_dir / 'gpu.json'}", "")
        return 1 if self.results["failed"] else 0

    # ---- time and results

    @property
    def left(self) -> float:
        """Seconds until all has to be written."""
        return self.seconds - (time.monotonic() - self.began) - 3

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; says where not. In small nothing takes long."""
        is_there = self.left > (0 if self.place.small else seconds)
        if not is_there:
            self.lack(
                "skipped", what, f"no time left ({self.left:.0f} s, it may take {seconds:.0f})"
            )
        return is_there

    def lack(self, how: str, what: str, why: str) -> None:
        self.results[how].append({"name": what, "why": why})
        self.say(how, what, why)

    def say(self, kind: str, name: str, text: str) -> None:
        seconds = time.monotonic() - self.began
        print(f"{seconds:5.0f} s  {kind:10} {name:32} {text}", flush=True)

    def write(self) -> None:
        """All that is known so far: whoever ends this loses nothing."""
        from pretrain import files

        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        files.write_json(self.out_dir / "gpu.json", self.results)
        files.write_text(self.out_dir / "gpu.md", table(self.results))

    def worker(self) -> Any:
        if self.place.small and self.place.device.type == "cpu":
            return Here(Session(self.place, self.out_dir), self.out_dir / "workers.log")
        words = [sys.executable, str(Path(__file__).resolve()), "--work", "--device"]
        words += [str(self.place.device), "--data", str(self.data), "--out_dir", str(self.out_dir)]
        words += ["--small"] * self.place.small
        return Process(words, self.out_dir / "workers.log")

    def outcome(self, what: str, worker: Any, seconds: float) -> Any:
        """The worker's next answer where it went well; else it is noted, and None."""
        try:
            answer = worker.hear(min(seconds, max(1.0, self.left)))
        except Gone as error:
            answer = {"failed": str(error)}
        if "ok" in answer:
            return answer["ok"]
        self.lack(*next((how, what, why) for how, why in answer.items()))
        return None

    # ---- what PLAN names

    def checks(self, _: str) -> None:
        """Every check; where one takes its process along, the next gets a new one."""
        from benchmarks.gpu_parts.checks import CHECKS

        worker = self.worker()
        for name in CHECKS:
            if not self.has_time(f"check: {name}", 20):
                continue
            before = len(self.results["failed"]), len(self.results["skipped"])
            worker.tell({"do": "check", "name": name})
            detail = self.outcome(f"check: {name}", worker, CHECK_SECONDS)
            result = {"name": name, "outcome": "ok", "detail": detail}
            if detail is None:
                is_failed = len(self.results["failed"]) > before[0]
                noted = self.results["failed" if is_failed else "skipped"][-1]
                result |= {"outcome": "FAILED" if is_failed else "skipped", "detail": noted["why"]}
                if is_failed:
                    worker.close()
                    worker = self.worker()
            else:
                self.say("check", name, detail)
            self.results["checks"].append(result)
            self.write()
        worker.close()

    def task(self, name: str) -> None:
        if self.has_time(name, ESTIMATES[name]):
            self.one(name, "besides")

    def one(self, name: str, kind: str) -> None:
        worker = self.worker()
        worker.tell({"do": "task", "name": name})
        found = self.outcome(name, worker, 3 * ESTIMATES.get(name, 60))
        worker.close()
        if found is None:
            return
        if kind:
            self.results["others"].append({"name": name} | found)
        else:
            self.results["machine"] = found
        self.say(kind or "machine", name, ", ".join(f"{k} {v}" for k, v in found.items()))

    def group(self, name: str) -> None:
        """The variants of a group, as many at a time as the memory holds. What fails beside others
        is tried once more alone: together they may have been too large."""
        from benchmarks.gpu_parts.variants import GROUPS, in_small

        seconds, variants = GROUPS[name]
        if self.place.small:
            variants = [in_small(variant) for variant in variants]
        memory = self.results["machine"].get("memory_bytes", WORKER_BYTES)
        again = []
        for part in batched(variants, max(1, int(memory / WORKER_BYTES))):
            if self.has_time(", ".join(f"{v.size} {v.name}" for v in part), seconds):
                again += self.together(part, 3 * seconds)
        for variant in again:
            if self.has_time(f"{variant.size} {variant.name}", seconds / 2):
                self.together([variant], 3 * seconds)

    def together(self, variants: list[Any], most: float) -> list[Any]:
        """Build these variants at the same time, let them take turns, note how fast each was.
        most: seconds that building may take. Returns those that ought to be tried alone."""
        workers = [(variant, self.worker()) for variant in variants]
        noted, again, ready = len(self.results["failed"]), [], []
        for variant, worker in workers:
            # The first compiles, and allocates; the second may compile anew.
            warm_up = 1 if self.place.small else 4
            worker.tell({"do": "build", "variant": asdict(variant), "warm_up": warm_up})
        for variant, worker in workers:
            about = self.outcome(f"{variant.size} {variant.name}", worker, most)
            if about:
                ready.append((variant, worker, about))
            elif len(variants) > 1 and len(self.results["failed"]) > noted:
                self.results["failed"].pop()
                again.append(variant)
        turns: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(ready))}
        for _ in range(1 if self.place.small else 12):
            for i, (variant, worker, _about) in enumerate(ready):
                if i not in turns:
                    continue  # it has failed
                worker.tell({"do": "step", "count": 1})
                if found := self.outcome(f"{variant.size} {variant.name}", worker, 60):
                    turns[i].append(found)
                else:
                    del turns[i]
        for i, (variant, _worker, about) in enumerate(ready):
            if turns.get(i):
                self.note(variant, about, turns[i])
        for _variant, worker in workers:
            worker.close()
        self.write()
        return again

    def note(self, variant: Any, about: dict[str, Any], turns: list[dict[str, Any]]) -> None:
        import torch

        from pretrain.hardware import peak_flops

        seconds = statistics.median(itertools.chain(*(turn["seconds"] for turn in turns)))
        speed = about["tokens"] / seconds
        if variant.name == "plain loop":
            self.plain[variant.size] = speed
        plain = self.plain.get(variant.size)
        peak = peak_flops(self.results["machine"].get("device", ""), torch.bfloat16)
        found = asdict(variant) | {
            "tokens_per_second": speed,
            "milliseconds": 1000 * seconds,
            "to_plain": speed / plain if plain else None,
            "mfu": speed * about["flops_per_token"] / peak if peak else None,
            "memory_bytes": max(turn["memory"] for turn in turns),
            "first_seconds": about["first_seconds"],
            "losses": [about["first_loss"], turns[-1]["loss"]],
            "parameters": about["parameters"],
        }
        self.results["speed"].append(found)
        mfu = f"MFU {found['mfu']:.1%}" if peak else ""
        ratio = f"{found['to_plain']:.2f} x plain" if plain else ""
        memory = f"{found['memory_bytes'] / 1e9:.1f} GB"
        self.say(variant.size, variant.name, f"{speed:,.0f} tokens/s  {ratio}  {mfu}  {memory}")


def batched(things: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
