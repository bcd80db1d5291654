"""What a run is about to do, in numbers: for config.json, the "start" record of the log and the
console."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain import __version__, distributed
from pretrain.distributed import Ranks
from pretrain.hardware import peak_flops
from pretrain.report.runlog import provenance
from pretrain.tokens.shards import data_fingerprint, open_shard
from pretrain.train.loader import ShardLoader
from pretrain.train.settings import TrainSettings

COUNTED_TOKENS = 10**8  # takes half a second


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


def unigram_entropy(paths: Sequence[Path]) -> float | None:
    """Entropy in nats of the token frequencies of some shards; None for more than COUNTED_TOKENS
    tokens.

    It is what a model that knows these frequencies and nothing else pays per token there, so a loss
    clearly below it shows that the context is used.
    """
    shards = [open_shard(path) for path in paths]
    if sum(map(len, shards)) > COUNTED_TOKENS:
        return None
    counts = np.sum([np.bincount(shard, minlength=2**16) for shard in shards], axis=0)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
