"""The memory that a rank will need, before any of it is asked for.

    needed(model, optimizer, batch_size=4, block_size=1024, dtype=torch.bfloat16)
    # Memory(weights=6.2e9, gradients=6.2e9, moments=12.5e9, gathered=0, activations=14.2e9, ...)

Weights, gradients and moments are counted. Activations are what a forward pass leaves behind for
backward: it is made without numbers, on fake tensors, for two blocks, and the rest of the blocks
are like the second. What the allocator adds (fragments, the libraries' own, a few percent to a
tenth) is not in it.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.models.source import own_class
from pretrain.train.parallel import blocks_of, is_sharded
from pretrain.train.settings import TrainSettings
from pretrain.train.state import TrainState

FLOAT32 = 4  # bytes
HEAD_ROWS, SOFTMAX_ROWS = 8192, 2048  # of logits on a GPU: see ops._Parts


@dataclass(frozen=True)
class Memory:
    """Bytes, of one rank."""

    weights: int  # float32, as are gradients and moments
    gradients: int
    moments: int
    gathered: int  # what of a sharded model is whole at the same time
    activations: int
    head: int  # logits of a part of the batch, and their gradients

    @property
    def total(self) -> int:
        """A lower bound: allocators add some percent to it."""
        return sum(asdict(self).values())


def needed(
    model: Any,
    optimizer: Any,
    *,
    batch_size: int,
    block_size: int,
    dtype: torch.dtype,
    shards: int = 1,
    reshard_after_forward: bool = True,
) -> Memory:
    """What training this model takes. Parameters may be on the meta device, or DTensors; shards:
    the ranks among which they are divided (1: each has all of them). dtype: of the computation."""
    own = {parameter: _part(parameter, shards) for parameter in model.parameters()}
    size, blocks = sum(own.values()), blocks_of(model)
    moments = sum(own[p] * count for p, count in _moments(optimizer).items())
    rows, width = batch_size * block_size, model.config.n_embd
    vocabulary = model.config.padded_vocab_size
    logits = min(rows, model.head_rows or HEAD_ROWS) * vocabulary * dtype.itemsize
    logits += 4 * min(rows, SOFTMAX_ROWS) * vocabulary * FLOAT32
    return Memory(
        weights=size * FLOAT32,
        gradients=size * FLOAT32,
        moments=moments * FLOAT32,
        gathered=_gathered(model, blocks, dtype, reshard_after_forward) if shards > 1 else 0,
        activations=_activations(model, batch_size, block_size, dtype, is_sharded=shards > 1),
        head=logits + (rows + vocabulary) * width * FLOAT32,
    )


def estimate(
    settings: TrainSettings, state: TrainState, block_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """needed() of a run as a dict, with the "total"."""
    memory = needed(
        state.model,
        state.optimizer,
        batch_size=settings.batch_size,
        block_size=block_size,
        dtype=dtype,
        shards=settings.world_size if is_sharded(settings) else 1,
        reshard_after_forward=settings.reshard_after_forward,
    )
    return asdict(memory) | {"total": memory.total}


def _part(parameter: Tensor, shards: int) -> int:
    """Numbers of a rank's part of a parameter, which is cut along its first dimension."""
    return -(-len(parameter) // shards) * (parameter.numel() // len(parameter))


def _moments(optimizer: Any) -> dict[Tensor, int]:
    """For each parameter how many numbers the optimizer keeps of each of its own."""
    parts = getattr(optimizer, "parts", {"": optimizer}).values()
    return {
        parameter: 1 if isinstance(part, torch.optim.Muon) else 2
        for part in parts
        for group in part.param_groups
        for parameter in group["params"]
    }


def _gathered(
    model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype, reshard_after_forward: bool
) -> int:
    """Bytes: what lies outside of the blocks, with its gradients; two blocks, one of which computes
    while the next is fetched; and the gradients of one, as they are and on their way in float32."""
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    outside = sum(p.numel() for p in model.parameters()) - sum(of_blocks)
    whole = 2 * max(of_blocks) if reshard_after_forward else sum(of_blocks)
    passing = max(of_blocks) * (dtype.itemsize + FLOAT32)
    return 2 * outside * FLOAT32 + whole * dtype.itemsize + passing


class _Alive(TorchDispatchMode):
    """The bytes of the tensors made inside that are still there, views of weights left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = weakref.WeakSet(p.untyped_storage() for p in model.parameters())
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._storages.add(tensor.untyped_storage())
        return result

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages - self._weights)


def _activations(
    model: Any, batch_size: int, block_size: int, dtype: torch.dtype, *, is_sharded: bool
) -> int:
    """Bytes kept from forward to backward, and those of one block again: backward makes as much of
    it anew, or all of it where activations are not kept."""
    kind: Any = own_class(model)

    def kept(checkpointing: bool) -> tuple[int, int]:
        config: Any = replace(model.config, n_layer=2)
        config_kind: Any = type(config)
        return _kept(
            kind,
            config_kind,
            tuple(asdict(config).items()),
            checkpointing=checkpointing,
            residual_dtype=model.residual_dtype,
            shape=(batch_size, block_size),
            dtype=dtype,
            is_sharded=is_sharded,
        )

    both, each = kept(model.gradient_checkpointing)
    again = kept(False)[1] if model.gradient_checkpointing else each
    return both + (model.config.n_layer - 2) * each + again


@functools.lru_cache(maxsize=64)
def _kept(
    kind: type[nn.Module],
    config_kind: type,
    config: tuple[tuple[str, Any], ...],
    *,
    checkpointing: bool,
    residual_dtype: torch.dtype | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    is_sharded: bool,
) -> tuple[int, int]:
    """Bytes that a forward pass of a new model of this kind, of two blocks, leaves for backward,
    and how many of them its second block adds. shape: of the tokens. Remembered, since several runs
    in one process are mostly alike."""
    with torch.device("meta"):
        sample: Any = kind(config_kind(**dict(config))).train()
    sample.gradient_checkpointing = checkpointing
    sample.residual_dtype = residual_dtype
    # Blocks are gathered in the dtype of the computation, where autocast would keep a copy.
    in_blocks = [m for b in blocks_of(sample) for m in b.modules()] if is_sharded else []
    with FakeTensorMode():
        for module in sample.modules():
            for name, parameter in module.named_parameters(recurse=False):
                of = dtype if module in in_blocks else torch.float32
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=of, device="cpu"))
                setattr(module, name, fake)
        tokens = torch.zeros(*shape, dtype=torch.int64, device="cpu")
        is_lower = dtype != torch.float32
        # Copies of weights in another dtype count where backward keeps them: without a cache.
        autocast = torch.autocast("cpu", dtype, enabled=is_lower, cache_enabled=False)
        after: list[int] = []  # bytes, of each block
        with _Alive(sample) as alive, autocast:
            for block in blocks_of(sample):
                block.register_forward_hook(lambda *_: after.append(alive.bytes))
            hidden = sample.hidden_states(tokens)
        each = after[-1] - after[-2] if len(after) > 1 else 0
        return (alive.bytes, each) if hidden.requires_grad else (0, 0)
