"""The loop to compare with: GPT-2 as nanoGPT's train.py trains it, in its own settings.

    step = plain_step(config, batch_size=16, micro_steps=4, shards=folder, device=device)
    loss = step()                                   # one update

What makes nanoGPT fast is all here: torch.compile, bfloat16 autocast, TF32, FlashAttention through
scaled_dot_product_attention, fused AdamW, a vocabulary of 50,304, no biases, pinned memory and a
copy beside the computation, logits and cross entropy of all tokens at once. Written anew after
github.com/karpathy/nanoGPT (MIT).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PlainConfig:
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50304


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Block(nn.Module):
    def __init__(self, config: PlainConfig):
        super().__init__()
        width, self.n_head = config.n_embd, config.n_head
        self.norm_1, self.norm_2 = Norm(width), Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    def __init__(self, config: PlainConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                narrow = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layer) if narrow else 0.02
                nn.init.normal_(parameter, 0.0, std)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(idx.size(1), device=idx.device)
        x = self.tokens(idx) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def plain_step(
    config: PlainConfig,
    *,
    batch_size: int,
    micro_steps: int,
    shards: Path,
    device: torch.device,
    compiler: Callable | None,
) -> Callable[[], float]:
    """A function that makes one update and returns its loss."""
    torch.manual_seed(1337)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    model = PlainGPT(config).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=fused)
    forward = compiler(model) if compiler else model
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    data = np.load(next(shards.glob("*_train_*.npy")), mmap_mode="r")
    T = config.block_size

    def get_batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - T - 1, (batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        )
        if device.type != "cuda":
            return x.to(device), y.to(device)
        return (
            x.pin_memory().to(device, non_blocking=True),
            y.pin_memory().to(device, non_blocking=True),
        )

    batch = get_batch()

    def step() -> float:
        nonlocal batch
        for _ in range(micro_steps):
            with autocast:
                loss = forward(*batch) / micro_steps
            batch = get_batch()  # while the GPU computes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() * micro_steps

    return step
