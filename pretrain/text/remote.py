"""Files behind addresses of HTTP: one request, and a file that is read as if it were here.

Redirects are followed by hand, so that a token goes to its own server alone; a signed link that has
expired is asked for again. The patience is that of pretrain.text.ranges.
"""

import base64
import email.utils
import functools
import os
import re
import time
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from pretrain.text.ranges import BLOCK, Body, Fault, RangeFile, cause
from pretrain.text.source import Patience, SourceError

# where files were redirected to: asked for again when a link has expired
_links: dict[str, str] = {}

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


class Refused(SourceError):
    """The server answered, and will answer the same again. `code` is the Hub's X-Error-Code."""

    def __init__(self, message: str, status: int = 0, code: str = ""):  # defaults: for pickle
        super().__init__(message)
        self.status, self.code = status, code


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
    return parts.scheme, parts.netloc.rpartition("@")[2]


def is_hub(url: str) -> bool:
    """Whether an address is the Hub's own."""
    try:
        from huggingface_hub import constants
    except ImportError:  # an extra: other addresses need it not
        return False
    return origin(url) == origin(constants.ENDPOINT)


def _authorization(home: str, token: str | None) -> dict[str, str]:
    """The header for the origin of `home`: the token, or the user and password in the address."""
    if token:
        return {"Authorization": f"Bearer {token}"}
    parts = urlsplit(home)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


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
        mine = _authorization(home, token) if origin(url) == origin(home) else {}
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
            way_out = "check HF_ENDPOINT" if is_hub(home) else "check the address"
            raise SourceError(f"{url}: {cause(error)}; {way_out}") from None
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
        return Fault(f"{answer} from {origin(url)[1]}")
    said = response.headers.get("X-Error-Message") or answer
    hint = f"; {LOGIN}" if status in (401, 403) and is_hub(url) else ""
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


class RemoteFile(RangeFile):
    """A file behind an address of HTTP. `tag`: its ETag or its time; where both are known, another
    one is another file. of_hub: the Hub's token goes along."""

    def __init__(
        self, url: str, size: int, patience: Patience, tag: str | None = None, of_hub: bool = True
    ):
        super().__init__(url, size, patience)
        self._token, self._tag = hub_token() if of_hub else None, tag

    def _open(self, start: int, stop: int) -> Body:
        response, _links[self.url] = attempt(
            _links.get(self.url, self.url),
            home=self.url,
            token=self._token,
            timeouts=self._waiting.timeouts(),
            byte_range=(start, stop),
        )
        body = _HttpBody(response)
        begin, size = 0, self.size  # a server that does not know ranges sends everything
        if response.status_code == 206:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            begin, size = (int(sent[1]), int(sent[2])) if sent else (start, self.size)
        elif "Content-Length" in response.headers:
            size = int(response.headers["Content-Length"])
        if size != self.size or begin > start:
            body.close()
            raise SourceError(f"{self.url}: has {size} bytes, not the {self.size} that were listed")
        if (now := tag_of(response)) and self._tag and now != self._tag:
            body.close()
            raise SourceError(f"{self.url}: was written to since the run began; start again")
        while begin < start:
            skipped = body.read(min(BLOCK, start - begin))
            if not skipped:
                body.close()
                raise Fault("the connection was closed early")
            begin += len(skipped)
        return body

    def _forget(self) -> None:
        _links.pop(self.url, None)


class _HttpBody:
    """The body of a response of requests."""

    def __init__(self, response: Any):
        self._response = response

    def read(self, n: int) -> bytes:
        return self._response.raw.read(n, decode_content=False)

    def release(self) -> None:
        self._response.raw.release_conn()

    def close(self) -> None:
        self._response.close()


def tag_of(response: Any) -> str | None:
    """What changes when a file behind an address does: its ETag, else its time."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified")
