"""What a run has come to: weights, moments, and the numbers that go with them.

    state = TrainState(model, optimizer, scaler)
    state.load_state_dict(saved)        # a checkpoint, or what Run found
    state.step += 1
    torch.save(state.state_dict(), ...)

What does not change while a run goes on is in its settings.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pretrain.distributed import Ranks
from pretrain.train.best import Record
from pretrain.train.checkpoint import CheckpointError, restore_optimizer
from pretrain.train.parallel import shapes_of, shared_out

NUMBERS = ("step", "last_eval_step", "loss", "val_loss", "learning_rate")


class TrainState:
    """All that changes while a run goes on, the same on every rank."""

    def __init__(self, model: Any, optimizer: Any, scaler: torch.amp.GradScaler):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.step = 0  # updates made
        self.last_eval_step = -1
        self.loss = math.nan  # of training, as last logged or evaluated
        self.val_loss = math.nan
        self.learning_rate = 0.0  # of the last update
        self.record = Record()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. Every rank calls it: where parameters are sharded, each has a
        part."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            **asdict(self.record),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what state_dict returned, but for the model, which was built with its weights.
        Learning rate, betas and weight decay stay those of this run's flags. Raises CheckpointError
        for moments of another model."""
        restore_optimizer(self.optimizer, shared_out(self.optimizer, saved["optimizer"]))
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                _check_moments(parameter, self._moments_of(parameter))
        # Saved by a run in another --dtype it is empty: the scale is found anew in some updates.
        with contextlib.suppress(KeyError, RuntimeError):
            self.scaler.load_state_dict(saved["scaler"])
        for name in NUMBERS:
            setattr(self, name, saved.get(name, getattr(self, name)))
        self.record = Record.of(saved)

    def _moments_of(self, parameter: Tensor) -> dict[str, Any]:
        parts = getattr(self.optimizer, "parts", {"": self.optimizer})
        for part in parts.values():
            if parameter in part.state:
                return part.state[parameter]
        return {}


def _check_moments(parameter: Tensor, moments: dict[str, Any]) -> None:
    for name, value in moments.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
            raise CheckpointError(
                f"the optimizer's {name} of shape {tuple(value.shape)} does not fit a weight of"
                f" shape {tuple(parameter.shape)}: not the checkpoint of this model"
            )


def read_on_first(
    ranks: Ranks, read: Callable[[], dict[str, Any]], *, whole: bool = True
) -> dict[str, Any]:
    """What read() returns on rank 0, on every rank; what it raises there, it raises on all. Only
    rank 0's disk is sure to hold the run, since nodes may have a disk each. whole=False: others get
    the shapes_of tensors, where no machine could hold them once for each of its ranks."""
    found: list[dict[str, Any]] = []
    ranks.on_first(lambda: found.append(read()))
    if whole:
        return ranks.broadcast_state(found[0] if found else None)
    shapes = ranks.broadcast(shapes_of(found[0]) if found else None)
    return found[0] if found else shapes
