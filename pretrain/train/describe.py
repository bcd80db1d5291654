"""What a run is about to do, in numbers: for config.json, the "start" record of the log and the
console."""

from dataclasses import asdict
from typing import Any

import torch

from pretrain import __version__, distributed
from pretrain.distributed import Ranks
from pretrain.hardware import peak_flops
from pretrain.report.runlog import provenance
from pretrain.tokens.owntext import unigram_entropy
from pretrain.tokens.shards import data_fingerprint
from pretrain.train.loader import ShardLoader
from pretrain.train.settings import TrainSettings


def describe(
    settings: TrainSettings,
    model: Any,
    loader: ShardLoader,
    *,
    identity: dict[str, Any],
    ranks: Ranks,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What is about to happen, for config.json, the log and the console."""
    name = distributed.device_name(ranks.device)
    tokens_per_step = loader.global_batch * loader.windows.block_size
    return {
        "version": __version__,
        "flags": settings.flags,
        "model_config": asdict(model.config),
        "parameters": model.num_parameters(),
        "run": identity,
        "data_fingerprint": data_fingerprint(settings.data_dir),
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": ranks.world_size,
        "micro_steps": loader.shape[0],
        "tokens_per_step": tokens_per_step,
        "steps_per_epoch": loader.steps_per_epoch,
        "max_tokens": settings.max_iters * tokens_per_step,
        "train_shards": len(loader.windows.paths),
        "train_tokens": loader.windows.num_tokens,
        "unigram_entropy": unigram_entropy(loader.windows.paths),
        "peak_flops": peak_flops(name, dtype),
        **provenance(),
    }
