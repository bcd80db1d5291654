"""How many tokens, and how much time, the fast recipe needs for the loss of the classic one.

    $ python benchmarks/recipe.py --data my_texts/        # 4 x 256, 240 updates: hours on a CPU
    $ python benchmarks/recipe.py --data my_texts/ --small --steps 120 --seeds 1
    $ python benchmarks/recipe.py --data_dir data/fineweb

Classic: model.GPT with AdamW, warmup and cosine, at the best of three learning rates for the first
seed, which the other seeds then use. Modern: pretrain/models/modern.py with Muon and the trapezoid,
the settings of configs/modern-small.yaml as they are, in runs of a sixth, a quarter and a third of
the updates; a run's schedule ends with it, so each is a run of its own. Both see the same windows
in the same order and are evaluated on the same ones. Between two lengths of modern runs the loss is
interpolated over the logarithm of tokens.

Speed is measured apart: updates of both in turn, so that whatever slows the machine slows both; the
ratio is the median over pairs. Time to equal loss is then the ratio of tokens times that of speed.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

import torch  # noqa: E402
from torch import nn  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from pretrain import distributed  # noqa: E402
from pretrain.eval import validation  # noqa: E402
from pretrain.flags import COUNT, SEED  # noqa: E402
from pretrain.models.modern import MUON_RATE, Modern, ModernConfig  # noqa: E402
from pretrain.tokens.owntext import prepare  # noqa: E402
from pretrain.tokens.shards import find_shards  # noqa: E402
from pretrain.train.loader import ShardLoader, TokenWindows  # noqa: E402
from pretrain.train.optim import SCHEDULES, make_optimizer  # noqa: E402

BATCH, BLOCK = 16, 128  # 2,048 tokens an update; half the sequences with --small
SIZES = {"n_layer": 4, "n_embd": 256, "block_size": BLOCK}
SMALL = {"n_layer": 2, "n_embd": 128, "block_size": BLOCK}
CLASSIC_RATES = (6e-4, 1.5e-3, 4e-3)  # GPT-3's for 124M, and what small models take
MODERN_SHARES = (1 / 6, 1 / 4, 1 / 3)  # of the classic run's updates
DECAY_SHARE = 0.7
VAL_WINDOWS = 200  # of 128 tokens: 25,600
PAIRS = 15


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", nargs="+", metavar="PATH", help="documents, as for train_gpt2.py")
    where.add_argument("--data_dir", metavar="DIR", help="shards")
    parser.add_argument("--steps", type=COUNT, default=240, help="of the classic run (%(default)s)")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[1, 2, 3])
    parser.add_argument("--small", action="store_true", help="2 x 128, 1,024 tokens an update")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(args.data_dir) if args.data_dir else prepare(args.data, Path(folder))
        trainer = Trainer(data_dir, SMALL if args.small else SIZES, BATCH // (1 + args.small))
        trainer.use(distributed.Ranks.start(args.device))
        compare(trainer, args.steps, args.seeds)
    return 0


class Trainer:
    """Models of one size on one set of shards."""

    def __init__(self, data_dir: Path, sizes: dict[str, int], batch_size: int):
        self.data_dir, self.sizes, self.batch_size = data_dir, sizes, batch_size

    def use(self, ranks: distributed.Ranks) -> None:
        self.ranks = ranks
        dtype = distributed.pick_dtype("auto", ranks.device)
        self.autocast = torch.autocast(
            ranks.device.type, dtype=dtype, enabled=dtype != torch.float32
        )
        windows = TokenWindows(find_shards(self.data_dir, "val"), block_size=BLOCK)
        self.val = {"val": (windows, validation.first(windows, VAL_WINDOWS))}

    def make(self, kind: str, seed: int, rate: float) -> tuple[nn.Module, Any]:
        """A new model and its optimizer; rate: AdamW's for "classic", Muon's for "modern"."""
        torch.manual_seed(seed)
        sizes: dict[str, Any] = dict(self.sizes)
        how: dict[str, Any]
        if kind == "classic":
            model: nn.Module = GPT(GPTConfig(n_head=sizes["n_embd"] // 64, **sizes))
            how = {"name": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.95)}
        else:
            model = Modern(ModernConfig(n_head=sizes["n_embd"] // 128, **sizes))
            how = {"name": "muon", "weight_decay": 0.05, "betas": (0.8, 0.95)}
        model = model.to(self.ranks.device).train()
        return model, make_optimizer(model, learning_rate=rate, **how)

    def update(self, kind: str, model: nn.Module, optimizer: Any, rate: float, batch: Any) -> float:
        """One update with the learning rate `rate`; seconds."""
        distributed.synchronize(self.ranks.device)
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        x, y = (part[0].to(self.ranks.device) for part in batch)
        with self.autocast:
            loss = model(x, y)[1]
        loss.backward()
        if kind == "classic":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        distributed.synchronize(self.ranks.device)
        return time.perf_counter() - start

    def batches(self, seed: int) -> ShardLoader:
        shards = find_shards(self.data_dir, "train")
        return ShardLoader(shards, batch_size=self.batch_size, block_size=BLOCK, seed=seed)

    def train(self, kind: str, seed: int, steps: int, max_rate: float) -> float:
        """The validation loss, nats per token, after a run of so many updates."""
        model, optimizer = self.make(kind, seed, max_rate)
        loader = self.batches(seed)
        for step in range(steps):
            rate = rate_at(kind, step, steps, max_rate)
            self.update(kind, model, optimizer, rate, loader.batch(step))
        scores = validation.evaluate(
            model, self.val, batch_size=self.batch_size, ranks=self.ranks, autocast=self.autocast
        )
        return scores["val"]["loss"]

    def speed(self) -> tuple[float, list[float]]:
        """Seconds of a classic update, and how many times as long the modern one beside it took."""
        rates = {"classic": CLASSIC_RATES[0], "modern": MUON_RATE}
        made = {kind: self.make(kind, 0, rate) for kind, rate in rates.items()}
        loader = self.batches(0)
        seconds = []
        for step in range(PAIRS + 2):  # the first two allocate memory
            batch = loader.batch(step)
            seconds.append([self.update(kind, *made[kind], rates[kind], batch) for kind in rates])
        return (
            statistics.median(classic for classic, _ in seconds[2:]),
            [modern / classic for classic, modern in seconds[2:]],
        )


def rate_at(kind: str, step: int, steps: int, max_rate: float) -> float:
    if kind == "modern":
        return SCHEDULES["trapezoid"](
            step,
            max_lr=max_rate,
            min_lr=0.0,
            warmup_iters=0,
            lr_decay_iters=steps,
            decay_share=DECAY_SHARE,
        )
    return SCHEDULES["cosine"](
        step,
        max_lr=max_rate,
        min_lr=max_rate / 10,
        warmup_iters=steps // 20,
        lr_decay_iters=steps,
    )


def compare(trainer: Trainer, steps: int, seeds: list[int]) -> None:
    tokens = trainer.batch_size * BLOCK
    sizes = trainer.sizes
    print(
        f"{sizes['n_layer']} x {sizes['n_embd']}, {tokens:,} tokens an update,"
        f" {trainer.val['val'][1].size * BLOCK:,} tokens evaluated,"
        f" {distributed.device_name(trainer.ranks.device)}, {torch.get_num_threads()} threads",
        flush=True,
    )
    saved, rates = [], list(CLASSIC_RATES)
    for seed in seeds:
        line = printer(f"seed {seed}")
        found = {
            rate: line(
                f"classic {steps} updates at {rate:g}", trainer.train("classic", seed, steps, rate)
            )
            for rate in rates
        }
        rates = [min(found, key=lambda rate: found[rate])]
        classic = found[rates[0]]
        modern = {
            n: line(f"modern {n} updates", trainer.train("modern", seed, n, MUON_RATE))
            for n in (round(share * steps) for share in MODERN_SHARES)
        }
        needed = updates_for(classic, modern)
        saved.append(steps / needed)
        print(
            f"seed {seed}: {classic:.4f} after {steps * tokens:,} tokens of the classic, after "
            f"{needed * tokens:,.0f} of the modern: {steps / needed:.1f} x fewer",
            flush=True,
        )
    seconds, ratios = trainer.speed()
    ratio = statistics.median(ratios)
    print(
        f"an update: {1000 * seconds:,.0f} ms classic, modern {ratio:.2f} x as long"
        f" ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)\n"
        f"equal validation loss: {min(saved):.1f} to {max(saved):.1f} x fewer tokens,"
        f" {min(saved) / ratio:.1f} to {max(saved) / ratio:.1f} x less time"
    )


def printer(head: str) -> Callable[[str, float], float]:
    def line(what: str, loss: float) -> float:
        print(f"  {head}: {what}: {loss:.4f}", flush=True)
        return loss

    return line


def updates_for(loss: float, found: dict[int, float]) -> float:
    """Updates after which a run would have this loss, between the lengths that were tried; the
    shortest of them when it already has it, infinity when the longest has not."""
    lengths = sorted(found)
    if found[lengths[0]] <= loss:
        return lengths[0]
    for a, b in pairwise(lengths):
        if found[b] <= loss:
            share = (found[a] - loss) / (found[a] - found[b])
            return math.exp(math.log(a) + share * math.log(b / a))
    return math.inf


if __name__ == "__main__":
    sys.exit(main())
