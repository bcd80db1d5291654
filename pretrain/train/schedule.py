"""The learning rate as a function of the step: linear warmup, cosine decay, then constant.

>>> learning_rate(2000, max_lr=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600_000)
0.0006
"""

import math


def learning_rate(
    step: int, *, max_lr: float, min_lr: float, warmup_iters: int, lr_decay_iters: int
) -> float:
    """Learning rate of the update that turns step `step` into `step + 1`; the first update is step
    0.

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
