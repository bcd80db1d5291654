"""How a build of shards goes on, for people: one bar on a terminal, a line now and then
elsewhere."""

import sys
import time
from typing import Any

from pretrain.text.documents import Unit
from pretrain.tokens.build import Callbacks
from pretrain.tokens.estimate import Estimate
from pretrain.tokens.pipeline import TokenBatch
from pretrain.tokens.shards import Manifest, Shard

LINE_SECONDS = 15  # between lines where there is no terminal


def rounded(number: float) -> str:
    """Three digits of a large number: 41,300,000."""
    return f"{float(f'{number:.3g}'):,.0f}"


def in_bytes(number: float) -> str:
    """Three digits and a decimal unit: 950 B, 12.3 kB, 20.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def plural(noun: str, number: int) -> str:
    """The noun as it stands behind that number.

    >>> plural("shard", 3)
    'shards'
    """
    return noun if number == 1 else noun + "s"


class ConsoleProgress(Callbacks):
    """Shows tokens, tokens/s, MB/s of text, the shard, and the time left."""

    def __init__(self, expected: Estimate, max_tokens: int | None):
        self.expected, self.max_tokens = expected, max_tokens
        self.bar: Any = None

    def begin(self, what: str, manifest: Manifest) -> None:
        from tqdm import tqdm

        self.close()
        self.what, self.before, self.shards = what, manifest.tokens, len(manifest.shards)
        self.tokens = self.text_bytes = 0  # of this pass
        self.read_tokens = self.read_bytes = 0  # of units read to their ends: tokens, stored bytes
        self.current: Unit | None = None
        self.t0 = time.perf_counter()
        self.line_at = self.t0 + LINE_SECONDS
        # Every batch looks at the clock, so that no thread has to: beside one, worker processes
        # could not begin as copies of this one.
        tqdm.monitor_interval = 0
        self.bar = tqdm(
            desc=what,
            total=self.total_tokens(),
            initial=self.before,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            miniters=1,
            disable=not sys.stderr.isatty(),
        )

    def batch(self, batch: TokenBatch) -> None:
        if self.current is not None and batch.unit != self.current:
            self.read_tokens = self.tokens
            self.read_bytes += self.current.num_bytes
        self.current = batch.unit
        self._add(len(batch.tokens), batch.text_bytes)

    def unit(self, unit: Unit, tokens: int, text_bytes: int) -> None:
        self.read_tokens += tokens
        self.read_bytes += unit.num_bytes
        self._add(tokens, text_bytes)

    def _add(self, tokens: int, text_bytes: int) -> None:
        """Show that so much more is done."""
        self.tokens += tokens
        self.text_bytes += text_bytes
        seconds = max(1e-6, time.perf_counter() - self.t0)
        state = f"{self.text_bytes / seconds / 1e6:.0f} MB/s, shard {self.shards}"
        self.bar.total = self.total_tokens()
        self.bar.set_postfix_str(state, refresh=False)
        self.bar.update(tokens)
        if self.bar.disable and self.t0 + seconds > self.line_at:
            self.line_at += LINE_SECONDS
            done, rate = self.before + self.tokens, self.tokens / seconds
            left = max(0, self.bar.total - done)
            minutes = f"{left / rate / 60:.1f} min left" if rate else "no document yet"
            of = f"{done:,} of about {rounded(self.bar.total)} tokens"
            print(f"{self.what}: {of}, {rounded(rate)} tokens/s, {state}, {minutes}", flush=True)

    def total_tokens(self) -> int:
        """All tokens there will be: first the estimate, then from the tokens per stored byte so
        far."""
        tokens: float = self.expected.tokens
        if self.read_tokens > 1_000_000 and self.read_bytes:
            tokens = self.expected.text_bytes * self.read_tokens / self.read_bytes
        return int(min(max(tokens, self.before + self.tokens), self.max_tokens or tokens))

    def shard(self, shard: Shard) -> None:
        self.shards += 1

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
