"""From a step number to this rank's batch of tokens, straight out of memory-mapped shards.

    loader = ShardLoader(paths, batch_size=8, block_size=1024, accumulation_steps=5)
    x, y = loader.batch(1000)                   # int64 (5, 8, 1024) each; y is x one token later
    for x, y in loader.prefetch(1000): ...      # the same from step 1000 on, read ahead by a thread

The shards lie end to end as one stream of tokens. Window i is the block_size + 1 tokens from
i * stride on; a window may begin in one shard and end in the next, so nothing depends on where
shards were cut. Windows are numbered through all epochs: step s uses the positions from
s * global_batch up to (s + 1) * global_batch, and position p is window p mod windows_per_epoch in
the order of epoch p // windows_per_epoch. That is all there is: no state, hence nothing to save,
and any world size that divides the global batch trains on the same sequences.

Order of an epoch: the stream, rotated by a random offset, is cut into chunks of 2,048 windows (4
MiB at 1,024 tokens), 32 chunks drawn at random make a pool, and the windows of a pool are shuffled
among themselves. So a disk sees long sequential reads, the next pool is read ahead while this one
is used, and a batch still mixes 32 places of the data set. Fewer than 65,536 windows are one pool,
that is, shuffled evenly.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.tokens.shard_cache import bring_ahead, most_maps
from pretrain.tokens.shards import ShardError, open_shard, shard_tokens

CHUNK_WINDOWS = 2048
POOL_CHUNKS = 32
READ_AHEAD_TOKENS = 2**20  # the prefetching thread makes at least this many tokens at a time, 2 MiB


class TokenWindows:
    """The windows of some shards, numbered from 0: len(windows), windows.read(numbers)."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        block_size: int,
        stride: int | None = None,
        vocab_size: int = 2**16,
    ):
        """stride: tokens between the starts of neighbours, default block_size (no target is used
        twice).

        Raises ShardError for a shard whose header is wrong, or when all shards together hold no
        window.
        """
        self.paths = [Path(path) for path in paths]
        self.block_size, self.stride, self.vocab_size = block_size, stride or block_size, vocab_size
        # Token t of the stream is in the first shard whose end is above t.
        self.ends = np.cumsum([shard_tokens(path) for path in self.paths], dtype=np.int64)
        self.num_tokens = int(self.ends[-1]) if self.paths else 0
        self._open = lru_cache(most_maps(self.paths))(
            lambda i: open_shard(self.paths[i]).data.cast("B")
        )
        if self.num_tokens <= block_size:
            where = self.paths[0].parent if self.paths else "no shards"
            raise ShardError(
                f"{where}: {self.num_tokens} tokens; a window takes {block_size} and one more"
            )

    def __len__(self) -> int:
        # The last window needs one token more than block_size: the target of its last position.
        return (self.num_tokens - 1 - self.block_size) // self.stride + 1

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """uint16 (len(numbers), block_size + 1), read-only. Raises ShardError that names the shard
        of an id which is not below vocab_size."""
        starts = numbers * self.stride
        shards = np.searchsorted(self.ends, starts, side="right")
        offsets = 2 * (starts - np.append(0, self.ends)[shards])  # in bytes
        # Views of bytes, joined in one go: four times as fast as slices of arrays, one by one.
        size = 2 * (self.block_size + 1)
        maps = {shard: self._open(shard) for shard in set(shards.tolist())}
        parts: list[memoryview | bytes] = [
            maps[s][i : i + size] for s, i in zip(shards.tolist(), offsets.tolist(), strict=True)
        ]
        # A shard ends wherever its size was reached, in the middle of a sentence: a window that
        # meets the end goes on in the next shard, else a few tokens of each would never be used.
        for window in np.flatnonzero(starts + self.block_size >= self.ends[shards]).tolist():
            part, shard = bytes(parts[window]), int(shards[window])
            while len(part) < size:  # a shard may be shorter than what is missing
                shard += 1
                part += bytes(self._open(shard)[: size - len(part)])
            parts[window] = part
        tokens = np.frombuffer(b"".join(parts), dtype="<u2").reshape(
            len(numbers), self.block_size + 1
        )
        # An embedding that is asked for a row it lacks fails on a GPU without saying why.
        if tokens.max(initial=0) >= self.vocab_size:
            self._report_bad_id(tokens, starts)
        return tokens

    def read_ahead(self, first: int, last: int) -> None:
        """Ask the system to have the tokens of windows first..last (inclusive) in memory soon;
        returns at once. A hint: what goes wrong here is left to the reading itself."""
        if not hasattr(os, "posix_fadvise"):
            return
        start, stop = first * self.stride, last * self.stride + self.block_size + 1
        for shard in range(np.searchsorted(self.ends, start, side="right"), len(self.paths)):
            begin, end = int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])
            if begin >= stop:
                break
            bring_ahead(self.paths[shard])
            with contextlib.suppress(OSError), open(self.paths[shard], "rb") as file:
                header = os.fstat(file.fileno()).st_size - 2 * (end - begin)
                offset = header + 2 * (max(start, begin) - begin)
                length = 2 * (min(stop, end) - max(start, begin))
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def _report_bad_id(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        row, column = np.argwhere(tokens >= self.vocab_size)[0]
        position = starts[row] + column
        shard = int(np.searchsorted(self.ends, position, side="right"))
        offset = position - (self.ends[shard - 1] if shard else 0)
        raise ShardError(
            f"{self.paths[shard]}: token {offset} is {tokens[row, column]}, but ids are below"
            f" {self.vocab_size}; check the shard with fineweb.py --verify"
        )


class BatchLoader:
    """This rank's share of every step's batch, from where the subclass finds the windows at given
    positions: read() and read_ahead()."""

    stride: int  # tokens between the starts of neighbouring windows

    def __init__(
        self,
        *,
        batch_size: int,
        block_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        """batch_size: sequences per rank and micro-step. pin_memory: batches in page-locked memory,
        from which a GPU copies while it computes."""
        self.shape = (accumulation_steps, batch_size, block_size + 1)
        self.global_batch = accumulation_steps * batch_size * world_size  # sequences per step
        self.block_size, self.pin_memory = block_size, pin_memory
        # Positions within a step's global batch, micro-step after micro-step and in each of them
        # rank after rank. A step is their whole, so it is the same for any split of its batch.
        micro_steps = np.arange(accumulation_steps) * world_size + rank
        self._share = (micro_steps[:, None] * batch_size + np.arange(batch_size)).reshape(-1)

    @property
    def parts(self) -> Mapping[str, "ShardLoader"]:
        """The sources by name; a loader of one folder has one, without a name."""
        raise NotImplementedError

    @property
    def windows_per_epoch(self) -> int:
        """Of all sources together."""
        return sum(len(part.windows) for part in self.parts.values())

    @property
    def steps_per_epoch(self) -> float:
        return self.windows_per_epoch / self.global_batch

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        """{source: {"tokens": trained on before this step, "epochs": how often it was used}} of a
        mixture."""
        return {}

    def shares(self, step: int) -> dict[str, float]:
        """What each source of a mixture has of this step's batch."""
        return {}

    def read(self, positions: np.ndarray) -> np.ndarray:
        """uint16 (len(positions), block_size + 1) at positions (int64, any order) that count
        through the whole run."""
        raise NotImplementedError

    def read_ahead(self, position: int, pools: int) -> None:
        """Have what is used so many pools after this position read into memory; a hint."""
        raise NotImplementedError

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x and y, int64 (accumulation_steps, batch_size, block_size); views of one tensor. Depends
        on nothing but the arguments of the constructor and the step. Raises ShardError when a token
        id is not below vocab_size."""
        # One token more than inputs: x and y are views of it, nothing is read or copied twice.
        tokens = torch.from_numpy(self._tokens(step, 1)[0].astype(np.int64))
        if self.pin_memory:
            tokens = tokens.pin_memory()
        return tokens[..., :-1], tokens[..., 1:]

    def prefetch(
        self, step: int = 0, *, device: torch.device | str = "cpu"
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """batch(step), batch(step + 1), ... without end, on the device, made ahead by a thread.
        Close the iterator (contextlib.closing) to end the thread. What goes wrong in the thread is
        raised here."""
        steps = READ_AHEAD_TOKENS // (self._share.size * self.shape[-1])  # made at a time
        # A text of some pages has thousands of epochs in so many tokens: one of them is enough.
        steps = max(1, min(steps, int(self.steps_per_epoch)))
        # One made and one in the making is enough: the thread is faster than any training.
        made: queue.Queue = queue.Queue(maxsize=2)
        closed = threading.Event()

        def work(step: int) -> None:
            try:
                self.read_ahead(step * self.global_batch, pools=0)
                while not closed.is_set():
                    self.read_ahead(step * self.global_batch, pools=1)
                    tokens = self._tokens(step, steps)
                    put(page_locked(tokens) if self.pin_memory else tokens)
                    step += steps
            except BaseException as error:  # a thread's own traceback would go unnoticed
                put(error)

        def put(item: np.ndarray | Tensor | BaseException) -> None:
            while not closed.is_set():
                try:
                    return made.put(item, timeout=0.1)
                except queue.Full:
                    continue

        # A thread, not processes: it waits for disks and copies memory, both without the GIL.
        thread = threading.Thread(target=work, args=(step,), name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = made.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Tensor):  # 16 bits a token travel, the device widens them
                    item = item.to(device, non_blocking=True).long() & 0xFFFF
                else:
                    item = torch.from_numpy(item.astype(np.int64)).to(device)
                for tokens in item:
                    yield tokens[..., :-1], tokens[..., 1:]
        finally:
            closed.set()
            thread.join()

    def _tokens(self, step: int, steps: int) -> np.ndarray:
        """This rank's tokens of some steps, uint16 (steps, *self.shape)."""
        positions = (
            np.arange(step, step + steps)[:, None] * self.global_batch + self._share
        ).reshape(-1)
        return self.read(positions).reshape(steps, *self.shape)


class ShardLoader(BatchLoader):
    """Batches from the shards of one folder. See the top of the file for the order of windows."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        batch_size: int,
        block_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 1337,
        shuffle: bool = True,
        stride: int | None = None,
        vocab_size: int = 2**16,
        pin_memory: bool = False,
    ):
        """Like BatchLoader and TokenWindows. shuffle=False: file order, every epoch. Raises
        ShardError like TokenWindows."""
        self.windows = TokenWindows(
            paths, block_size=block_size, stride=stride, vocab_size=vocab_size
        )
        super().__init__(
            batch_size=batch_size,
            block_size=block_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            world_size=world_size,
            pin_memory=pin_memory,
        )
        self.seed, self.shuffle, self.stride = seed, shuffle, self.windows.stride
        self._pool_ahead: tuple[int, int] | None = None
        # Two epochs, since a batch may span their border; the pools of both, and those read ahead.
        self._epoch: Callable[[int], tuple[int, np.ndarray]] = lru_cache(2)(self._make_epoch)
        self._pool: Callable[[int, int], np.ndarray] = lru_cache(4)(self._make_pool)

    @property
    def parts(self) -> Mapping[str, "ShardLoader"]:
        return {"": self}

    def read(self, positions: np.ndarray) -> np.ndarray:
        return self.windows.read(self.order(positions))

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Window numbers at these positions (int64, any order), counted through all epochs from
        0."""
        epochs, places = np.divmod(positions, len(self.windows))
        if not self.shuffle:
            return places
        # Even shuffling over terabytes would read a window here and a window there; a pool is a
        # piece of the epoch small enough to be read whole, and mixed evenly.
        windows = np.empty_like(places)
        pool_windows = CHUNK_WINDOWS * POOL_CHUNKS
        pools_per_epoch = -(-len(self.windows) // pool_windows)
        pools = epochs * pools_per_epoch + places // pool_windows
        for number in np.unique(pools).tolist():
            here = pools == number
            windows[here] = self._pool(*divmod(number, pools_per_epoch))[
                places[here] % pool_windows
            ]
        return windows

    def _make_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """How far the epoch's windows are rotated, and its chunks in order, the one that is not
        full at the end."""
        # The rotation moves the borders of chunks: windows that share one now do not next time.
        num_windows = len(self.windows)
        random = _random_bits((self.seed, epoch), -(-num_windows // CHUNK_WINDOWS) + 1)
        full = num_windows // CHUNK_WINDOWS
        chunks = np.append(
            np.argsort(random[1 : full + 1], kind="stable"), np.arange(full, len(random) - 1)
        )
        return int(random[0] % np.uint64(num_windows)), chunks

    def _chunks(self, epoch: int, pool: int) -> tuple[int, np.ndarray]:
        rotation, chunks = self._epoch(epoch)
        return rotation, chunks[pool * POOL_CHUNKS : (pool + 1) * POOL_CHUNKS]

    def _make_pool(self, epoch: int, pool: int) -> np.ndarray:
        """The pool's window numbers in the order in which they are used."""
        rotation, chunks = self._chunks(epoch, pool)
        windows = (chunks[:, None] * CHUNK_WINDOWS + np.arange(CHUNK_WINDOWS)).reshape(-1)
        windows = windows[windows < len(self.windows)]
        order = np.argsort(_random_bits((self.seed, epoch, pool), len(windows)), kind="stable")
        return (windows[order] + rotation) % len(self.windows)

    def read_ahead(self, position: int, pools: int) -> None:
        """Have the pool so many after that of this position read into memory; once."""
        position += pools * CHUNK_WINDOWS * POOL_CHUNKS
        epoch, place = divmod(position, len(self.windows))
        pool = place // (CHUNK_WINDOWS * POOL_CHUNKS)
        if not self.shuffle or (epoch, pool) == self._pool_ahead:
            return  # a sequential reader needs no help
        self._pool_ahead = (epoch, pool)
        rotation, chunks = self._chunks(epoch, pool)
        for chunk in chunks.tolist():
            first = (chunk * CHUNK_WINDOWS + rotation) % len(self.windows)
            self.windows.read_ahead(first, min(first + CHUNK_WINDOWS, len(self.windows)) - 1)


def page_locked(tokens: np.ndarray) -> Tensor:
    """uint16 tokens as int16 bits in page-locked memory, from which a GPU copies while it
    computes."""
    bits = torch.empty(tokens.shape, dtype=torch.int16, pin_memory=True)
    np.copyto(bits.numpy(), tokens.view(np.int16))
    return bits


def _random_bits(key: tuple[int, ...], count: int) -> np.ndarray:
    """uint64 (count,). Raw bits and a stable sort: unlike Generator.permutation these are promised
    to stay the same from one NumPy to the next (NEP 19), so an order lasts as long as its
    checkpoints."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
