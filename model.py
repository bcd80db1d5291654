"""GPT-2 as published, in one file: training, generation, and weights to and from the Hugging Face layout.

    from model import GPT, GPTConfig, load_checkpoint
    model = GPT(GPTConfig())                      # 124M parameters, N(0, 0.02); GPT.from_pretrained("gpt2") for OpenAI's
    _, loss = model(x, y)                         # training: x, y int64 (B, T)
    tokens = model.generate(x, max_new_tokens=50, temperature=0.8, top_k=50, seed=1)

Architecture: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); checked against
transformers.GPT2LMHeadModel in tests/test_model.py. Output head and token embedding are one tensor. It has a multiple
of 128 rows, for the sake of the matrix units; the rows past vocab_size are zeros, get no gradient, take no part in the
softmax, are never sampled and never leave this file.
"""

import contextlib
import json
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute


class CheckpointError(RuntimeError):
    """A file, folder or name that does not give a model; the message is one line for the user."""


@dataclass
class GPTConfig:
    block_size: int = 1024  # positions, the longest sequence
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms, as GPT-2 has them

    def __post_init__(self) -> None:
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError(f"all sizes must be positive: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 128) * 128


class KVCache:
    """Keys and values of up to block_size positions, (n_layer, 2, B, n_head, block_size, head_dim), allocated once."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, n_head, T, head_dim) after the filled positions; return all there are now."""
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attn_mask is None and T > 1,
        )  # fmt: skip
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), attn_mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i scale_i * cross_entropy(hidden_i @ weight.T, target_i), a chunk of rows at a time.

    The gradient of a chunk's logits is formed while they are at hand (softmax - one_hot), so backward has only to
    multiply by the incoming scalar. It is of order 1 whatever the loss scale, which keeps it representable in fp16.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, vocab_size, dtype, chunk_rows):
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        loss = hidden.new_zeros((), dtype=torch.float32)
        w = weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in range(0, hidden.size(0), chunk_rows):
                part = slice(rows, rows + chunk_rows)
                h, target, s = hidden[part].to(dtype), targets[part, None], scale[part, None]
                log_probs = _log_probs(h, w, vocab_size)  # float32 (rows, padded vocabulary)
                at_target = log_probs.gather(1, target)
                loss -= (at_target * s).sum()
                d_logits = log_probs.exp_().to(dtype)
                d_logits.scatter_(1, target, at_target.expm1().to(dtype))  # p - 1 at the target
                d_hidden[part] = (d_logits @ w) * s
                d_weight += d_logits.t() @ (h * s).to(dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None, None, None, None


def _log_probs(h: Tensor, w: Tensor, vocab_size: int) -> Tensor:
    logits = h @ w.t()
    logits[:, vocab_size:] = -torch.inf
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, weights: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of `hidden @ weight[:vocab_size].T` without holding all logits at once.

    hidden (N, C), weight (padded vocabulary, C), targets int64 (N,), negative ones are left out of sum and count (-1
    and -100 alike); weights (N,) multiply each target's loss and are constants: loss = sum(w_i * ce_i) / count.
    Like F.cross_entropy it is NaN when every target is left out. Returns a float32 scalar.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    counted = targets >= 0
    scale = counted / counted.sum()
    if weights is not None:
        scale = scale * weights
    chunk_rows = 1024 if device == "cpu" else 8192
    return _LinearCrossEntropy.apply(
        hidden, weight, targets.clamp(min=0), scale, vocab_size, dtype, chunk_rows
    )


class GPT(nn.Module):
    """Weights are float32; run under torch.autocast for mixed precision. Set `gradient_checkpointing` to recompute
    each block's activations in the backward pass instead of keeping them: less memory, the same gradients."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """N(0, 0.02); the two projections into the residual stream of each block by 1/sqrt(2 n_layer) narrower."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:  # LayerNorm weights stay 1
                narrow = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                parameter[: self.config.vocab_size if "wte" in name else None].normal_(0.0, 0.02 / narrow)
        self.transformer.wte.weight[self.config.vocab_size :].zero_()

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def hidden_states(
        self,
        idx: Tensor,
        position_ids: Tensor | None = None,
        attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx int64 (B, T) -> (B, T, n_embd) after the last LayerNorm.

        position_ids: int64 (T,) or (B, T), default 0..T-1 after what the cache holds. attn_mask: bool broadcastable to
        (B, n_head, T, keys), True where a query may attend, default causal. With a cache, T > 1 needs an empty one.
        """
        T, start = idx.size(1), cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens, but block_size is {self.config.block_size}")
        assert T == 1 or start == 0 or attn_mask is not None
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position_ids))
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = recompute(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask, cache)
        if cache:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., n_embd) -> (..., vocab_size)."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx int64 (B, T). Without targets: (logits (B, T, vocab_size), None). With targets int64 (B, T): (None, loss),
        the mean cross entropy over the targets that are not negative.

        weights, float (B,) or (B, T), multiply the loss of each sequence or token: loss = sum(w * ce) / count, so that
        for (B,) it is the mean over sequences of w_b times their mean loss.
        """
        hidden = self.hidden_states(idx)
        if targets is None:
            return self.logits(hidden), None
        if weights is not None:
            weights = (weights[:, None] if weights.dim() == 1 else weights).expand(idx.shape).reshape(-1)
        wte = self.transformer.wte.weight
        loss = linear_cross_entropy(
            hidden.view(-1, hidden.size(-1)), wte, targets.reshape(-1), self.config.vocab_size, weights
        )
        return None, loss

    @torch.no_grad()
    def score(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """idx, targets int64 (B, T) -> sum of losses (float64), targets predicted right, targets counted (int64),
        on the model's device. Negative targets do not count. Only a chunk of logits is held at a time."""
        hidden = self.hidden_states(idx).view(-1, self.config.n_embd)
        targets = targets.reshape(-1)
        loss = torch.zeros((), dtype=torch.float64, device=idx.device)
        correct = torch.zeros((), dtype=torch.int64, device=idx.device)
        for h, target in zip(hidden.split(1024), targets.split(1024), strict=True):
            logits = self.logits(h).float()
            loss += F.cross_entropy(logits, target.clamp(min=-1), ignore_index=-1, reduction="sum")
            correct += (logits.argmax(-1) == target).sum()
        return loss, correct, (targets >= 0).sum()

    def num_parameters(self) -> int:
        """Parameters of the architecture: without the rows that only pad the vocabulary."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Model FLOPs of forward and backward per trained token: 6N + 12 L H Q T (PaLM, Chowdhery et al. 2022,
        appendix B), N all parameters but the position table (the token table counts: it is the output head), L layers,
        H heads of size Q, T = seq_len (default block_size). Recomputation does not count, nor does causality halve the
        attention term: the convention behind published MFU figures."""
        c = self.config
        n = self.num_parameters() - c.block_size * c.n_embd
        return 6 * n + 12 * c.n_layer * c.n_embd * (seq_len or c.block_size)

    @torch.no_grad()
    def stream(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token: int | None = None,
        slide: int = 1,
    ) -> Iterator[Tensor]:
        """Yield the next token of every prompt, int64 (B,), up to max_new_tokens times.

        prompts: int64 (B, T) or (T,), or a list of 1-D tensors of any lengths. temperature 0 is greedy; top_k keeps the
        k most likely tokens, top_p the smallest set of most likely tokens whose probabilities reach p. Sampling has a
        generator of its own, seeded with `seed` (None: differently each time); the global one is not touched. A row
        that has produced stop_token repeats it, and the stream ends when every row has.

        Past block_size tokens the context is the last block_size ones. GPT-2's positions are absolute, so a context
        that moved must be computed anew: at every token with slide=1, which equals recomputing everything without a
        cache; slide=k drops k tokens at a time and computes anew every k tokens, faster with a shorter context.
        """
        tokens, padding = _left_pad(prompts, self.device)
        _check_sampling(temperature, top_k, top_p, slide, self.config.block_size)
        generator = torch.Generator(self.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=self.device)
        start, cache = 0, None
        for _ in range(max_new_tokens):
            if tokens.size(1) - start > self.config.block_size:
                start, cache = tokens.size(1) - self.config.block_size + slide - 1, None
            logits, cache = self._next_logits(tokens[:, start:], (padding - start).clamp(min=0), cache)
            token = _sample(logits.float(), temperature, top_k, top_p, generator)
            if stop_token is not None:
                token = token.masked_fill(finished, stop_token)
                finished |= token == stop_token
            yield token
            if stop_token is not None and finished.all():
                return
            tokens = torch.cat((tokens, token[:, None]), dim=1)

    def generate(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **sampling
    ) -> Tensor | list[Tensor]:
        """Prompts followed by up to max_new_tokens new tokens each; `sampling` as in stream().

        For a tensor, int64 (B, T + new), rows that stopped early filled up with stop_token. For a list, a list of 1-D
        tensors, each ending with its stop_token if it produced one.
        """
        new = list(self.stream(prompts, max_new_tokens, **sampling))
        if isinstance(prompts, Tensor):
            prompts = prompts.to(self.device)
            return torch.cat((prompts, *(t[:, None] if prompts.dim() == 2 else t for t in new)), dim=-1)
        new = torch.stack(new, dim=1) if new else torch.empty((len(prompts), 0), dtype=torch.int64)
        rows = [torch.cat((prompt.to(self.device), row)) for prompt, row in zip(prompts, new, strict=True)]
        stop = sampling.get("stop_token")
        return (
            rows
            if stop is None
            else [_cut_after(row, stop, len(p)) for row, p in zip(rows, prompts, strict=True)]
        )

    def _next_logits(self, tokens: Tensor, padding: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        """Logits (B, vocab_size) after tokens (B, n), whose first padding[b] tokens do not exist; with a cache only the
        last token is computed."""
        n = tokens.size(1)
        padded = bool(padding.any())
        query = tokens if cache is None else tokens[:, -1:]
        positions = (torch.arange(n, device=tokens.device) - padding[:, None]).clamp(min=0)[
            :, -query.size(1) :
        ]
        mask = None
        if padded:
            key = torch.arange(n, device=tokens.device)
            at = key[-query.size(1) :, None]
            # A query in the padding attends to itself: a row without keys would be NaN, and spread.
            mask = (key <= at) & (key >= padding[:, None, None]) | (key == at)
            mask = mask[:, None]
        with _evaluating(self):
            if cache is None:
                dtype = self.transformer.wte.weight.dtype
                if torch.is_autocast_enabled(tokens.device.type):
                    dtype = torch.get_autocast_dtype(tokens.device.type)
                cache = KVCache(self.config, len(tokens), tokens.device, dtype)
            hidden = self.hidden_states(query, positions, mask, cache)
            return self.logits(hidden[:, -1]), cache

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dropout: float = 0.0) -> "GPT":
        """GPT-2 weights in the Hugging Face layout: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", any GPT-2 on the
        hub, or a local folder with config.json and model.safetensors or pytorch_model.bin. In eval mode, on the CPU.

        Raises CheckpointError for a name that does not exist, no network, a damaged file, or a model that is not GPT-2.
        """
        config_file, weights_file = _find_pretrained(name_or_folder)
        config = _config_from_huggingface(json.loads(Path(config_file).read_text()), name_or_folder, dropout)
        if str(weights_file).endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(weights_file)
        else:
            state = _torch_load(weights_file)
        return _build(config, _from_huggingface(state), name_or_folder)

    def huggingface_state_dict(self) -> dict[str, Tensor]:
        """The weights as transformers.GPT2LMHeadModel keeps them: Conv1D orientation (in, out), no padded rows, zeros
        for absent biases, lm_head.weight sharing memory with the embedding."""
        state = {}
        for key, value in self.state_dict().items():
            state[key] = value.t().contiguous() if key.endswith(_CONV1D) else value
            if not self.config.bias and key.startswith(("transformer.h", "transformer.ln_f")):
                out_features = value.size(0)
                state[key.removesuffix("weight") + "bias"] = value.new_zeros(out_features)
        wte = state["transformer.wte.weight"][: self.config.vocab_size]
        return state | {"transformer.wte.weight": wte, "lm_head.weight": wte}


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict[str, Any]]:
    """A training checkpoint as (model in eval mode on `device`, the checkpoint dict on the CPU, mapped from the file).

    Also reads nanoGPT's checkpoints, and drops the prefixes that DDP and torch.compile leave in keys. Nothing in the
    file is executed. Raises CheckpointError when the file is missing, damaged, hostile, or of another kind.
    """
    checkpoint = _torch_load(path)
    kind = checkpoint if isinstance(checkpoint, Mapping) else {}
    settings = kind.get("model_config") or kind.get("model_args")
    if not isinstance(settings, Mapping) or not isinstance(kind.get("model"), Mapping):
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt2.py (it has no model and model_config)")
    try:
        config = GPTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model_config does not describe a GPT: {error}") from None
    return _build(config, checkpoint["model"], path).to(device), checkpoint


_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys and orientation. Files differ in whether keys begin with "transformer."; all four matrices of a block
    are transposed, the square one too."""
    state = {
        k if k.startswith(("transformer.", "lm_head.")) else "transformer." + k: v for k, v in state.items()
    }
    return {k: v.t() if k.endswith(_CONV1D) else v for k, v in state.items()}


def _find_pretrained(name_or_folder: str | Path) -> tuple[Path, Path]:
    """config.json and the weights file of a local folder, or of a name on the hub (downloaded into its cache)."""
    files = ("model.safetensors", "pytorch_model.bin")
    folder = Path(name_or_folder)
    if folder.is_dir():
        found = [folder / name for name in files if (folder / name).is_file()]
        if not found or not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: expected config.json and one of {' or '.join(files)} in it")
        return folder / "config.json", found[0]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo = str(name_or_folder)
    try:
        config = hf_hub_download(repo, "config.json")
        try:
            return Path(config), Path(hf_hub_download(repo, files[0]))
        except EntryNotFoundError:
            return Path(config), Path(hf_hub_download(repo, files[1]))
    except LocalEntryNotFoundError:
        problem = "no such folder, and the Hugging Face hub cannot be reached (network? HF_ENDPOINT? HF_HUB_OFFLINE?)"
    except RepositoryNotFoundError:
        problem = "no such folder, and no such model on the Hugging Face hub (or it needs a login)"
    except (OSError, ValueError, EntryNotFoundError) as error:
        problem = f"no such folder, and the Hugging Face hub does not have it: {_first_line(error)}"
    raise CheckpointError(f"{repo}: {problem}")


def _config_from_huggingface(hf: Mapping[str, Any], source: str | Path, dropout: float) -> GPTConfig:
    """GPTConfig from a config.json of GPT-2; what this file does not implement is refused rather than ignored."""
    supported = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * hf.get("n_embd", 768)),
    }
    wrong = [f"{key}={hf[key]!r}" for key, values in supported.items() if key in hf and hf[key] not in values]
    if wrong:
        raise CheckpointError(f"{source}: not the GPT-2 implemented here: {', '.join(wrong)} in config.json")
    sizes = {ours: hf[key] for ours, key in _HUGGINGFACE_SIZES.items() if key in hf}
    return GPTConfig(**sizes, dropout=dropout)


_HUGGINGFACE_SIZES = {
    "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"
}  # fmt: skip


def _build(config: GPTConfig, state: Mapping[str, Tensor], source: str | Path) -> GPT:
    """A model in eval mode with these weights; neither initialised nor drawing random numbers first."""
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}
    wte, head = state.get("transformer.wte.weight"), state.pop("lm_head.weight", None)
    if wte is None:
        raise CheckpointError(f"{source}: no transformer.wte.weight among its {len(state)} tensors")
    if head is not None and not torch.equal(head, wte):
        raise CheckpointError(f"{source}: its output head is not tied to its embedding, as GPT-2's is")
    # Causal masks that old files carry as buffers.
    state = {
        key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))
    }
    state["transformer.wte.weight"] = F.pad(wte, (0, 0, 0, max(0, config.padded_vocab_size - len(wte))))
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.to_empty(device="cpu").load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).split("\n\t")
        raise CheckpointError(f"{source}: its weights do not fit its configuration: {lines[-1]}") from None
    return model.eval()


def _torch_load(path: str | Path) -> Any:
    """torch.load that executes nothing from the file, with one-line errors."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or it holds more than tensors and plain values, which is refused because loading it"
            f" could run code: {_first_line(error)}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode of before afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _left_pad(prompts: Tensor | Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one int64 (B, T) on the device, and how many tokens of each row are padding on the left, (B,)."""
    rows = [prompts] if isinstance(prompts, Tensor) and prompts.dim() == 1 else list(prompts)
    if not rows or min(len(row) for row in rows) == 0:
        raise ValueError(
            "a prompt needs at least one token; begin with the end-of-text token where there is none"
        )
    length = max(len(row) for row in rows)
    tokens = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    return tokens.to(device), torch.tensor([length - len(row) for row in rows], device=device)


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, slide: int, block_size: int
) -> None:
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1 (None: all tokens)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]")
    if not 1 <= slide <= block_size:
        raise ValueError(f"slide {slide} is not between 1 and block_size {block_size}")


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Logits (B, vocab_size) -> tokens (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more likely tokens hold together
        probs = torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _cut_after(row: Tensor, stop_token: int, prompt_length: int) -> Tensor:
    """The row up to the first stop_token after its prompt, that token included."""
    stops = (row[prompt_length:] == stop_token).nonzero()
    return row[: prompt_length + int(stops[0]) + 1] if len(stops) else row
