"""A remote file that is read as if it were here, whatever the network does.

Faults are normal over hours of reading, so every request is retried with backoff and jitter, a
server that asks for a pause gets it, a body that is cut short or stalls is resumed where it ended,
and a signed link that has expired is asked for again. What delivers nothing for
`Patience.give_up_seconds` ends in one SourceError.
"""

import email.utils
import functools
import http.client
import io
import logging
import os
import random
import re
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

from pretrain.errors import without_credentials
from pretrain.text.source import Patience, SourceError

log = logging.getLogger(__name__)
# where files were redirected to: asked for again when a link has expired
_links: dict[str, str] = {}

BLOCK = 1 << 17  # bytes asked of a socket at a time: what a stall can cost
LARGEST_HOLE = 1 << 18  # reading over this many unwanted bytes costs less than another request
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


class Fault(Exception):
    """An attempt failed, and another may not. `retry_after`: seconds of pause that the server asks
    for."""

    def __init__(self, cause: str, retry_after: float | None = None):
        super().__init__(
            f"{cause}, asks for a pause of {retry_after:.0f} s" if retry_after else cause
        )
        self.retry_after = retry_after


class Refused(SourceError):
    """The server answered, and will answer the same again. `code` is the Hub's X-Error-Code."""

    def __init__(self, message: str, status: int = 0, code: str = ""):  # defaults: for pickle
        super().__init__(message)
        self.status, self.code = status, code


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


def hub_token() -> str | None:
    """The access token of the Hub, without the quotes that a copied line leaves around it. Raises
    SourceError for what no token can be: sent in a header, it would end in a traceback that shows
    it."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    token = (get_token() or "").strip(" \t\r\n'\"`\u2018\u2019\u201c\u201d\ufeff")
    if not re.fullmatch(r"[\w.~+/=-]*", token, re.ASCII):
        what = "the Hub's token has characters in it that no token has"
        raise SourceError(f"{what}; set HF_TOKEN anew, or run `hf auth login` again")
    return token or None


@functools.lru_cache(maxsize=2)
def _session(pid: int):
    """This process's connections: a forked child must not share its parent's."""
    import requests

    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=32))
    return session


def origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def attempt(
    url: str, *, home: str, token: str | None, timeouts: tuple[float, float], byte_range=None
):
    """One GET whose redirects are followed by hand: the token goes to the origin of `home` and
    nowhere else.

    Returns an open response (200 or 206) and the address it came from. Raises Fault for what may
    pass, Refused or another SourceError for what will not.
    """
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": "pretrain-documents"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range[0]}-{byte_range[1] - 1}"
    for _ in range(6):
        mine = {"Authorization": f"Bearer {token}"} if token and origin(url) == origin(home) else {}
        try:
            response = _session(os.getpid()).get(
                url,
                headers={**headers, **mine},
                timeout=timeouts,
                stream=True,
                allow_redirects=False,
                # else requests would put a ~/.netrc entry in the token's place
                auth=lambda request: request,
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _fault_or_error(url, error) from None
        except (requests.RequestException, ValueError) as error:
            raise SourceError(f"{url}: {cause(error)}; check HF_ENDPOINT") from None
        if response.status_code not in (301, 302, 303, 307, 308):
            break
        url = urljoin(url, response.headers.get("Location", ""))
        response.close()
    if response.status_code not in (200, 206):
        response.close()
        raise _status_fault(url, home, response)
    return response, url


def _fault_or_error(url: str, error: Exception) -> Exception:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        way_out = "behind a proxy of your own, set REQUESTS_CA_BUNDLE to its certificate"
        return SourceError(f"{url}: its certificate cannot be verified; {way_out}")
    return Fault(cause(error))


def _status_fault(url: str, home: str, response) -> Exception:
    status = response.status_code
    answer = f"HTTP {status} {response.reason or ''}".rstrip()
    if status in (408, 425, 429) or status >= 500:
        return Fault(answer, _retry_after(response))
    if origin(url) != origin(home):  # a signed link has expired: the next attempt gets a new one
        return Fault(f"{answer} from {urlsplit(url).netloc}")
    said = response.headers.get("X-Error-Message") or answer
    hint = f"; {LOGIN}" if status in (401, 403) else ""
    return Refused(f"{url}: {said}{hint}", status, response.headers.get("X-Error-Code", ""))


def _retry_after(response) -> float | None:
    """Seconds from Retry-After (a number or a date), or from the Hub's RateLimit header
    (...;r=0;t=120)."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        limit = re.search(r"\br=0;\s*t=(\d+)", response.headers.get("RateLimit", ""))
        return float(limit[1]) if limit else None


def cause(error: Exception) -> str:
    """What went wrong, out of the exceptions that clients nest in each other."""
    while nested := [
        e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)
    ]:
        error = nested[0]
    if isinstance(error, TimeoutError) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "the connection was closed early"
    # urllib3 begins with the connection object's repr or address
    return re.sub(r"^<[^>]*>:? ?|^\w+\(host=.*?\): ", "", str(error)) or type(error).__name__


class RemoteFile(io.RawIOBase):
    """A file behind a URL for reading: tell, seek and read, as pyarrow and the text readers need
    them.

    Bytes come out of one open response as long as reads go forward. `expect` names the ranges that
    will be read, so that a request asks for all of one at once; without it, a request asks for
    exactly what is read.
    """

    def __init__(self, url: str, size: int, patience: Patience):
        self.url, self.size = url, size
        self._waiting, self._token = Waiting(url, patience), hub_token()
        self._expected: list[tuple[int, int]] = []
        self._loaded: list[tuple[int, bytes]] = []
        self._position = 0  # of the next read
        self._response: Any = None  # open, about to deliver bytes [_at, _stop)
        self._at = self._stop = 0

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
        if not (
            self._response and self._at <= start < self._stop and start - self._at <= LARGEST_HOLE
        ):
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
                if self._response is None:
                    self._connect()
                block = self._response.raw.read(n, decode_content=False)
                if not block:
                    raise Fault("the connection was closed early")
                break
            except (Fault, HTTPError, OSError) as error:
                self._disconnect()
                _links.pop(self.url, None)
                self._waiting.after(error if isinstance(error, Fault) else Fault(cause(error)))
        self._at += len(block)
        if self._at == self._stop:
            self._response.raw.release_conn()  # read to its end, it can serve the next request
            self._response = None
        return block

    def _connect(self) -> None:
        response, _links[self.url] = attempt(
            _links.get(self.url, self.url),
            home=self.url,
            token=self._token,
            timeouts=self._waiting.timeouts(),
            byte_range=(self._at, self._stop),
        )
        self._response = response
        if response.status_code == 206:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            begin, size = (int(sent[1]), int(sent[2])) if sent else (self._at, self.size)
        else:  # a server that does not know ranges sends everything
            begin, size = 0, int(response.headers.get("Content-Length", self.size))
        if size != self.size or begin > self._at:
            raise SourceError(f"{self.url}: has {size} bytes, not the {self.size} that were listed")
        while begin < self._at:
            skipped = response.raw.read(min(BLOCK, self._at - begin), decode_content=False)
            if not skipped:
                raise Fault("the connection was closed early")
            begin += len(skipped)

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order; those with at most LARGEST_HOLE bytes between them are made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= LARGEST_HOLE:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
