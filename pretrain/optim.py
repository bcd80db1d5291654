"""AdamW as GPT-2-sized models are trained with it: weight decay on matrices only, one fused kernel where there is one.

optimizer = make_optimizer(model, learning_rate=6e-4, weight_decay=0.1, betas=(0.9, 0.95))
"""

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and embeddings (dim >= 2) decay, biases and LayerNorm weights do not. Order of parameters
    within a group is that of model.named_parameters(), so optimizer states fit any model of the same configuration."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over parameter_groups(), fused when all parameters are float32 on one device that has the kernel."""
    groups = parameter_groups(model, weight_decay)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = len(devices) == 1 and devices <= {"cuda", "cpu", "mps"}
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
