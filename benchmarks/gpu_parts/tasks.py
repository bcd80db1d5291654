"""What is measured besides updates: the loader, saving, evaluation, train_gpt2.py as a whole.

TASKS["loader"](place, folder)      # {"what": "...", "tokens_per_second": ..., ...}
"""

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain import distributed
from pretrain.hardware import compiler_problem
from pretrain.report.runlog import read_log
from pretrain.tokens.shards import find_shards
from pretrain.train import checkpoint as checkpoints
from pretrain.train.loader import ShardLoader
from pretrain.train.optim import make_optimizer

from .checks import Skipped
from .pack import ROOT
from .variants import BATCH, OURS, SIZES, SMALL, Place, our_model

Numbers = dict[str, Any]


def loader_speed(place: Place, folder: Path) -> Numbers:
    """Batches on the device with no model to wait for, against what the fastest update needs."""
    sizes = (SMALL if place.small else SIZES)["124M"]
    batch_size, micro_steps = BATCH[place.small]
    loader = ShardLoader(
        find_shards(place.pack.shards, "train"),
        batch_size=batch_size,
        block_size=sizes["block_size"],
        accumulation_steps=micro_steps,
        pin_memory=place.device.type == "cuda",
    )
    tokens, seconds = loader.global_batch * sizes["block_size"], 0.2 if place.small else 4.0
    steps, slowest = 0, 0.0
    with contextlib.closing(loader.prefetch(0, device=place.device)) as found:
        next(found)
        begin = t0 = time.perf_counter()
        while t0 - begin < seconds:
            next(found)
            distributed.synchronize(place.device)
            t1 = time.perf_counter()
            steps, slowest, t0 = steps + 1, max(slowest, t1 - t0), t1
    return {
        "what": "batches on the device, nothing else",
        "tokens_per_second": steps * tokens / (t0 - begin),
        "slowest_milliseconds": 1000 * slowest,
    }


def save_pause(place: Place, folder: Path) -> Numbers:
    """A checkpoint of the 124M model and AdamW's moments, written and fsynced at once: for so long
    training waits where the save is not behind it."""
    model = our_model(OURS, (SMALL if place.small else SIZES)["124M"], place).to(place.device)
    optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    path, seconds = folder / "save.pt", []
    for _ in range(2):
        distributed.synchronize(place.device)
        t0 = time.perf_counter()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save(path, content)
        seconds.append(time.perf_counter() - t0)
    size = path.stat().st_size
    path.unlink()
    return {"what": "torch.save and fsync", "pause_seconds": seconds[-1], "bytes": size}


def evaluation_speed(place: Place, folder: Path) -> Numbers:
    """Tokens a second of the validation loss, usual and with --compile_eval."""
    sizes = (SMALL if place.small else SIZES)["124M"]
    model = our_model(OURS, sizes, place).to(place.device).eval()
    rows = BATCH[place.small][0]
    x, y = torch.randint(50257, (2, rows, sizes["block_size"]), device=place.device)
    scores: dict[str, Callable] = {"": model.score}
    if place.small:
        scores["compiled_"] = torch.compile(model.score, backend="eager")
    elif not compiler_problem(place.device):
        scores["compiled_"] = torch.compile(model.score)
    found: Numbers = {"what": "the validation loss, 124M"}
    for name, score in scores.items():
        repeats = 1 if place.small else 8
        with torch.autocast(place.device.type, dtype=torch.bfloat16):
            score(x, y)
            distributed.synchronize(place.device)
            t0 = time.perf_counter()
            for _ in range(repeats):
                score(x, y)
            distributed.synchronize(place.device)
        found[f"{name}tokens_per_second"] = repeats * x.numel() / (time.perf_counter() - t0)
    return found


def train_words(place: Place, out_dir: Path) -> list[str]:
    """Flags of a short run of train_gpt2.py with an evaluation and saves."""
    sizes = (SMALL if place.small else SIZES)["124M"]
    batch_size, micro_steps = BATCH[place.small]
    numbers: Numbers = dict(sizes) | {
        "batch_size": batch_size,
        "gradient_accumulation_steps": micro_steps,
        "max_iters": 3 if place.small else 45,
        "lr_decay_iters": 45,
        "warmup_iters": 3,
        "log_interval": 1 if place.small else 5,
        "eval_interval": 2 if place.small else 30,
        "eval_iters": 1 if place.small else 10,
        "hellaswag_limit": 2 if place.small else 400,
        "sample_interval": 0,
        "checkpoint_interval": 2 if place.small else 20,
        "keep_checkpoints": 1,
        "out_dir": out_dir,
        "data_dir": place.pack.shards,
        "device": place.device.type,
        "dtype": "bfloat16",
        "verify_data": False,
    }
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    items = place.pack.items
    words += ["--hellaswag_data", str(items)] if items else ["--no-hellaswag"]
    return [*words, "--no-compile"] if place.small else words


def summary_of(folder: Path, what: str) -> Numbers:
    """What the log of a run says, without its first updates, which compile."""
    records = read_log(folder / "metrics.jsonl")
    updates = [record for record in records if record["event"] == "train"]
    late = updates[len(updates) // 2 :]
    found: Numbers = {"what": what}
    for name in ("tokens_per_second", "mfu", "memory_bytes"):
        values = [record[name] for record in late if record.get(name) is not None]
        if values:
            found[name] = statistics.median(values)
    pauses = [r["pause_seconds"] for r in records if r.get("pause_seconds") is not None]
    if pauses:
        found["pause_seconds"] = statistics.median(pauses)
    if updates and "kilowatt_hours" in updates[-1]:
        found["kilowatt_hours"] = updates[-1]["kilowatt_hours"]
    found["loss"] = [updates[0]["loss"], updates[-1]["loss"]]
    return found


def whole_run(place: Place, folder: Path) -> Numbers:
    """train_gpt2.py as a user runs it: evaluations, HellaSwag, saves and all."""
    import train_gpt2

    shutil.rmtree(folder / "whole_run", ignore_errors=True)
    status = train_gpt2.main(train_words(place, folder / "whole_run"))
    assert status == 0, f"train_gpt2.py ended with status {status}"
    return summary_of(folder / "whole_run", "train_gpt2.py, 124M, its own log")


def several_gpus(place: Place, folder: Path) -> Numbers:
    """torchrun over all GPUs, with buckets of 25 and 100 MB."""
    count = torch.cuda.device_count() if place.device.type == "cuda" else 0
    if count < 2:
        raise Skipped("one GPU: nothing is exchanged, --bucket_cap_mb has no effect")
    found: Numbers = {"what": f"train_gpt2.py on {count} GPUs"}
    for size in (25, 100):
        out_dir = folder / f"buckets-{size}"
        shutil.rmtree(out_dir, ignore_errors=True)
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        words = [*train_words(place, out_dir), "--bucket_cap_mb", str(size), "--no-hellaswag"]
        command = [sys.executable, *start, str(ROOT / "train_gpt2.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        numbers = summary_of(out_dir, "")
        found[f"bucket_{size}_tokens_per_second"] = numbers["tokens_per_second"]
        found["tokens_per_second"] = numbers["tokens_per_second"]
    return found


def machine(place: Place, folder: Path) -> Numbers:
    """What all of this ran on."""
    found: Numbers = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": distributed.device_name(place.device),
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if place.device.type == "cuda" else 0,
        "data": json.loads(json.dumps(place.pack.about)),
    }
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        found["memory_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cudnn"] = torch.backends.cudnn.version()
    found["compiler"] = compiler_problem(place.device) or "there"
    return found


TASKS: dict[str, Callable[[Place, Path], Numbers]] = {
    "loader": loader_speed,
    "save": save_pause,
    "evaluation": evaluation_speed,
    "whole run": whole_run,
    "several GPUs": several_gpus,
}
