"""Bytes of a file elsewhere, by ranges, through whatever the network does.

    class MyFile(RangeFile):
        def _open(self, start, stop): ...     # one attempt: a Body, or Fault for what may pass

Faults are normal over hours of reading, so every attempt is followed by others, with backoff and
jitter; a server that asks for a pause gets it, a body that is cut short or stalls is resumed where
it ended. What delivers nothing for `Patience.give_up_seconds` ends in one SourceError.
"""

import io
import logging
import random
import re
import time
from typing import Protocol

from pretrain.errors import without_credentials
from pretrain.text.source import Patience, SourceError

log = logging.getLogger(__name__)

BLOCK = 1 << 17  # bytes asked of a socket at a time: what a stall can cost
LARGEST_HOLE = 1 << 18  # reading over this many unwanted bytes costs less than another request


class Fault(Exception):
    """An attempt failed, and another may not. `retry_after`: seconds of pause that the server asks
    for."""

    def __init__(self, cause: str, retry_after: float | None = None):
        super().__init__(
            f"{cause}, asks for a pause of {retry_after:.0f} s" if retry_after else cause
        )
        self.retry_after = retry_after


class Waiting:
    """Decides how long to wait after a fault, and when to stop."""

    def __init__(self, what: str, patience: Patience):
        self.what, self.patience = what, patience
        self.start()

    def start(self) -> None:
        """Something else is waited for: the clock starts anew."""
        self.began = time.monotonic()
        self.deadline = self.began + self.patience.give_up_seconds
        self.faults = 0

    def timeouts(self) -> tuple[float, float]:
        """Seconds to (connect, wait for bytes), so that no attempt goes on far beyond the
        deadline."""
        left = max(1.0, self.deadline - time.monotonic())
        return min(self.patience.connect_seconds, left), min(self.patience.read_seconds, left)

    def after(self, fault: Fault) -> None:
        """Sleep before the next attempt, or raise SourceError when the time is up."""
        p, now = self.patience, time.monotonic()
        wait = min(p.longest_wait_seconds, p.first_wait_seconds * 2**self.faults) * random.uniform(
            0.5, 1.0
        )
        self.faults += 1
        if fault.retry_after:  # a pause that the server asks for is no sign that it has gone
            wait = max(wait, fault.retry_after)
            latest = self.began + p.rate_limit_seconds
            self.deadline = max(self.deadline, min(latest, self.deadline + fault.retry_after))
        if now + wait > self.deadline:
            tries = f"{self.faults} attempt{'s' * (self.faults > 1)} in {now - self.began:.0f} s"
            raise SourceError(
                f"{self.what}: {fault} ({tries}); rerun the same command later to continue"
            )
        if wait >= 5:
            what = without_credentials(f"{self.what}: {fault}")
            log.warning("%s; trying again in %.0f s", what, wait)
        time.sleep(wait)


def cause(error: Exception) -> str:
    """What went wrong, out of the exceptions that clients nest in each other."""
    while nested := [
        e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)
    ]:
        error = nested[0]
    if isinstance(error, TimeoutError) or "timed out" in str(error):
        return "no answer in time"
    from http.client import IncompleteRead, RemoteDisconnected  # loads much, for faults alone

    if isinstance(error, IncompleteRead | RemoteDisconnected):
        return "the connection was closed early"
    # urllib3 begins with the connection object's repr or address
    return re.sub(r"^<[^>]*>:? ?|^\w+\(host=.*?\): ", "", str(error)) or type(error).__name__


class Body(Protocol):
    """Bytes on their way."""

    def read(self, n: int) -> bytes:
        """1 to n bytes, none where the other side has ended. Raises Fault, and OSError or urllib3's
        HTTPError for a connection that broke."""
        ...

    def release(self) -> None:
        """All of it was read: its connection can serve the next request."""
        ...

    def close(self) -> None: ...


class RangeFile(io.RawIOBase):
    """A file elsewhere for reading: tell, seek and read, as pyarrow and the text readers need them.

    Bytes come out of one open body as long as reads go forward. `expect` names the ranges that
    will be read, so that a request asks for all of one at once; without it, a request asks for
    exactly what is read. How a range is asked for is `_open`.
    """

    def __init__(self, url: str, size: int, patience: Patience):
        self.url, self.size = url, size
        self._waiting = Waiting(url, patience)
        self._expected: list[tuple[int, int]] = []
        self._loaded: list[tuple[int, bytes]] = []
        self._position = 0  # of the next read
        self._body: Body | None = None  # open, about to deliver bytes [_at, _stop)
        self._at = self._stop = 0

    def _open(self, start: int, stop: int) -> Body:
        """Ask for bytes [start, stop). Raises Fault for what may pass, SourceError for what will
        not."""
        raise NotImplementedError

    def _forget(self) -> None:
        """An attempt failed: what was remembered of the way here may be wrong."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, n: int = -1) -> bytes:
        """Exactly n bytes, fewer only at the end of the file. Raises SourceError when patience
        ends."""
        stop = self.size if n is None or n < 0 else min(self.size, self._position + n)
        data = self._bytes(self._position, stop)
        self._position += len(data)
        return data

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        """The byte ranges [start, stop) that will be read."""
        self._expected = _joined(ranges)

    def load(self, ranges: list[tuple[int, int]]) -> None:
        """Read byte ranges into memory, where they serve reads in any order until the next load."""
        self._loaded = []
        self._loaded = [(start, self._bytes(start, stop)) for start, stop in _joined(ranges)]

    def close(self) -> None:
        self._disconnect()
        self._loaded = []
        super().close()

    def _bytes(self, start: int, stop: int) -> bytes:
        for at, data in self._loaded:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        if not (self._body and self._at <= start < self._stop and start - self._at <= LARGEST_HOLE):
            self._disconnect()
            self._at = self._stop = start
        blocks = []
        while self._at < stop:
            if self._at == self._stop:  # ask for the rest of what is expected around it, too
                self._stop = max([stop, *(b for a, b in self._expected if a <= self._at < b)])
            skipping = self._at < start
            block = self._block(min(BLOCK, (start if skipping else stop) - self._at))
            if not skipping:
                blocks.append(block)
        return b"".join(blocks)

    def _block(self, n: int) -> bytes:
        """1 to n bytes from self._at on, after as many attempts as patience allows."""
        from urllib3.exceptions import HTTPError

        n = min(n, self._stop - self._at)
        self._waiting.start()  # the reader may have been busy for long since the last block
        while True:
            try:
                self._body = self._body or self._open(self._at, self._stop)
                block = self._body.read(n)
                if not block:
                    raise Fault("the connection was closed early")
                break
            except (Fault, HTTPError, OSError) as error:
                self._disconnect()
                self._forget()
                self._waiting.after(error if isinstance(error, Fault) else Fault(cause(error)))
        self._at += len(block)
        if self._at == self._stop:
            self._body.release()
            self._body = None
        return block

    def _disconnect(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order; those with at most LARGEST_HOLE bytes between them are made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= LARGEST_HOLE:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
