"""AdamW as models of GPT-2's kind are trained with it: weight decay on matrices only, and one fused
kernel.

optimizer = make_optimizer(model, learning_rate=6e-4, weight_decay=0.1, betas=(0.9, 0.95))
"""

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings (two dimensions or more), which decay, and biases and norms, which do
    not; both in the order of model.parameters(), so that a saved state fits any model of the same
    configuration."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over parameter_groups(), fused where torch has the kernel. On a CPU that is one pass
    over the weights instead of a dozen, several times as fast, with the same result but for
    rounding."""
    groups = parameter_groups(model, weight_decay)
    kinds = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, fused=kinds <= {"cuda", "cpu", "mps"}
    )
