"""The model that a run begins with, and what no part of a run may change.

    model, block_size = initial_model(run)              # a new one, --init_from's, or the run's own
    identity = identity_of(run.settings, model, loader)

Every rank makes the same calls: what one of them cannot do, none of them does.
"""

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pretrain import distributed, models
from pretrain.models.source import warn_of_source
from pretrain.train import parallel
from pretrain.train.checkpoint import CheckpointError
from pretrain.train.data import TrainingData
from pretrain.train.loader import BatchLoader
from pretrain.train.run import Run
from pretrain.train.settings import TrainSettings
from pretrain.train.speed import attention, configure
from pretrain.train.state import read_on_first
from pretrain.weights import Damaged

if TYPE_CHECKING:
    from model import GPT


def initial_model(run: Run) -> tuple["GPT", int]:
    """The model with the weights that the run begins with, on its device, and the length of the
    sequences to train it on."""
    settings, ranks = run.settings, run.ranks
    torch.manual_seed(settings.seed)
    run.enter(attention(settings.attention, ranks.device))
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    make: Callable[[], Any]
    if run.saved:
        make = partial(build_model, settings, run.saved, str(run.path))
    elif settings.init_from != "scratch":
        weights = read_on_first(
            ranks, lambda: read_weights(settings), whole=not parallel.is_sharded(settings)
        )
        make = partial(build_model, settings, weights, settings.init_from)
    else:
        new_model, config = models.ARCHITECTURES[settings.model].load()
        sizes = [f.name for f in fields(config) if hasattr(settings, f.name)]
        make = partial(new_model, config(**{name: getattr(settings, name) for name in sizes}))
    model = parallel.placed(make, settings, ranks, precision(run)[0])
    configure(model, settings, precision(run)[0])
    asked = "block_size" in settings.asked_sizes
    return model, settings.block_size if asked else model.config.block_size


def read_weights(settings: TrainSettings) -> dict[str, Any]:
    """The weights that --init_from names. Raises CheckpointError where flags ask for other
    sizes."""
    name = settings.init_from
    loaded = models.from_pretrained(name)
    config = loaded.config
    has = {"value_embeddings": False} | asdict(config)
    has["model"] = models.architecture_of(loaded)
    wrong = [
        f"--{size} {getattr(settings, size)}"
        for size in sorted(settings.asked_sizes - {"block_size"})
        if getattr(settings, size) != has.get(size)
    ]
    if "block_size" in settings.asked_sizes and settings.block_size > config.block_size:
        wrong.append(f"--block_size {settings.block_size}")
    if wrong:
        raise CheckpointError(f"{name} has {config}: leave out {', '.join(wrong)}")
    return {
        "architecture": has["model"],
        "model_config": asdict(config),
        "model": loaded.state_dict(),
    }


def build_model(settings: TrainSettings, weights: dict[str, Any], where: str) -> "GPT":
    """A model with the weights and sizes of a checkpoint, which came from `where`."""
    config = dict(weights.get("model_config") or {})
    if "dropout" in config:
        config["dropout"] = settings.dropout
    try:
        state = weights.get("model") or {}
        model = models.build(weights.get("architecture", "gpt2"), config, state)
    except Damaged as error:
        raise CheckpointError(f"{where}: {error}") from None
    warn_of_source(model, weights, where)
    return model


def identity_of(settings: TrainSettings, model: "GPT", loader: BatchLoader) -> dict[str, Any]:
    """What no part of a run may change."""
    names = ("n_layer", "n_head", "n_embd", "bias", "value_embeddings")
    sizes = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    asked = {name: getattr(settings, name) for name in sizes if name in settings.asked_sizes}
    sizes |= asked
    if not sizes.get("value_embeddings"):
        sizes.pop("value_embeddings", None)  # as checkpoints from before there were any have it
    is_asked = "model" in settings.asked_sizes
    return {
        "model": settings.model if is_asked else models.architecture_of(model),
        "optimizer": settings.optimizer,
        **sizes,
        "block_size": loader.block_size,
        "stride": loader.stride,
        "tokens per update": loader.global_batch * loader.block_size,
        **TrainingData(settings.data_dir).identity(),
        "seed": settings.seed,
        "shuffle": settings.shuffle,
    }


def precision(run: Run) -> tuple[torch.dtype, torch.autocast]:
    """The number format of the computation, and the context in which it is used."""
    device = run.ranks.device
    dtype = distributed.pick_dtype(run.settings.dtype, device)
    return dtype, torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
