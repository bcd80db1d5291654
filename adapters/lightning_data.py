"""Shards or raw text for Lightning, read in train_gpt2.py's order and resumed where training
stopped.

data = LLMDataModule("data/input", batch_size=8, block_size=1024, accumulation_steps=5)
data = LLMDataModule(text=["input.txt"], batch_size=8, block_size=128)
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from adapters import common
from adapters.hf_tokenizer import build_tokenizer


class PositionSampler(DistributedSampler):
    """This rank's positions in training order, dealt out batch by batch as ShardLoader does.

    A DistributedSampler, so that Lightning leaves it as it is. An epoch has a whole number of
    updates; the next one goes on where it ended, as positions are counted through all epochs.
    """

    def __init__(
        self,
        windows: common.Windows,
        *,
        batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        start: int = 0,
    ):
        """start: batches of the first epoch that are left out, those that were trained on before a
        stop."""
        super().__init__(windows, num_replicas=world_size, rank=rank, shuffle=False)
        self.batch_size, self.start = batch_size, start
        updates = max(1, len(windows) // (accumulation_steps * batch_size * world_size))
        self.batches = updates * accumulation_steps  # per rank and epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first, self.start = self.start, 0
        for batch in range(self.epoch * self.batches + first, (self.epoch + 1) * self.batches):
            position = (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(position, position + self.batch_size)


class ShareSampler(DistributedSampler):
    """This rank's share of a validation set, every sample once over all ranks. DistributedSampler
    itself repeats samples to make the shares equal, which changes the mean."""

    def __init__(self, windows: common.Windows, *, rank: int, world_size: int):
        super().__init__(windows, num_replicas=world_size, rank=rank, shuffle=False)
        self.share = range(rank, len(windows), world_size)

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)


class LLMDataModule(LightningDataModule):
    """Shards of fineweb.py, or raw text: give data_dir or text. Checkpoints remember how far it was
    read."""

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        text: Sequence[str] = (),
        text_column: str = "text",
        batch_size: int = 8,
        block_size: int = 1024,
        accumulation_steps: int = 1,
        eval_batches: int = 200,
        shuffle: bool = True,
        seed: int = 1337,
    ):
        """accumulation_steps: the Trainer's accumulate_grad_batches. eval_batches: of batch_size
        windows, at most. Raises AdapterError, ShardError when fit() begins."""
        super().__init__()
        if bool(data_dir) == bool(text):
            raise common.AdapterError("give shards or text, one of them")
        self.save_hyperparameters()
        self.batches_done = 0  # of the current epoch
        self.run: dict[str, Any] = {}  # what a run that continues must have in common with this one

    @property
    def settings(self) -> Any:
        """The arguments, as attributes."""
        return self.hparams

    @property
    def running(self) -> Trainer:
        """The Trainer; there is one from fit() on."""
        assert self.trainer is not None
        return self.trainer

    def setup(self, stage: str | None = None) -> None:
        h = self.settings
        if h.data_dir:
            windows = partial(common.shard_windows, h.data_dir, block_size=h.block_size)
            self.train = windows(split="train", seed=h.seed, shuffle=h.shuffle)
            self.val = windows(split="val", length=h.eval_batches * h.batch_size)
            return
        tokenizer = build_tokenizer(h.block_size + 1)
        chunks = common.text_chunks(
            common.load_text(h.text, h.text_column), tokenizer, h.block_size + 1
        )
        train, val = (common.ChunkWindows(part, h.seed) for part in common.split_chunks(chunks))
        self.train = common.Windows(train, train.order if h.shuffle else train.in_order, len(train))
        self.val = common.Windows(val, val.in_order, min(len(val), h.eval_batches * h.batch_size))

    def train_dataloader(self) -> DataLoader:
        h = self.settings
        sampler = PositionSampler(
            self.train,
            batch_size=h.batch_size,
            accumulation_steps=h.accumulation_steps,
            rank=self.running.global_rank,
            world_size=self.running.world_size,
            start=self.batches_done,
        )
        return DataLoader(self.train, batch_size=h.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        sampler = ShareSampler(
            self.val, rank=self.running.global_rank, world_size=self.running.world_size
        )
        return DataLoader(self.val, batch_size=self.settings.batch_size, sampler=sampler)

    def state_dict(self) -> dict[str, Any]:
        """Lightning itself begins an interrupted epoch's data anew when it resumes."""
        progress = self.running.fit_loop.epoch_loop.batch_progress.current
        done = int(progress.ready % self.running.num_training_batches)
        return {"batches_done": done, "run": self.run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches_done = state["batches_done"]
        warnings.filterwarnings(
            "ignore", ".*your dataloader is not resumable"
        )  # it begins further on
