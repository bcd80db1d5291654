"""How fast hellaswag.py scores, and whether it scores what the loop that people use scores.

plain loop  one example at a time: four padded rows, all logits, F.cross_entropy; autocast in 16
bits
evaluate    of hellaswag.py: a context once for its four endings, logits of endings only, batches by
tokens

    $ python benchmarks/hellaswag_eval.py
    random GPT, 124.4M parameters, 64 of 10,042 examples, cpu, 2 threads
    bfloat16  plain loop 5.4 examples/s, evaluate 14.6 (2.70 times)
              128 of 128 picks equal, largest difference 2.9e-02 of a summed loss, 1.2e-03 per token
    float32   ...

They take turns, on the same examples, so that whatever else the machine does hits both; ratios are
medians over the turns. In float32 losses must agree within 1e-4, and picks too unless the best two
endings are closer than that; exit status 1 if not. All examples, compared with a model that was
trained:

    $ python benchmarks/hellaswag_eval.py --examples 0 --checkpoint checkpoints/best_val_loss.pt

and two ranks of one thread, compared with one process of two threads:

    $ python benchmarks/hellaswag_eval.py --ranks
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hellaswag import Example, Result, ensure_data, evaluate, load_examples
from model import GPT, GPTConfig, load_checkpoint
from pretrain.distributed import pick_device, synchronize
from pretrain.eval.hellaswag import DataUnavailable
from pretrain.tokens.tokenizer import load_encoding

TOLERANCE = 1e-4  # nats, in float32


@dataclass
class Case:
    """What is measured: picklable."""

    examples: Sequence[Example]
    checkpoint: Path | None
    device: torch.device
    dtype: torch.dtype
    rounds: int
    compile: bool

    def model(self) -> GPT:
        torch.manual_seed(0)
        model = load_checkpoint(self.checkpoint)[0] if self.checkpoint else GPT(GPTConfig()).eval()
        return model.to(self.device)

    def seconds(self, function: Callable) -> float:
        synchronize(self.device)
        t0 = time.perf_counter()
        function()
        synchronize(self.device)
        return time.perf_counter() - t0


@torch.no_grad()
def plain_loop(
    model: GPT, examples: Sequence[Example], case: Case
) -> tuple[np.ndarray, np.ndarray]:
    """Losses, summed and per token, float64 (n, 4)."""
    encoding, device, dtype = load_encoding(), case.device, case.dtype
    sums, means = [], []
    for example in examples:
        context = encoding.encode_ordinary(example.ctx)
        endings = [encoding.encode_ordinary(" " + ending) for ending in example.endings]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)
        mask = torch.zeros(tokens.shape)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, _ = model(tokens)
            losses = F.cross_entropy(
                logits[:, :-1].reshape(-1, logits.size(-1)),
                tokens[:, 1:].reshape(-1),
                reduction="none",
            )
        losses = (losses.view(4, -1) * mask[:, 1:]).cpu().double().sum(dim=1).numpy()
        sums.append(losses)
        means.append(losses / [len(ending) for ending in endings])
    return np.array(sums), np.array(means)


def compare(case: Case, model: GPT, compiled: GPT | None) -> bool:
    """Print the block of one dtype. Whether the losses agree, where they must."""
    examples, plain, results = case.examples, [], []
    models = {"evaluate": model} | ({"compiled": compiled} if compiled else {})
    rates: dict[str, list[float]] = {name: [] for name in ("plain loop", *models)}
    size = -(-len(examples) // case.rounds)
    for first in range(0, len(examples), size):
        part = examples[first : first + size]
        dt = case.seconds(lambda part=part: plain.append(plain_loop(model, part, case)))
        rates["plain loop"].append(len(part) / dt)
        for name, candidate in models.items():
            dt = case.seconds(
                lambda m=candidate: results.append(evaluate(m, examples, dtype=case.dtype))
            )
            rates[name].append(len(examples) / dt)
    baseline = rates["plain loop"]
    name = str(case.dtype).removeprefix("torch.")
    line = f"{name:9} plain loop {statistics.median(baseline):.1f} examples/s"
    for name in models:
        times = statistics.median(a / b for a, b in zip(rates[name], baseline, strict=True))
        line += f", {name} {statistics.median(rates[name]):.1f} ({times:.2f} times)"
    print(line, flush=True)
    sums, means = map(np.concatenate, zip(*plain, strict=True))
    agreed = [agree(result, sums, means, case.dtype) for result in results[: len(models)]]
    return all(agreed)


def agree(result: Result, sums: np.ndarray, means: np.ndarray, dtype: torch.dtype) -> bool:
    """Print how far the losses of evaluate and plain loop agree. Whether they do as they must."""
    same = ties = 0
    for picks, plain in ((result.picks, sums), (result.picks_norm, means)):
        equal = picks == plain.argmin(axis=1)
        best, second = np.sort(plain, axis=1)[:, :2].T
        same += equal.sum()
        ties += (~equal & (second - best < TOLERANCE)).sum()
    total, per_token = (
        np.abs(a - b).max() for a, b in ((result.losses, sums), (result.losses_norm, means))
    )
    excused = f" ({ties} of the others are ties)" if ties else ""
    print(
        f"          {same} of {2 * len(sums)} picks equal{excused}, largest difference {total:.1e}"
        f" of a summed loss, {per_token:.1e} per token",
        flush=True,
    )
    return dtype != torch.float32 or (
        max(total, per_token) < TOLERANCE and same + ties == 2 * len(sums)
    )


def compare_ranks(rank: int, folder: str, case: Case) -> None:
    """In each of two processes: both score with one thread, and the first alone with two, in
    turns."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = case.model()

    def timed(world_size: int) -> float:
        torch.set_num_threads(3 - world_size)
        dist.barrier()
        dt = 0.0
        if rank < world_size:
            ranks = {"rank": rank, "world_size": world_size}
            dt = case.seconds(lambda: evaluate(model, case.examples, dtype=case.dtype, **ranks))
        dist.barrier()
        return dt

    timed(2)
    times = statistics.median(timed(1) / timed(2) for _ in range(case.rounds))
    if rank == 0:
        name = str(case.dtype).removeprefix("torch.")
        print(
            f"{name:9} two ranks of one thread are {times:.2f} times as fast as one process of two"
            " threads"
        )
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    add = parser.add_argument
    add("--data", type=Path, help="file of examples (default: val, downloaded if need be)")
    add("--examples", type=int, default=64, help="a random choice of so many; 0: all (default: 64)")
    add("--checkpoint", type=Path, help="model to score (default: 124M parameters, random)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of these there is)")
    add("--threads", type=int, default=2, help="on a CPU (default: 2)")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"],
        choices=["bfloat16", "float16", "float32"])
    add("--rounds", type=int, default=4, help="turns of each (default: 4)")
    add("--compile", action="store_true", help="also measure evaluate with compiled blocks")
    add("--ranks", action="store_true", help="only compare two ranks with one process, on a CPU")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        data = args.data or ensure_data(progress=True)
    except DataUnavailable as error:
        print(f"{error}; or name a copy of it with --data", file=sys.stderr)
        return 1
    examples, total = load_examples(data, args.examples), len(load_examples(data))
    device = torch.device("cpu") if args.ranks else pick_device(args.device)
    cases = [
        Case(examples, args.checkpoint, device, getattr(torch, dtype), args.rounds, args.compile)
        for dtype in args.dtypes
    ]
    model = cases[0].model()
    print(
        f"{args.checkpoint or 'random GPT'}, {model.num_parameters() / 1e6:.1f}M parameters,"
        f" {len(examples):,} of {total:,} examples, {device}"
        + f", {args.threads} threads"
        * (device.type == "cpu"),
        flush=True,
    )
    if args.ranks:
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(compare_ranks, (folder, case), nprocs=2)
        return 0
    torch.set_num_threads(args.threads)
    compiled = cases[0].model() if args.compile else None
    for block in compiled.transformer.h if compiled else ():
        block.compile(dynamic=True)
    agreed = []
    for case in cases:
        plain_loop(model, examples[:2], case)
        for candidate in filter(None, (model, compiled)):
            for few in (examples[:8], examples[:1]):  # compilation tells one row from many
                evaluate(candidate, few, dtype=case.dtype)
        agreed.append(compare(case, model, compiled))
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
