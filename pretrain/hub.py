"""A dataset on the Hugging Face Hub: which files it consists of, and their bytes by range requests.

Which files belong to a configuration and split is `datasets`' decision, so that a name means here what it means to
`load_dataset`: it is shown a folder with the repository's dataset card and its other files as empty files, and asked.
All requests are our own, because faults are normal over hours of reading and today's clients give up on the first or
hang on the last: each one is retried with backoff, a body that is cut short is resumed where it ended, and what
delivers nothing for `Patience.give_up_seconds` ends in one SourceError.
"""

from __future__ import annotations

import difflib
import email.utils
import functools
import io
import logging
import os
import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from pretrain.source import Patience, SourceError

log = logging.getLogger(__name__)

BLOCK = 1 << 18  # bytes asked of a socket at a time: what a stall can cost
LARGEST_HOLE = 1 << 18  # reading over this many unwanted bytes costs less than another request
RERUN = "rerun the same command to continue"


class _Fault(Exception):
    """One attempt failed in a way that another may not. `retry_after`: seconds the server asked us to wait."""

    def __init__(self, cause: str, retry_after: float | None = None):
        super().__init__(cause)
        self.retry_after = retry_after


class _NotFound(SourceError):
    """The Hub says that there is no such file."""


class _Waiting:
    """Decides how long to wait after a fault, and when to stop waiting."""

    def __init__(self, what: str, patience: Patience):
        self.what, self.patience = what, patience
        self.progress()

    def progress(self) -> None:
        """Something arrived: the count of faults and the clock start anew."""
        self.t0 = time.monotonic()
        self.deadline = self.t0 + self.patience.give_up_seconds
        self.faults = 0

    def timeouts(self) -> tuple[float, float]:
        """Seconds for (connect, each read), such that an attempt does not outlive the deadline by much."""
        left = max(1.0, self.deadline - time.monotonic())
        return min(self.patience.connect_seconds, left), min(self.patience.read_seconds, left)

    def after(self, fault: _Fault) -> None:
        """Sleep before the next attempt, or raise SourceError when the time is up."""
        p, now = self.patience, time.monotonic()
        wait = min(p.longest_wait_seconds, p.first_wait_seconds * 2**self.faults) * random.uniform(0.5, 1.0)
        self.faults += 1
        if fault.retry_after is not None:
            wait = max(wait, fault.retry_after)
            # a pause that the server asks for does not count against it, within reason
            longest = self.t0 + p.rate_limit_seconds
            self.deadline = max(self.deadline, min(longest, now + wait + p.read_seconds))
        if now + wait > self.deadline:
            raise SourceError(
                f"{self.what}: {fault} (tried {self.faults} times in {now - self.t0:.0f} s); "
                f"check the network, then {RERUN}"
            )
        if wait >= 5:
            log.warning("%s: %s; next attempt in %.0f s", self.what, fault, wait)
        time.sleep(wait)


@functools.lru_cache(maxsize=2)
def _session(pid: int):
    """Connections of this process: a forked child must not share its parent's."""
    import requests

    return requests.Session()


def _token() -> str | None:
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _retry_after(response) -> float | None:
    """Seconds from Retry-After (a number or a date), else from the Hub's RateLimit header."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    limit = re.search(r"\br=0\b.*?\bt=(\d+)", response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _attempt(url: str, *, token: str | None, timeouts, byte_range: tuple[int, int] | None = None):
    """One GET, redirects followed by hand so that the token stays with its host. Returns an open response (200, 206).

    Raises _Fault for what may pass, SourceError for what will not.
    """
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": "pretrain-documents"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range[0]}-{byte_range[1] - 1}"
    at, hops = url, 0
    try:
        while True:
            bearer = {"Authorization": f"Bearer {token}"} if token and _origin(at) == _origin(url) else {}
            response = _session(os.getpid()).get(
                at, headers={**headers, **bearer}, timeout=timeouts, stream=True, allow_redirects=False,
                auth=lambda request: request,  # keeps requests from replacing the token by one from ~/.netrc
            )
            if response.status_code not in (301, 302, 303, 307, 308) or hops == 5:
                break
            at, hops = urljoin(at, response.headers.get("Location", "")), hops + 1
            response.close()
    except requests.exceptions.SSLError as e:
        if "CERTIFICATE_VERIFY_FAILED" in str(e):
            raise SourceError(f"{at}: its certificate cannot be verified; if a proxy stands between, set "
                              "REQUESTS_CA_BUNDLE to its certificate") from None
        raise _Fault(_cause(e)) from None
    except (requests.ConnectionError, requests.Timeout) as e:
        raise _Fault(_cause(e)) from None
    except (requests.RequestException, ValueError) as e:
        raise SourceError(f"{url}: {_cause(e)}; is HF_ENDPOINT right?") from None
    if response.status_code in (200, 206):
        return response
    response.close()
    status, said = response.status_code, response.headers.get("X-Error-Message") or response.reason or ""
    if status in (408, 425, 429) or status >= 500:
        raise _Fault(f"HTTP {status} {response.reason or ''}".rstrip(), _retry_after(response))
    if _origin(at) != _origin(url):  # a signed link that has expired: the next attempt gets a new one
        raise _Fault(f"HTTP {status} from {urlsplit(at).netloc}")
    if status == 404:
        raise _NotFound(f"{url}: not found ({said})")
    raise SourceError(f"{url}: HTTP {status} {said}")


def _cause(error: Exception) -> str:
    """The innermost reason of a client's nested exception, without its object addresses."""
    while (inner := next((a for a in (*error.args, getattr(error, "reason", None)) if isinstance(a, Exception)), None)):
        if inner is error:
            break
        error = inner
    text = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", str(error)) or type(error).__name__
    return text.removeprefix("HTTPConnectionPool").strip()


class RemoteFile(io.RawIOBase):
    """A file on the Hub for reading, as pyarrow and the text readers need it: seek, tell, read.

    Bytes come from one open response as long as reads go forward. `expect` names the byte ranges that will be read:
    a request then asks for all of a range at once; without it, for exactly what is read.
    """

    def __init__(self, url: str, size: int, patience: Patience, *, name: str | None = None):
        self.url, self.size = url, size
        self._waiting = _Waiting(name or url, patience)
        self._token = _token()
        self._expected: list[tuple[int, int]] = []
        self._loaded: list[tuple[int, bytes]] = []
        self._position = 0  # of the next read
        self._response, self._at, self._stop = None, 0, 0  # the open body delivers bytes [_at, _stop)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def read(self, n: int = -1) -> bytes:
        """Exactly n bytes, fewer only at the end of the file. Raises SourceError when the server stays away."""
        stop = self.size if n is None or n < 0 else min(self.size, self._position + n)
        data = self._get(self._position, stop)
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        """These byte ranges [start, stop) will be read, in about this order."""
        self._expected = _joined(ranges)

    def load(self, ranges: list[tuple[int, int]]) -> None:
        """Read these byte ranges into memory now; they serve reads in any order until the next load."""
        self._loaded = []
        for start, stop in _joined(ranges):
            self._loaded.append((start, self._get(start, stop)))

    def close(self) -> None:
        self._drop()
        self._loaded = []
        super().close()

    def _get(self, start: int, stop: int) -> bytes:
        for at, data in self._loaded:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        parts = []
        while start < stop:
            if self._response is None or not self._at <= start <= self._at + LARGEST_HOLE or start >= self._stop:
                self._drop()
                self._at, self._stop = start, max([stop, *(b for a, b in self._expected if a <= start < b)])
            block = self._next_block(min(BLOCK, (stop if self._at >= start else start) - self._at))
            if self._at > start:  # else these bytes only led up to the wanted ones
                parts.append(block)
                start = self._at
        return b"".join(parts)

    def _next_block(self, n: int) -> bytes:
        """1 to n bytes at self._at, after as many attempts as patience allows."""
        from urllib3.exceptions import HTTPError

        while True:
            try:
                if self._response is None:
                    self._connect()
                block = self._response.raw.read(n, decode_content=False)
                if not block:
                    raise _Fault("the answer ended early")
            except (_Fault, HTTPError, OSError) as e:
                self._response = self._closed(self._response)
                self._waiting.after(e if isinstance(e, _Fault) else _Fault(_cause(e)))
                continue
            self._waiting.progress()
            self._at += len(block)
            if self._at == self._stop:
                self._response.raw.release_conn()  # fully read: the connection serves the next request
                self._response = None
            return block

    def _connect(self) -> None:
        response = _attempt(self.url, token=self._token, timeouts=self._waiting.timeouts(),
                            byte_range=(self._at, self._stop))
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code == 200:
            total = response.headers.get("Content-Length", "")
        if total.isdigit() and int(total) != self.size:
            response.close()
            raise SourceError(f"{self.url}: has {total} bytes, not the {self.size} listed")
        self._response = response
        if response.status_code == 200:  # the server does not know ranges: read up to ours
            left = self._at
            while left:
                skipped = response.raw.read(min(BLOCK, left), decode_content=False)
                if not skipped:
                    raise _Fault("the answer ended early")
                left -= len(skipped)

    def _drop(self) -> None:
        self._response = self._closed(self._response)

    @staticmethod
    def _closed(response) -> None:
        if response is not None:
            response.close()


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those with at most LARGEST_HOLE bytes between them made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= LARGEST_HOLE:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


# ---- which files


@dataclass(frozen=True)
class HubFile:
    path: str  # within the repository
    size: int  # bytes
    sha256: str | None  # of LFS files
    url: str


@dataclass(frozen=True)
class HubDataset:
    commit: str
    config: str
    files: list[HubFile]


def resolve(dataset: str, *, name: str | None, split: str, revision: str, patience: Patience) -> HubDataset:
    """The files of a dataset's configuration and split at one commit, in the order in which `datasets` reads them.

    Raises SourceError naming what is wrong: no such dataset, revision, configuration or split, no permission, no hub.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SourceError(f"dataset {dataset}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it, or read "
                          "files that are already here with --source")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        raise SourceError(f"{dataset!r} is not the name of a dataset on the Hub, such as HuggingFaceFW/fineweb-edu; "
                          "for local files use --source")
    repo = _Repository(constants.ENDPOINT.rstrip("/"), dataset, revision, patience)
    card = repo.text("README.md")
    folders = _folders_of_config(card, name)
    listing = {file["path"]: file for folder in folders for file in repo.tree(folder)}
    config, paths = _ask_datasets(repo, card, listing, name=name, split=split)
    files = [
        HubFile(path, listing[path]["size"], (listing[path].get("lfs") or {}).get("oid"), repo.url(path))
        for path in paths
    ]
    return HubDataset(repo.commit, config, files)


class _Repository:
    """The Hub's API for one dataset at one commit."""

    def __init__(self, endpoint: str, dataset: str, revision: str, patience: Patience):
        self.endpoint, self.dataset, self.patience = endpoint, dataset, patience
        self.token = _token()
        try:
            info, _ = self._json(f"{endpoint}/api/datasets/{dataset}/revision/{quote(revision, safe='')}?expand=sha")
        except _NotFound as e:
            raise SourceError(f"dataset {dataset}: {e}; check --dataset and --revision {revision}") from None
        self.commit: str = info["sha"]

    def url(self, path: str) -> str:
        return f"{self.endpoint}/datasets/{self.dataset}/resolve/{self.commit}/{quote(path)}"

    def text(self, path: str) -> str:
        """A small file, "" when the repository has none of that name."""
        try:
            return self._get(self.url(path)).content.decode("utf-8", "replace")
        except _NotFound:
            return ""

    def tree(self, folder: str) -> list[dict]:
        """All files below a folder: {"path", "size", "lfs": {"oid"}}."""
        url = f"{self.endpoint}/api/datasets/{self.dataset}/tree/{self.commit}/{quote(folder)}".rstrip("/")
        url, entries = url + "?recursive=true", []
        try:
            while url:
                page, url = self._json(url)
                entries += page
        except _NotFound:
            pass
        return [entry for entry in entries if entry["type"] == "file"]

    def _json(self, url: str) -> tuple[dict | list, str | None]:
        """The answer and the address of its next page."""
        response = self._get(url)
        return response.json(), response.links.get("next", {}).get("url")

    def _get(self, url: str):
        import requests

        waiting = _Waiting(f"{self.endpoint} (dataset {self.dataset})", self.patience)
        while True:
            try:
                response = _attempt(url, token=self.token, timeouts=waiting.timeouts())
                response.content  # noqa: B018  reads the body
                return response
            except _Fault as e:
                waiting.after(e)
            except requests.RequestException as e:
                waiting.after(_Fault(_cause(e)))


def _folders_of_config(card: str, name: str | None) -> list[str]:
    return [""]


def _ask_datasets(repo, card, listing, *, name, split):
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for path in listing:
            target = root / "repo" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        (root / "repo" / "README.md").write_text(card, encoding="utf-8")
        datasets.disable_progress_bars()
        try:
            builder = datasets.load_dataset_builder(str(root / "repo"), name=name, cache_dir=str(root / "cache"))
        except (ValueError, RuntimeError, OSError) as e:
            raise SourceError(f"dataset {repo.dataset}: {e}") from None
        data_files = builder.config.data_files or {}
        if split not in data_files:
            close = difflib.get_close_matches(split, data_files) or sorted(map(str, data_files))
            raise SourceError(f"dataset {repo.dataset} has no split {split!r}: choose --split from {', '.join(close)}")
        paths = [Path(p).relative_to(root / "repo").as_posix() for p in data_files[split]]
    return builder.config.name, paths
