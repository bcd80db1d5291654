"""Training speed and memory beside a plain loop, in one run.

    $ python benchmarks/train_step.py
    GPT-2 124M, batch 4 x 1024, bfloat16 on cpu
      plain loop               ... tokens/s ... GB
      train_gpt2.py            ... tokens/s ... GB   ... x the speed (... to ...), ... x the memory
      train_gpt2.py --compile  ...

The plain loop is what most scripts do: the same model under autocast, everything kept for the
backward pass, F.cross_entropy on all logits, default AdamW, gradient clipping, no compilation. Ours
is the update of train_gpt2.py: the model as it is with its loss, the optimizer of
pretrain.train.optim and, on a CPU, pretrain.distributed.keep_freed_memory. Each variant is a
process of its own; their steps alternate, so that whatever slows the machine slows all of them.
Ratios are medians over pairs of neighbouring steps. Memory is the process's peak (on a GPU: what
torch allocated). The number format is that of a run: bfloat16, or float32 on a processor without
it. On a GPU it also prints MFU, of the dense peak; --batch_size 32 or 64 fills a large one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

SIZES = {  # (model sizes, sequences in a batch)
    "124M": ({"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}, 4),
    "small": ({"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 256}, 16),
}
VARIANTS = {"plain": "plain loop", "ours": "train_gpt2.py", "compiled": "train_gpt2.py --compile"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--variant", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument(
        "--batch_size", type=int, help="sequences (default: 4 for 124M, 16 for small)"
    )
    parser.add_argument(
        "--steps", type=int, help="timed steps of each (default: 5 for 124M, 30 for small)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(*args.work, args.batch_size, args.device)
        return 0
    for size in args.size:
        steps = args.steps or (30 if size == "small" else 5)
        compare(size, args.variant, args.batch_size or SIZES[size][1], steps, args.device)
    return 0


def compare(size: str, variants: list[str], batch_size: int, steps: int, device: str) -> None:
    """Run the variants' steps in turn and print a line for each."""
    workers = {variant: start(size, variant, batch_size, device) for variant in variants}
    for worker in workers.values():  # two steps warm up: memory is allocated, code is compiled
        ask(worker, "step")
        ask(worker, "step")
    seconds = {variant: [] for variant in variants}
    for _ in range(steps):
        for variant, worker in workers.items():
            seconds[variant].append(ask(worker, "step")["seconds"])
    ends = {variant: ask(worker, "quit") for variant, worker in workers.items()}
    for worker in workers.values():
        worker.wait()
    block_size = SIZES[size][0]["block_size"]
    about = ends[variants[0]]
    print(
        f"{about['name']}, batch {batch_size} x {block_size}, {about['dtype']} on {about['device']}"
    )
    speeds = {v: batch_size * block_size / statistics.median(seconds[v]) for v in variants}
    for variant in variants:
        memory, speed = ends[variant]["peak_bytes"], speeds[variant]
        line = f"  {VARIANTS[variant]:24} {speed:9,.0f} tokens/s {memory / 1e9:7.2f} GB"
        if about["peak_flops"]:
            line += f"   MFU {speed * about['flops_per_token'] / about['peak_flops']:.1%}"
        if variant != "plain" and "plain" in variants:
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[variant], strict=True)]
            median, least, most = statistics.median(ratios), min(ratios), max(ratios)
            line += f"   {median:.2f} x the speed ({least:.2f} to {most:.2f})"
            line += f", {memory / ends['plain']['peak_bytes']:.2f} x the memory"
        print(line, flush=True)


def start(size: str, variant: str, batch_size: int, device: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--work", size, variant, "--batch_size", str(batch_size)]
    command += ["--device", device]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen, what: str) -> dict:
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"a worker ended with exit status {worker.wait()}: {' '.join(worker.args)}")
    return json.loads(line)


# ---- a worker: one variant, a step at a time


def work(size: str, variant: str, batch_size: int, device_name: str) -> None:
    import torch

    from model import GPT, GPTConfig
    from pretrain import distributed, hardware

    device = distributed.pick_device(device_name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif variant != "plain":
        distributed.keep_freed_memory()
    torch.manual_seed(0)
    config = GPTConfig(**SIZES[size][0])
    model = GPT(config).to(device)
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size)).to(device)
    # As a run would choose it: processors without bfloat16 take minutes for an update in it.
    dtype = distributed.pick_dtype("auto", device)
    step = make_step(model, variant, device, dtype)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        distributed.synchronize(device)
        t0 = time.perf_counter()
        loss = step(x, y)
        distributed.synchronize(device)
        print(json.dumps({"seconds": time.perf_counter() - t0, "loss": loss.item()}), flush=True)
    name = distributed.device_name(device)
    end = {
        "name": f"GPT-2 {model.num_parameters() / 1e6:.0f}M",
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_bytes": distributed.peak_memory(device),
        "flops_per_token": model.flops_per_token(),
        "peak_flops": hardware.peak_flops(name, dtype),
    }
    print(json.dumps(end), flush=True)
    sys.stdout.flush()
    os._exit(0)


def make_step(model, variant: str, device, dtype):
    """A function (x, y) -> loss that makes one update in this number format."""
    import torch
    import torch.nn.functional as F

    from pretrain.train.optim import make_optimizer

    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    if variant == "plain":
        for block in model.transformer.h:
            mlp = block.mlp
            mlp.forward = lambda x, mlp=mlp: mlp.project(mlp.c_fc(x))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1
        )

        def forward(x, y):
            logits = F.linear(model.hidden_states(x), model.transformer.wte.weight)
            return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
    else:
        optimizer = make_optimizer(model, learning_rate=6e-4, weight_decay=0.1, betas=(0.9, 0.95))
        module = torch.compile(model) if variant == "compiled" else model

        def forward(x, y):
            return module(x, y)[1]

    def step(x, y):
        with autocast:
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


if __name__ == "__main__":
    sys.exit(main())
