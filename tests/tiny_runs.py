"""Runs of seconds for the tests of the adapters: shards, flags, and the plain loop they must agree
with."""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from pretrain.tokens.shards import find_shards
from pretrain.train.loader import ShardLoader, TokenWindows
from pretrain.train.optim import learning_rate

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
SETTINGS = SIZES | {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_iters": 4,
    "learning_rate": 0.01,
    "min_lr": 0.001,
    "warmup_iters": 1,
    "lr_decay_iters": 4,
    "eval_interval": 2,
    "eval_iters": 3,
    "log_interval": 1,
    "dtype": "float32",
    "seed": 3,
}
VAL_WINDOWS = 5  # not a multiple of the batch size: the last batch is a small one


def write_shards(folder, *, train_tokens=2000):
    """Two train shards and a val shard of tokens that are worth learning: few are frequent."""
    random = np.random.default_rng(0)
    tokens = (random.zipf(1.3, train_tokens + VAL_WINDOWS * 16 + 1) % 50257).astype("<u2")
    val, train = np.split(tokens, [VAL_WINDOWS * 16 + 1])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tiny_val_000000.npy", val)
    np.save(folder / "tiny_train_000001.npy", train[: train_tokens // 3])
    np.save(folder / "tiny_train_000002.npy", train[train_tokens // 3 :])
    return folder


def flags(data_dir, out_dir, **changes):
    """SETTINGS with changes as a command line; data_dir None for runs on text."""
    settings = (
        SETTINGS | {"out_dir": out_dir} | ({"data_dir": data_dir} if data_dir else {}) | changes
    )
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def initial_model(**changes):
    torch.manual_seed(SETTINGS["seed"])
    return GPT(GPTConfig(**SIZES | changes))


def plain_loop(data_dir, steps=4, accumulation=2):
    """(loss of each step, validation loss after the last) of SETTINGS, with torch, the batches of
    ShardLoader and the formula of the schedule."""
    model = initial_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader = ShardLoader(
        find_shards(data_dir, "train"),
        batch_size=2,
        block_size=16,
        accumulation_steps=accumulation,
        seed=3,
    )
    losses = []
    for step in range(steps):
        x, y = (part.reshape(-1, 16) for part in loader.batch(step))
        loss = F.cross_entropy(model(x)[0].transpose(1, 2), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, max_lr=0.01, min_lr=0.001, warmup_iters=1, lr_decay_iters=4
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, validation_loss(model, data_dir)


@torch.no_grad()
def validation_loss(model, data_dir):
    windows = TokenWindows(find_shards(data_dir, "val"), block_size=16)
    tokens = torch.from_numpy(windows.read(np.arange(VAL_WINDOWS)).astype(np.int64))
    logits = model(tokens[:, :-1])
    logits = logits[0] if isinstance(logits, tuple) else logits.logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]).item()


def logged(out_dir, event="train", name="loss"):
    """{step: value} of the metrics.jsonl in out_dir."""
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r[name] for r in records if r["event"] == event}
    assert all(math.isfinite(value) for value in found.values())
    return found
