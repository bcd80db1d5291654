"""The fast recipe's model: GPT-2's validation loss for a sixth of the tokens.

    model = Modern(ModernConfig())                                      # 12 x 768, as GPT-2 124M
    _, loss = model(x, y)                                               # x, y int64 (B, T)
    optimizer = make_optimizer(model, name="muon", learning_rate=MUON_RATE, ...)

Used like model.GPT, of which it has every method that training, scoring and generation call. What
differs from GPT-2, and from where it comes: the public record of "train GPT-2 124M to a validation
loss of 3.28" (modded-nanogpt, optimizer track, 2026), whose simplest model this is.

- Positions turn queries and keys (rotary) instead of being added to the embedding.
- RMSNorm instead of LayerNorm, also behind the embedding and over queries and keys.
- ReLU squared instead of GELU; heads of 128 dimensions instead of 64.
- The output head is a matrix of its own, and its logits are softly capped at 15.
- Each branch and the head begin at zero: at the start the model is its embedding alone, its loss
  is log(vocab_size), and no update has to undo what chance put there.

Its weights have no counterpart among Hugging Face's models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import CheckpointError, GPTConfig, KVCache
from pretrain.ops import Linear, linear, linear_cross_entropy, residual, score_head, soft_capped

HEAD_DIM = 128
SOFT_CAP = 15.0
ATTENTION_SCALE = 0.12  # a little above 1/sqrt(128): normed queries and keys cannot grow instead
ROTARY_BASE = 1024.0  # the slowest pair turns by 1 radian in so many tokens
INIT_VARIANCE = 0.33  # times fan_in: torch's default for a linear layer, but normal
EPS = torch.finfo(torch.float32).eps  # said, since torch's own default depends on the dtype

# The record's learning rates at width 768. Muon's is the one that --learning_rate states; the
# others follow it in proportion.
MUON_RATE, EMBED_RATE, HEAD_RATE, VECTOR_RATE = 0.025, 0.7, 0.004, 0.015
VALUE_RATE = 0.35  # of the tables of values, which the record's simplest model has not: tried here
TUNED_WIDTH = 768


@dataclass
class ModernConfig(GPTConfig):
    n_head: int = 6
    value_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise ValueError(
                f"n_embd {self.n_embd} / n_head {self.n_head} = {self.head_dim} dimensions a head"
                f" are not a multiple of 4, which rotary positions need; {HEAD_DIM} are usual"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def has_value_embedding(self, layer: int) -> bool:
        """Every second block, the last of them in any case."""
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (..., T, 1, head_dim / 4), of positions (..., T).

    A pair of dimensions turns by base^-i radians a token, i from 0 to 1 (RoFormer, Su et al. 2021).
    Computed anew in every pass: 32 numbers a position, and no buffer to save, move or outgrow.
    """
    exponents = torch.linspace(0, 1, head_dim // 4, device=positions.device)
    angles = positions.float()[..., None, None] * ROTARY_BASE**-exponents
    return angles.cos(), angles.sin()


def normed_and_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, n_head, head_dim) at RMS 1, its first and third quarter turned as pairs, in float32.

    The other half stays: dimensions that know content only, at any distance.
    """
    a, still_a, b, still_b = F.rms_norm(x.float(), x.shape[-1:], eps=EPS).chunk(4, dim=-1)
    return torch.cat((a * cos + b * sin, still_a, b * cos - a * sin, still_b), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModernConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        # Three matrices, not one of three times the rows: Muon orthogonalizes each by itself.
        self.q = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.v = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        value: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if value is not None:
            v = v + value.to(v.dtype)
        q, k, v = (t.view(B, T, self.n_head, -1) for t in (q, k, v))
        q, k = (normed_and_rotated(t, *turn).to(v.dtype) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, n_head, T, head_dim)
        if cache is not None:  # keys are kept as turned: only distances matter afterwards
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1  # a single query comes after all keys
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=ATTENTION_SCALE)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """ReLU squared (So et al. 2021, "Primer"). In training it is computed again in backward, as
    GELU is in model.GPT: of the two largest tensors of a block one is kept."""

    def __init__(self, config: ModernConfig):
        super().__init__()
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.training and torch.is_grad_enabled():
            return checkpoint(self.project, h, use_reentrant=False, preserve_rng_state=False)
        return self.project(h)

    def project(self, h: Tensor) -> Tensor:
        return self.proj(h.relu().square())


class Block(nn.Module):
    def __init__(self, config: ModernConfig, layer: int):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, eps=EPS)
        self.attn = Attention(config, layer)
        self.norm_2 = nn.RMSNorm(config.n_embd, eps=EPS)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        value: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        x = x + self.drop(self.attn(self.norm_1(x), turn, value, mask, cache))
        return x + self.drop(self.mlp(self.norm_2(x)))


class Modern(nn.Module):
    """Parameters are float32; run it under torch.autocast for mixed precision. With
    `gradient_checkpointing` set, blocks compute their activations again in the backward pass
    instead of keeping them: the same gradients with less memory."""

    def __init__(self, config: ModernConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None  # as of model.GPT
        self.head_rows = 0
        device = torch.get_default_device()
        with torch.device("meta"):  # every number is drawn below, none by torch's initialization
            self.embed = nn.Embedding(config.vocab_size, config.n_embd)
            self.norm_in = nn.RMSNorm(config.n_embd, eps=EPS)
            self.drop = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            # What a token adds to its value, whatever came before it: tables beside the embedding.
            self.values = nn.ModuleDict(
                {
                    str(layer): nn.Embedding(config.vocab_size, config.n_embd)
                    for layer in range(config.n_layer)
                    if config.has_value_embedding(layer)
                }
            )
            self.norm_out = nn.RMSNorm(config.n_embd, eps=EPS)
            # Rows are padded for the matrix units, as model.GPT's are; further rows stay zero.
            self.head = Linear(config.n_embd, config.padded_vocab_size, bias=config.bias)
        self.to_empty(device=device)
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """The embedding N(0, 1), whose scale the norm behind it takes away; what writes to the
        residual stream, the head and biases 0; other matrices N(0, 0.33 / fan_in); gains 1."""
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "bias")) or name.startswith(("head.", "values.")):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name == "embed.weight":
                parameter.normal_()
            else:
                parameter.normal_(0.0, math.sqrt(INIT_VARIANCE / parameter.size(1)))

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for hidden_states(), in the dtype of the weights, or of autocast."""
        kind, dtype = self.device.type, self.embed.weight.dtype
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
        """idx int64 (B, T) -> (B, T, n_embd), after the last norm. Arguments as of model.GPT:
        position_ids int64 (T,) or (B, T), by default those after what the cache holds; attn_mask
        bool, broadcastable to (B, n_head, T, keys), by default causal; the cache grows by T.

        Raises ValueError for more than block_size positions: longer contexts than it was trained
        with it could compute, but not use.
        """
        T, start = idx.size(1), cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit into block_size {self.config.block_size}"
            )
        assert T == 1 or start == 0 or attn_mask is not None
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=idx.device)
        turn = rotation(position_ids, self.config.head_dim)
        x = residual(self.drop(self.norm_in(self.embed(idx))), self.residual_dtype)
        for layer, block in enumerate(self.blocks):
            has_value = self.config.has_value_embedding(layer)
            value = self.values[str(layer)](idx) if has_value else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, turn, value, attn_mask, use_reentrant=False)
            else:
                x = block(x, turn, value, attn_mask, cache)
        if cache:
            cache.length += T
        return self.norm_out(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., n_embd) -> float32 (..., vocab_size), between -15 and 15."""
        logits = linear(hidden, self.head.weight, self.head.bias)[..., : self.config.vocab_size]
        return soft_capped(logits.float(), SOFT_CAP)

    def _head(self) -> dict[str, Any]:
        """The head as pretrain.ops takes it."""
        bias = None if self.head.bias is None else self.head.bias[: self.config.vocab_size]
        return {"bias": bias, "soft_cap": SOFT_CAP}

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx int64 (B, T) -> (logits (B, T, vocab_size), None); with targets int64 (B, T) ->
        (None, loss): the mean cross entropy in nats over the targets that are not negative, with
        weights (B,) or (B, T) sum(weights * ce) / count, as of model.GPT."""
        hidden = self.hidden_states(idx)
        if targets is None:
            return self.logits(hidden), None
        if weights is not None:
            weights = weights.view(len(idx), -1).expand(idx.shape).reshape(-1)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        return None, linear_cross_entropy(
            hidden,
            self.head.weight,
            targets,
            self.config.vocab_size,
            weights,
            rows=self.head_rows,
            **self._head(),
        )

    @torch.no_grad()
    def score(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """idx, targets int64 (B, T) -> scalars: sum of losses in nats (float32), number of targets
        that were the likeliest token, number of targets. Negative targets do not count."""
        hidden, targets = self.hidden_states(idx).flatten(0, 1), targets.flatten()
        losses, likeliest = score_head(
            hidden, self.head.weight, targets, self.config.vocab_size, **self._head()
        )
        return losses.sum(), (likeliest == targets).sum(), (targets >= 0).sum()

    def num_parameters(self) -> int:
        """Parameters of the architecture: without the rows that only pad the head."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        per_row = self.config.n_embd + self.config.bias
        return sum(p.numel() for p in self.parameters()) - padding * per_row

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of forward and backward per trained token, 6N + 12LHQT: PaLM (Chowdhery et al.
        2022), appendix B.

        N: parameters without the embeddings, which are looked up and multiply nothing; the head,
        a matrix of its own, counts. Muon's work is per update, not per token, and not in it.
        """
        c = self.config
        n = self.num_parameters() - sum(table.numel() for table in self.tables())
        return 6 * n + 12 * c.n_layer * c.n_embd * (seq_len or c.block_size)

    def tables(self) -> list[Tensor]:
        """Weights of which a token takes a row: the embedding, and those of values."""
        return [self.embed.weight, *self.values.parameters()]

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Which optimizer updates what, and at which rate beside Muon's: see optim.muon().

        Muon fits maps between spaces, the matrices of the blocks. The embedding is a table, of
        which a batch changes some rows, and takes 28 times the rate; the head's rate is a sixth of
        it, gains and biases stand between. The best rate of Adam falls with the width, about as its
        root; Muon's does not, since its updates are measured by what they do to a vector.
        """
        by_width = math.sqrt(TUNED_WIDTH / self.config.n_embd)
        adamw = {"optimizer": "adamw", "eps": 1e-10, "weight_decay": 0.001}
        vectors = [p for p in self.parameters() if p.dim() < 2]
        matrices = [p for p in self.blocks.parameters() if p.dim() >= 2]
        return [
            {"params": matrices, "optimizer": "muon"},
            *(
                adamw | {"params": params, "lr_scale": by_width * rate / MUON_RATE}
                for params, rate in (
                    ([self.embed.weight], EMBED_RATE),
                    (list(self.values.parameters()), VALUE_RATE),
                    ([self.head.weight], HEAD_RATE),
                    (vectors, VECTOR_RATE),
                )
                if params
            ),
        ]

    def huggingface_state_dict(self) -> dict[str, Tensor]:
        """Raises CheckpointError: transformers has no such model."""
        raise CheckpointError(
            "a modern model has no Hugging Face counterpart, so that it cannot be exported;"
            " sample.py, hellaswag.py and train_gpt2.py --init_from take its checkpoint as it is"
        )

    def stream(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **sampling
    ) -> Iterator[Tensor]:
        """Yield the next token of every prompt, int64 (B,): see generation.stream."""
        from pretrain.eval import generation

        return generation.stream(self, prompts, max_new_tokens, **sampling)

    def generate(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **sampling
    ) -> Tensor | list[Tensor]:
        """The prompts with up to max_new_tokens new tokens behind each: see generation.generate."""
        from pretrain.eval import generation

        return generation.generate(self, prompts, max_new_tokens, **sampling)
