"""What a run is about to do, in numbers: for config.json, the "start" record of the log and the
console."""

from dataclasses import asdict
from typing import Any

import torch

from pretrain import __version__, distributed
from pretrain.distributed import Ranks
from pretrain.report.runlog import provenance
from pretrain.train.data import TrainingData, describe_data
from pretrain.train.loader import BatchLoader
from pretrain.train.settings import TrainSettings


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
        "peak_flops": distributed.peak_flops(name, dtype),
        **provenance(),
    }
