"""For how long a save makes training wait: written behind training, and with --no-async_save.

    $ python benchmarks/save_pause.py
    GPT-2 124M with AdamW on cpu, ... GB a checkpoint, ... saves of each in turn
      --no-async_save   pause ... s (... to ...)
      --async_save      pause ... s (... to ...), ... % of the other (... to ...)
                        written in ... s (... to ...)
      an update while a checkpoint is written takes ... x the time of one alone (... to ...)

The saves are those of train_gpt2.py (pretrain/train/saving.py), with fsync, into a folder that is
deleted afterwards; they alternate, so that whatever slows the disk slows both. The percentage is
the median over neighbouring pairs. The first pair is not counted: it asks the system for memory
that later ones have. An update takes 1 x 256 tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

SIZES = {
    "124M": {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
    "small": {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--saves", type=int, default=5, help="counted saves of each (default: 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="on the disk to measure (default: the temporary one)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args.size, args.saves, args.device, Path(folder))
    return 0


def measure(size: str, saves: int, device_name: str, folder: Path) -> None:
    import torch

    from model import GPT, GPTConfig
    from pretrain import distributed
    from pretrain.distributed import Ranks
    from pretrain.report.runlog import RunLog
    from pretrain.train.optim import make_optimizer
    from pretrain.train.saving import Saver
    from pretrain.train.state import TrainState

    device = distributed.pick_device(device_name)
    config = GPTConfig(**SIZES[size])
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    state = TrainState(model, optimizer, torch.amp.GradScaler(device.type, enabled=False))
    tokens = torch.randint(config.vocab_size, (2, 1, 256), device=device)

    def update() -> float:
        t0 = time.perf_counter()
        model(tokens[0], tokens[1])[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        distributed.synchronize(device)
        return time.perf_counter() - t0

    savers = {}
    for name, is_async in (("waits", False), ("behind", True)):
        settings = SimpleNamespace(out_dir=folder, async_save=is_async, keep_checkpoints=1)
        savers[name] = Saver(settings, Ranks(0, 1, device), state, RunLog(folder, enabled=False))
    pauses: dict[str, list[float]] = {"waits": [], "behind": []}
    written, slower = [], []
    update()  # the optimizer makes its moments
    for _ in range(saves + 1):
        alone = update()
        for name, saver in savers.items():
            distributed.synchronize(device)
            t0 = time.perf_counter()
            saver.begin({"step": state.step, **state.state_dict()}, [f"{name}.pt"])
            pauses[name].append(time.perf_counter() - t0)
        slower.append(update() / alone)
        assert savers["behind"].end() and savers["waits"].end()
        written.append(time.perf_counter() - t0)
    size_bytes = (folder / "behind.pt").stat().st_size
    about = f"GPT-2 {model.num_parameters() / 1e6:.0f}M with AdamW on {device.type}"
    print(f"{about}, {size_bytes / 1e9:.2f} GB a checkpoint, {saves} saves of each in turn")
    waits, behind = pauses["waits"][1:], pauses["behind"][1:]
    shares = [100 * b / w for b, w in zip(behind, waits, strict=True)]
    share = f"{spread(shares, '.1f')} % of the other"
    print(f"  --no-async_save   pause {spread(waits, '.3f')} s")
    print(f"  --async_save      pause {spread(behind, '.3f')} s, {share}")
    print(f"                    written in {spread(written[1:], '.1f')} s")
    print(
        "  an update while a checkpoint is written takes"
        f" {spread(slower[1:], '.2f')} x the time of one alone"
    )


def spread(values: list[float], form: str) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())
