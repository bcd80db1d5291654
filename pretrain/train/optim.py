"""How weights are updated: the optimizers by name, and the learning rate as a function of step.

    optimizer = make_optimizer(
        model, name="muon", learning_rate=0.025, weight_decay=0.05, betas=(0.8, 0.95)
    )
    rate = learning_rate(step, max_lr=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600_000)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()

A new optimizer is a function like adamw() and its line in OPTIMIZERS; a new schedule is one like
trapezoid() and its line in SCHEDULES.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.distributed import pick_dtype
from pretrain.errors import UserError

Betas = tuple[float, float]
FUSED_ON = {"cuda", "cpu", "mps"}  # where torch has the kernel that updates all weights in one pass
# What Muon leaves to AdamW learns at this share of Muon's rate, unless the model says otherwise.
# Muon's updates have a fixed size, about that of its rate, which is why its rates are high.
ADAMW_SHARE = 0.1
BATCH_NUMBERS = 2**25  # Muon's matrices in work at a time: some 0.4 GB


class OptimizerMismatch(UserError):
    """The state of an optimizer that was saved does not fit the one it is loaded into."""


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float,
    weight_decay: float,
    betas: Betas,
) -> Any:
    """The optimizer of this name (see OPTIMIZERS) over the parameters of the model that train: one
    of torch's, or Optimizers.

    Each of its param_groups has an "lr_scale": whoever changes the rate sets group["lr"] to the
    rate times that.
    """
    optimizer = OPTIMIZERS[name](model, learning_rate, weight_decay, betas)
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)
        group["lr"] = learning_rate * group["lr_scale"]
    return optimizer


# ---- AdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings (two dimensions or more), which decay, and biases and norms, which do
    not; both in the order of model.parameters(), so that a saved state fits any model of the same
    configuration."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: Betas
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over parameter_groups(), fused where torch has the kernel.

    On a CPU that is one pass over the weights instead of a dozen, several times as fast, with the
    same result but for rounding.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=_is_fused(groups))


def _is_fused(groups: Iterable[dict[str, Any]]) -> bool:
    return {p.device.type for group in groups for p in group["params"]} <= FUSED_ON


# ---- Muon


def muon(model: nn.Module, learning_rate: float, weight_decay: float, betas: Betas) -> "Optimizers":
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else.

    A model says what is what by optimizer_groups(), a list of torch's parameter groups with these
    keys: "params"; "optimizer", "muon" or "adamw"; "lr_scale" (1.0 where it is left out); "rows",
    of Muon alone: how many rows each of the matrices has that lie one below the other in every
    parameter of the group; and any setting of the optimizer in question ("weight_decay", "betas",
    "eps", "momentum", ...). A model without that method gets gpt2_groups(). Raises ValueError when
    a parameter that trains is in no group, or in two.
    """
    said = getattr(model, "optimizer_groups", None)
    groups = said() if said else gpt2_groups(model, weight_decay)
    _check_groups(model, groups)
    by_optimizer: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    for group in groups:
        settings = {key: value for key, value in group.items() if key != "optimizer"}
        settings["params"] = [p for p in group["params"] if p.requires_grad]
        if settings["params"]:
            by_optimizer[group["optimizer"]].append(settings)
    parts: dict[str, torch.optim.Optimizer] = {}
    if matrices := by_optimizer["muon"]:
        parts["muon"] = Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=0.95,
            nesterov=True,
            eps=1e-7,
            ns_steps=5,
            adjust_lr_fn="original",
        )
    if others := by_optimizer["adamw"]:
        parts["adamw"] = torch.optim.AdamW(
            others, lr=learning_rate, betas=betas, weight_decay=0.0, fused=_is_fused(others)
        )
    return Optimizers(parts)


def gpt2_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Muon's share of a model with GPT-2's parameter names: the matrices in its blocks. Embeddings
    are tables, not maps from one space to another, and stay with AdamW, as do biases and norms."""
    fused, matrices, tables, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif ".h." not in f".{name}":
            tables.append(parameter)
        elif name.endswith("c_attn.weight"):  # (3 * n_embd, n_embd): queries, keys, values
            fused.append(parameter)
        else:
            matrices.append(parameter)
    rows = [fused[0].shape[0] // 3] * 3 if fused else None
    return [
        {"params": fused, "optimizer": "muon", "rows": rows},
        {"params": matrices, "optimizer": "muon"},
        {
            "params": tables,
            "optimizer": "adamw",
            "lr_scale": ADAMW_SHARE,
            "weight_decay": weight_decay,
        },
        {"params": vectors, "optimizer": "adamw", "lr_scale": ADAMW_SHARE},
    ]


def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    count = {id(p): 0 for p in model.parameters()}
    for group in groups:
        for parameter in group["params"]:
            count[id(parameter)] += 1
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and count[id(p)] != 1]
    if wrong:
        raise ValueError(f"in no parameter group, or in two: {', '.join(wrong)}")


class Muon(torch.optim.Muon):
    """torch.optim.Muon with its state and settings, and three things it lacks: parameters that are
    several matrices, matrices of one shape taken together, processors without bfloat16.

    Muon replaces the momentum by the nearest matrix whose singular values are all alike. Queries,
    keys and values are three maps that lie in one parameter only because one product is faster than
    three: taken as one matrix, the largest of them would decide the scale of the others. A group's
    "rows", say [768, 768, 768], cuts each of its parameters; None or no "rows": one matrix each.
    The state stays one momentum_buffer a parameter.
    """

    def _init_group(
        self, group: Any, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> bool:
        whole: tuple[list[Tensor], ...] = ([], [], [])
        has_complex = super()._init_group(group, *whole)
        for tensors, pieces in zip((params, grads, momenta), whole, strict=True):
            for tensor in pieces:  # views: writing to them is writing to the parameter
                cut = group.get("rows") and not isinstance(tensor, DTensor)
                tensors += tensor.split(group["rows"]) if cut else [tensor]
        return has_complex

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The update of torch.optim.Muon with Nesterov's momentum; closure must be None.

        torch's own takes one matrix after another: the 72 of a 124M model are a thousand small
        products, which keep a GPU waiting for the next to be launched. A sharded matrix is made
        whole on every rank, one after the other: the work of one process.
        """
        for group in self.param_groups:
            matrices: tuple[list[Tensor], ...] = ([], [], [])
            self._init_group(group, *matrices)
            if any(isinstance(weight, DTensor) for weight in matrices[0]):
                _update_sharded(matrices, group)
                continue
            for weights, gradients, momenta in _of_one_shape(*matrices):
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalized(torch.stack(directions), group)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                rows, columns = weights[0].shape
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.add_(update, alpha=-rate)


def _update_sharded(matrices: tuple[list[Tensor], ...], group: dict[str, Any]) -> None:
    for weight, gradient, momentum in zip(*matrices, strict=True):
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(_sharded_update(direction, group), alpha=-group["lr"])


def _sharded_update(direction: Any, group: dict[str, Any]) -> Any:
    """A rank's part of what is subtracted from a sharded parameter, but for the learning rate."""
    updates = []
    for matrix in direction.full_tensor().split(group.get("rows") or len(direction)):
        longer = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
        updates.append(orthogonalized(matrix[None], group)[0].to(direction.dtype) * longer)
    # Every rank has computed all of it: nothing has to travel.
    return distribute_tensor(
        torch.cat(updates), direction.device_mesh, direction.placements, src_data_rank=None
    )


def _of_one_shape(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The same lists in pieces, whose tensors have one shape and not more than BATCH_NUMBERS
    numbers together; at least one tensor each."""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(lists[0]):
        by_shape.setdefault(tensor.shape, []).append(place)
    for shape, places in by_shape.items():
        count = max(1, BATCH_NUMBERS // shape.numel())
        for first in range(0, len(places), count):
            some = places[first : first + count]
            yield [[tensors[place] for place in some] for tensors in lists]


def orthogonalized(matrices: Tensor, settings: dict[str, Any]) -> Tensor:
    """Matrices (N, rows, columns) with their singular values brought near 1, by the quintic
    Newton-Schulz iteration of Jordan et al. 2024, "Muon": in bfloat16, as published, where the
    device computes in it, else in the dtype of the matrices (a CPU that does not would take 25
    times as long as in float32, most of an update's time)."""
    a, b, c = settings["ns_coefficients"]
    x = matrices.bfloat16() if _computes_in_bfloat16(matrices.device) else matrices
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=settings["eps"])
    for _ in range(settings["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _computes_in_bfloat16(device: torch.device) -> bool:
    return pick_dtype("auto", device) == torch.bfloat16


class Optimizers:
    """Several optimizers, each over its own parameters, with the methods of one."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups themselves, of all parts: what is set in them counts."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises OptimizerMismatch for the state of other optimizers."""
        if set(state) != set(self.parts):
            here, there = " and ".join(self.parts), " and ".join(map(str, state))
            raise OptimizerMismatch(
                f"the checkpoint holds the state of another optimizer ({there} instead of {here});"
                " continue with the --optimizer that it was trained with"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


OPTIMIZERS: dict[str, Callable[..., Any]] = {"adamw": adamw, "muon": muon}


# ---- The learning rate of the update that turns step `step` into `step + 1`; the first is step 0.


def learning_rate(
    step: int, *, max_lr: float, min_lr: float, warmup_iters: int, lr_decay_iters: int
) -> float:
    """Linear warmup, cosine decay, then constant.

    >>> learning_rate(2000, max_lr=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600_000)
    0.0006

    Warmup: the first `warmup_iters` updates rise linearly towards `max_lr`, which the next one has;
    none of them is zero. Then half a cosine down to `min_lr` at `lr_decay_iters`, constant after.
    The shape is that of GPT-3 (Brown et al. 2020, appendix B), as GPT-2's reproductions use it.
    """
    if step < warmup_iters:
        return max_lr * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(
    step: int,
    *,
    max_lr: float,
    min_lr: float = 0.0,
    warmup_iters: int,
    lr_decay_iters: int,
    decay_share: float = 0.4,
) -> float:
    """Linear warmup as above, constant at `max_lr`, then linear decay to `min_lr` at
    `lr_decay_iters`.

    >>> trapezoid(800, max_lr=1.0, warmup_iters=0, lr_decay_iters=1000)
    0.5

    decay_share: the share of lr_decay_iters, counted from its end, in which the rate falls; at most
    what the warmup leaves. Its source: Hägele et al. 2024, "Scaling laws and compute-optimal
    training beyond fixed training durations".
    """
    if step < warmup_iters:
        return max_lr * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    decay_iters = min(decay_share * lr_decay_iters, lr_decay_iters - warmup_iters)
    left = lr_decay_iters - step
    return max_lr if left >= decay_iters else min_lr + (max_lr - min_lr) * left / decay_iters


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": learning_rate, "trapezoid": trapezoid}
