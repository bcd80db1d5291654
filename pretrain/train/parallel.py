"""One model on several ranks: a copy on each (ddp), or a part on each (fsdp).

    model = placed(lambda: GPT(config), settings, ranks, torch.bfloat16)
    forward = wrapped(model, settings, ranks, torch.compile)
    with gathered(model):                                   # to evaluate and to sample
        ...

Sharded (FSDP2, torch's fully_shard), a rank keeps its part of every parameter, gradient and moment.
A block's weights are gathered when it computes, in the number format of the computation, and its
gradients are averaged over the ranks in float32 right after. What lies outside of the blocks, of
GPT-2 the embeddings and the last norm, is gathered once a pass: the head is the token embedding. It
is gathered in float32, since the loss converts it by itself.

What is saved is whole, and the same as that of one process: see whole().
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.distributed import Ranks
from pretrain.train.checkpoint import CheckpointError
from pretrain.train.settings import TrainSettings


def is_sharded(settings: TrainSettings) -> bool:
    """Whether a rank has a part of the model; one alone has all of it."""
    return settings.parallel == "fsdp" and settings.world_size > 1


def placed(
    make: Callable[[], Any], settings: TrainSettings, ranks: Ranks, dtype: torch.dtype
) -> Any:
    """The model that `make` returns, to train, on its device or in parts on all of them. What make
    raises on any rank is raised on every rank. dtype: of the computation."""
    if not is_sharded(settings):
        return ranks.on_all(make).train().to(ranks.device)
    made: list[Any] = []  # of rank 0
    ranks.on_first(lambda: made.append(make()))
    kind, config = ranks.broadcast((type(made[0]), made[0].config) if made else None)
    with torch.device("meta"):
        model = made[0] if made else kind(config)
    shard(model.train(), ranks, dtype, reshard_after_forward=settings.reshard_after_forward)
    return model


def wrapped(
    model: Any,
    settings: TrainSettings,
    ranks: Ranks,
    compiler: Callable[[Any], Any] | None,
) -> Any:
    """The model as updates call it, with its gradients exchanged between ranks, compiled where
    there is a compiler: see speed.choose_compiler."""
    if is_sharded(settings):
        if compiler:
            compile_blocks(model, compiler)
        return model
    forward = compiler(model) if compiler else model
    if ranks.world_size == 1:
        return forward
    size = settings.bucket_cap_mb
    return DistributedDataParallel(forward, gradient_as_bucket_view=True, bucket_cap_mb=size)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What a model repeats: the modules in its lists."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [block for blocks in lists for block in blocks]


def shard(model: Any, ranks: Ranks, dtype: torch.dtype, *, reshard_after_forward: bool) -> None:
    """Leave of a model, which rank 0 has in main memory and others may have on the meta device, a
    part on each rank's device.

    dtype: in which blocks are gathered; they compute in it under autocast, as without sharding.
    reshard_after_forward: gather the blocks for backward once more, else they stay whole between.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    weights = model.state_dict() if ranks.is_first else {}
    model.to("meta")
    lower = None if dtype == torch.float32 else dtype
    # The residual stream stays float32, as under autocast alone.
    policy = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks_of(model):
        _let_norms_take_any(block)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=ranks.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    # The first forward pass says which module is the outermost: not a block, in an evaluation.
    # Nor may it be one of inference mode, whose tensors no later pass could train.
    is_training = model.training
    autocast = torch.autocast(ranks.device.type, dtype=dtype, enabled=lower is not None)
    with torch.no_grad(), autocast:
        model.eval()(torch.zeros(1, 1, dtype=torch.int64, device=ranks.device))
    reshard(model.train(is_training))


def reshard(model: Any) -> None:
    """Leave each rank its part again after a pass that no backward followed. Only then are a
    model's parameters those that an optimizer must hold."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _let_norms_take_any(block: nn.Module) -> None:
    """Gathered in half precision, the gains of a norm meet a stream in float32: autocast makes them
    one dtype on a GPU, and on a CPU, where layer_norm takes no two, nobody would."""
    for norm in block.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.forward = partial(_normed, norm)  # type: ignore[method-assign]


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), bias, norm.eps)


def compile_blocks(model: nn.Module, compiler: Callable[[Any], Any]) -> None:
    """Compile each block for training, within its gathering and its checkpoint: a graph each.
    Evaluations have too many shapes to be worth it."""
    blocks = blocks_of(model)
    # They share their code, of which torch compiles no more than 8 versions by itself.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, len(blocks) + 8)
    for block in blocks:
        block.forward = _compiled_in_training(block, compiler)  # type: ignore[method-assign]


def _compiled_in_training(
    block: nn.Module, compiler: Callable[[Any], Any]
) -> Callable[..., Tensor]:
    plain, compiled = block.forward, compiler(block.forward)

    def forward(*arguments: Any) -> Tensor:
        return (compiled if block.training else plain)(*arguments)

    return forward


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, what lies outside of a sharded model's blocks is whole, so that any of its methods
    can be called, by all ranks as often; nothing for other models."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        reshard(model)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a part, on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def shapes_of(state: Any) -> Any:
    """A state without its tensors' numbers, for ranks that get their parts of them later: on the
    meta device, but for single numbers."""
    if isinstance(state, Tensor):
        return state if state.numel() <= 1 else torch.empty_like(state, device="meta")
    if isinstance(state, dict):
        return {key: shapes_of(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(shapes_of(value) for value in state)
    return state


def shared_out(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state of an optimizer with each rank's part of the moments of sharded parameters.
    Every rank calls it: rank 0 with the tensors, the others with their shapes_of. Raises
    CheckpointError for moments of other shapes than their parameters."""
    if parts := getattr(optimizer, "parts", None):
        mine = {
            name: shared_out(part, saved[name]) for name, part in parts.items() if name in saved
        }
        return saved | mine
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return saved
    state = {
        number: {name: _part(name, value, parameters[number]) for name, value in moments.items()}
        for number, moments in saved["state"].items()
    }
    return saved | {"state": state}


def _part(name: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"the optimizer's {name} of shape {tuple(value.shape)} does not fit a weight of shape"
            f" {tuple(parameter.shape)}: not the checkpoint of this model"
        )
    device = parameter.device
    value = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=0)
