"""What is timed: a table of variants, in the order in which they tell most, and how each is built.

step, about = build(VARIANTS[0], place)     # place: device, pack, small
seconds = timed(step, device)               # one update
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pretrain import distributed, models
from pretrain.distributed import Ranks, seed_dropout
from pretrain.tokens.shards import find_shards
from pretrain.train.loader import ShardLoader
from pretrain.train.optim import make_optimizer
from pretrain.train.speed import MODES, attention
from pretrain.train.stopping import FiniteGuard

from .pack import Pack
from .plain import PlainConfig, plain_step

SIZES = {
    "124M": {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
    "350M": {"block_size": 1024, "n_layer": 24, "n_head": 16, "n_embd": 1024},
}
SMALL = {
    "124M": {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16},
    "350M": {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16},
}
BATCH = {False: (16, 4), True: (2, 1)}  # by small: sequences, micro-steps; 64 x 1024 tokens
ALL = {"residual": True, "head_rows": 16384}  # switches that need nothing that is not torch's


class Place(NamedTuple):
    device: torch.device
    pack: Pack
    small: bool


@dataclass(frozen=True)
class Variant:
    """name: in the table. loop: "plain", or "ours", the update of train_gpt2.py."""

    name: str
    size: str = "124M"
    loop: str = "ours"
    model: str = "gpt2"
    compiled: bool = True
    mode: str = "default"
    attention: str = "auto"
    residual: bool = False
    head_rows: int = 0
    checkpointing: bool = False


PLAIN = Variant("plain loop", loop="plain")
OURS = Variant("train_gpt2.py")
EVERY = replace(OURS, name="residual bfloat16 + head_rows 16384", **ALL)
MODERN = replace(OURS, name="modern", model="modern")
# In the order in which they tell most: what it is, seconds that a part of it takes, the variants.
# As many as the memory holds are built at the same time and take turns step by step, so that their
# ratios do not depend on what the clock of the GPU does.
GROUPS: dict[str, tuple[int, list[Variant]]] = {
    "124M": (75, [PLAIN, OURS, EVERY]),
    "350M": (110, [replace(variant, size="350M") for variant in (PLAIN, OURS, EVERY)]),
    "modern": (
        75,
        [
            MODERN,
            replace(MODERN, name="modern, both switches", **ALL),
            replace(MODERN, size="350M"),
            replace(MODERN, name="modern, both switches", size="350M", **ALL),
        ],
    ),
    "one switch": (
        75,
        [
            replace(OURS, name="attention cudnn", attention="cudnn"),
            replace(OURS, name="residual bfloat16", residual=True),
            replace(OURS, name="head_rows 16384", head_rows=16384),
            replace(OURS, name="attention flash3", attention="flash3"),
            replace(OURS, name="attention flash4", attention="flash4"),
            replace(OURS, name="attention flash", attention="flash"),
            replace(OURS, name="head_rows 32768", head_rows=32768),
        ],
    ),
    "not compiled": (
        45,
        [
            replace(PLAIN, name="plain loop, not compiled", compiled=False),
            replace(OURS, name="train_gpt2.py --no-compile", compiled=False),
            replace(OURS, name="gradient_checkpointing", checkpointing=True),
        ],
    ),
    "max-autotune": (
        150,
        [replace(OURS, name="compile_mode max-autotune", mode="max-autotune")],
    ),
}


def in_small(variant: Variant) -> Variant:
    """Of all variants one is compiled in small: capturing graphs takes seconds."""
    return variant if variant is EVERY else replace(variant, compiled=False)


def timed(step: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """(seconds, loss) of one update."""
    distributed.synchronize(device)
    t0 = time.perf_counter()
    loss = step()
    distributed.synchronize(device)
    return time.perf_counter() - t0, loss


def compiler_of(variant: Variant, place: Place) -> Callable | None:
    """As train_gpt2.py compiles; in small with torch's stages but the last, which takes minutes."""
    if not variant.compiled:
        return None
    if place.small:
        return lambda what: torch.compile(what, backend="aot_eager")
    mode = MODES[variant.mode]
    return lambda what: torch.compile(what, mode=mode) if mode else torch.compile(what)


def build(
    variant: Variant, place: Place, stack: contextlib.ExitStack
) -> tuple[Callable[[], float], dict[str, Any]]:
    """(a function that makes one update and returns its loss, {"tokens": of an update,
    "flops_per_token": ...}). What it opens is left when the stack is. Raises SettingsError for what
    the machine does not have."""
    device = place.device
    sizes = (SMALL if place.small else SIZES)[variant.size]
    batch_size, micro_steps = BATCH[place.small]
    stack.enter_context(attention(variant.attention, device))
    with torch.device("meta" if variant.loop == "plain" else "cpu"):
        model = our_model(variant, sizes, place)
    about = {
        "tokens": batch_size * micro_steps * sizes["block_size"],
        "flops_per_token": model.flops_per_token(sizes["block_size"]),
        "parameters": model.num_parameters(),
    }
    compiler = compiler_of(variant, place)
    if variant.loop == "plain":
        step = plain_step(
            PlainConfig(**sizes),
            batch_size=batch_size,
            micro_steps=micro_steps,
            shards=place.pack.shards,
            device=device,
            compiler=compiler,
        )
        return step, about
    return our_step(variant, model, place, stack, compiler), about


def our_model(variant: Variant, sizes: dict[str, int], place: Place) -> Any:
    model_class, config_class = models.ARCHITECTURES[variant.model].load()
    if variant.model == "modern":
        heads = 1 if place.small else sizes["n_embd"] // 128
        sizes = sizes | {"n_head": heads}
    torch.manual_seed(1337)
    model = model_class(config_class(**sizes)).train()
    model.gradient_checkpointing = variant.checkpointing
    model.residual_dtype = torch.bfloat16 if variant.residual else None
    model.head_rows = variant.head_rows
    return model


def our_step(
    variant: Variant,
    model: Any,
    place: Place,
    stack: contextlib.ExitStack,
    compiler: Callable | None,
) -> Callable[[], float]:
    """The update of train_gpt2.train, on one process."""
    device, ranks = place.device, Ranks(0, 1, place.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model.to(device)
    is_modern = variant.model == "modern"
    optimizer = make_optimizer(
        model,
        name="muon" if is_modern else "adamw",
        learning_rate=0.025 if is_modern else 6e-4,
        weight_decay=0.05 if is_modern else 0.1,
        betas=(0.8 if is_modern else 0.9, 0.95),
    )
    batch_size, micro_steps = BATCH[place.small]
    loader = ShardLoader(
        find_shards(place.pack.shards, "train"),
        batch_size=batch_size,
        block_size=model.config.block_size,
        accumulation_steps=micro_steps,
        pin_memory=device.type == "cuda",
    )
    batches: Any = loader.prefetch(0, device=device)
    stack.enter_context(contextlib.closing(batches))
    forward: Any = compiler(model) if compiler else model
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    guard = FiniteGuard(ranks, scaler)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    made, largest = 0, math.inf if is_modern else 1.0

    def step() -> float:
        nonlocal made
        x, y = next(batches)
        loss = torch.zeros((), device=device)
        for i in range(len(x)):
            seed_dropout(1337, made, i)
            with autocast:
                _, micro_loss = forward(x[i], y[i], None)
            micro_loss = micro_loss * guard.loss_weight(micro_loss, len(x))
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        guard.check(made, loss, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made += 1
        return loss.item()

    return step
