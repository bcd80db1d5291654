"""GPT-2 as published: the model, its loss, and its weights from files.

    model = GPT(GPTConfig())                             # 124M parameters, initialized
    _, loss = model(x, y)                                # x, y int64 (B, T)
    model = GPT.from_pretrained("gpt2")                  # OpenAI's weights
    model, checkpoint = load_checkpoint("checkpoints")   # the best checkpoint of a run
    tokens = model.generate(x, max_new_tokens=50, temperature=0.8, top_k=50, seed=1)

Architecture: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); checked
against transformers.GPT2LMHeadModel in tests/test_model.py. Where it differs from the version of
Karpathy's lecture, a comment says why. pretrain/ops.py holds what makes it quick on a processor:
Linear and linear compute what nn.Linear does, linear_cross_entropy what F.cross_entropy does of
the logits, score_head the same without gradients.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.errors import CheckpointError
from pretrain.ops import Linear, linear, linear_cross_entropy, residual, score_head

__all__ = ["GPT", "CheckpointError", "GPTConfig", "KVCache", "load_checkpoint"]


@dataclass
class GPTConfig:
    block_size: int = 1024  # positions: the longest sequence
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms

    def __post_init__(self) -> None:
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError(f"sizes must be positive: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 128, which matrix units like (50,304 instead of
        50,257). Further rows are zeros, take no part in the softmax, get no gradient, are never
        sampled and never exported: the model is GPT-2's exactly."""
        return -(-self.vocab_size // 128) * 128


class KVCache:
    """Keys and values of up to block_size positions, allocated once."""

    def __init__(
        self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype
    ):
        head_dim = config.n_embd // config.n_head
        # Whole from the start: a cache that grew with every token would be copied with every token.
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, n_head, T, head_dim) after the filled positions; return all keys, values of
        layer."""
        end = self.length + k.size(2)
        keys, values = self.data[layer, :, :, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        B, T, C = x.shape
        # One product for all three and for all heads, which are columns of it: (B, T, 3 C).
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1  # a single query comes after all keys
        # FlashAttention where there is one: the (T, T) weights never exist in memory.
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)  # (B, T, 4 * n_embd)
        # Not in the lecture: GELU's output is not kept for the backward pass but computed again,
        # 2 % of the time on a CPU for a fifth of the memory.
        if self.training and torch.is_grad_enabled():
            return checkpoint(self.project, h, use_reentrant=False, preserve_rng_state=False)
        return self.project(h)

    def project(self, h: Tensor) -> Tensor:
        # OpenAI trained with the tanh approximation: the exact GELU would be another model.
        return self.c_proj(F.gelu(h, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        # Norms stand inside the branches: the sum itself goes from embedding to head untouched.
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Parameters are float32; run it under torch.autocast for mixed precision. With
    `gradient_checkpointing` set, blocks compute their activations again in the backward pass
    instead of keeping them: the same gradients with less memory."""

    transformer: Any  # nn.ModuleDict, whose attributes type checkers do not know

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None  # of the sum through the blocks: see ops
        self.head_rows = 0  # tokens whose logits exist at a time; 0: as the device has it
        device = torch.get_default_device()
        # Without torch's own initialization: every number that is drawn is drawn below.
        with torch.device("meta"):
            self.transformer = nn.ModuleDict(
                {
                    # Head and embedding in one. Not in the lecture: no lm_head that shares its
                    # weight; logits() multiplies with wte, so nothing has to be tied or kept tied.
                    "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                    "wpe": nn.Embedding(config.block_size, config.n_embd),
                    "drop": nn.Dropout(config.dropout),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                    "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
                }
            )
        self.to_empty(device=device)
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """N(0, 0.02); the two projections of a block into its residual N(0, 0.02 / sqrt(2
        n_layer))."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            # Each block adds to the residual twice: its variance would grow with the depth.
            narrower = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
            # Padding draws no numbers, so that a seed gives the same weights however wide it is.
            rows = self.config.vocab_size if "wte" in name else None
            parameter[:rows].normal_(0.0, 0.02 / narrower)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for hidden_states(), in the number format of the weights, or of
        autocast."""
        kind, dtype = self.device.type, self.transformer.wte.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return KVCache(self.config, batch_size, self.device, dtype)

    def hidden_states(
        self,
        idx: Tensor,
        position_ids: Tensor | None = None,
        attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx int64 (B, T) -> (B, T, n_embd), after the last LayerNorm.

        position_ids: int64 (T,) or (B, T); by default those after what the cache holds. attn_mask:
        bool, broadcastable to (B, n_head, T, keys), True where a query may attend; by default
        causal. The cache grows by T; T > 1 with a cache that is not empty needs a mask. Raises
        ValueError for more than block_size positions.
        """
        T, start = idx.size(1), cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit into block_size {self.config.block_size}"
            )
        assert T == 1 or start == 0 or attn_mask is not None
        if position_ids is None:
            # The scorer passes its own: it packs several endings of one context into a row.
            position_ids = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position_ids))
        x = residual(x, self.residual_dtype)
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask, cache)
        if cache:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., n_embd) -> (..., vocab_size). The output head is the token embedding."""
        return linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx int64 (B, T) -> (logits (B, T, vocab_size), None); with targets int64 (B, T) ->
        (None, loss).

        loss: mean cross entropy in nats over the targets that are not negative (-1 and -100 are
        left out alike). weights, float (B,) or (B, T), multiply the loss of a sequence or of a
        token and are constants in the backward pass: sum(weights * ce) / count. For (B,) and no
        target left out that is the mean over sequences of weight times mean loss.
        """
        hidden = self.hidden_states(idx)
        if targets is None:
            return self.logits(hidden), None
        if weights is not None:
            weights = weights.view(len(idx), -1).expand(idx.shape).reshape(-1)
        hidden, targets, wte = hidden.flatten(0, 1), targets.flatten(), self.transformer.wte.weight
        # Not in the lecture: logits exist for some rows at a time, not for the whole batch, where
        # they would be the largest thing in memory (16 x 1024 tokens: 3.3 GB in float32).
        return None, linear_cross_entropy(
            hidden, wte, targets, self.config.vocab_size, weights, rows=self.head_rows
        )

    @torch.no_grad()
    def score(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """idx, targets int64 (B, T) -> scalars on their device: sum of losses in nats (float32),
        number of targets that were the likeliest token, number of targets. Negative targets do not
        count."""
        hidden, targets = self.hidden_states(idx).flatten(0, 1), targets.flatten()
        losses, likeliest = score_head(
            hidden, self.transformer.wte.weight, targets, self.config.vocab_size
        )
        return losses.sum(), (likeliest == targets).sum(), (targets >= 0).sum()

    def num_parameters(self) -> int:
        """Parameters of the architecture: without the rows that only pad the vocabulary."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of forward and backward per trained token, 6N + 12LHQT: PaLM (Chowdhery et al.
        2022), appendix B.

        N: parameters without the position table, the token table included since it is the output
        head; L layers of H heads of size Q; T: seq_len (default block_size). Neither recomputation
        nor the causal half of attention is taken into account, as in the MFU figures that others
        publish.
        """
        c = self.config
        n = self.num_parameters() - c.block_size * c.n_embd
        return 6 * n + 12 * c.n_layer * c.n_embd * (seq_len or c.block_size)

    def stream(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **sampling
    ) -> Iterator[Tensor]:
        """Yield the next token of every prompt, int64 (B,): see generation.stream."""
        from pretrain.eval import generation

        return generation.stream(self, prompts, max_new_tokens, **sampling)

    def generate(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **sampling
    ) -> Tensor | list[Tensor]:
        """The prompts, each followed by up to max_new_tokens new tokens: see generation.generate.
        `sampling`: temperature, top_k, top_p, seed, stop_token, slide."""
        from pretrain.eval import generation

        return generation.generate(self, prompts, max_new_tokens, **sampling)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dropout: float = 0.0) -> "GPT":
        """GPT-2 in the layout of Hugging Face, in eval mode on the CPU: "gpt2", "gpt2-medium",
        "gpt2-large", "gpt2-xl", another GPT-2 on the hub, or a folder with config.json and weights;
        also what load_checkpoint takes.

        Raises CheckpointError: no such name, no network, a damaged file, a model that differs from
        GPT-2. Raises OSError: a file that cannot be read.
        """
        from pretrain import models

        return models.from_pretrained(name_or_folder, dropout)

    def huggingface_state_dict(self) -> dict[str, Tensor]:
        """The weights as transformers.GPT2LMHeadModel names and orients them, without padding rows;
        biases that this model does not have are zeros. lm_head.weight shares its memory with the
        embedding."""
        from pretrain import layouts

        return layouts.to_huggingface(self.state_dict(), self.config.vocab_size)


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """A checkpoint of train_gpt2.py as (model in eval mode on `device`, the checkpoint): a GPT, or
    the architecture that it names. path: a file, or the folder of a run (its best checkpoint).

    The checkpoint's tensors are on the CPU, mapped from the file. Others' files do as well: of
    nanoGPT, build-nanogpt and llm.c, a bare state dict; prefixes of DDP and torch.compile go.
    Nothing in the file is executed. Raises CheckpointError: file missing, damaged, hostile or of
    another kind; OSError: a file that cannot be read.
    """
    from pretrain import models

    model, saved = models.load(path)
    return model.to(device), saved
