"""What a run is about to do, in numbers: for config.json, the "start" record of the log and the
console; and what about it is odd."""

from dataclasses import asdict
from typing import Any

import torch

from pretrain import __version__, distributed
from pretrain.distributed import Ranks
from pretrain.hardware import peak_flops
from pretrain.report.runlog import provenance
from pretrain.train.data import TrainingData, describe_data
from pretrain.train.loader import BatchLoader
from pretrain.train.settings import TrainSettings

MANY_EPOCHS = 10_000  # more passes over the data than anybody means


def describe(
    settings: TrainSettings,
    model: Any,
    loader: BatchLoader,
    *,
    identity: dict[str, Any],
    ranks: Ranks,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What is about to happen, for config.json, the log and the console."""
    name = distributed.device_name(ranks.device)
    tokens_per_step = loader.global_batch * loader.block_size
    data = TrainingData(settings.data_dir)
    return {
        "version": __version__,
        "flags": settings.flags,
        "model_config": asdict(model.config),
        "parameters": model.num_parameters(),
        "run": identity,
        "data_fingerprint": data.fingerprint(),
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": ranks.world_size,
        "micro_steps": loader.shape[0],
        "tokens_per_step": tokens_per_step,
        "max_tokens": settings.max_iters * tokens_per_step,
        **describe_data(data, loader, settings.max_iters),
        "peak_flops": peak_flops(name, dtype),
        **provenance(),
    }


def changed_flags(before: dict[str, Any], settings: TrainSettings) -> list[str]:
    """What may change from one part of a run to the next, and rarely should."""
    names = ("learning_rate", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip")
    now = settings.flags
    return [
        f"--{name} {before[name]} before, {now[name]} now"
        for name in names
        if name in before and before[name] != now[name]
    ]


def warnings_of(settings: TrainSettings, steps_per_epoch: float) -> list[str]:
    """What is allowed and yet defeats the run, most likely by a slip: one line each."""
    found, epochs = [], settings.max_iters / steps_per_epoch
    if 0 < settings.max_iters <= settings.warmup_iters:
        found.append(
            f"--warmup_iters {settings.warmup_iters:,}: the run ends after {settings.max_iters:,}"
            " updates, before the learning rate has risen; lower it to a tenth of that"
        )
    if epochs >= MANY_EPOCHS:
        found.append(
            f"--max_iters {settings.max_iters:,} are {epochs:,.0f} passes over this data; give"
            " --epochs, or more data"
        )
    if settings.learning_rate == 0:
        found.append("--learning_rate 0: nothing will be learned")
    return found
