"""A Hugging Face Hub on the loopback interface, for tests: repositories out of a dictionary, and
faults.

    with LoopbackHub({"org/name": {"README.md": b"...", "data/a.parquet": b"..."}}, cut_every=2) as
    hub:
        ...HF_ENDPOINT=hub.url...
        assert hub.faults > 0

It answers what `datasets` and `pretrain.text.hub` ask to resolve and read a dataset: revision, tree
(in pages), files (whole, by range, HEAD). Faults hit the requests for data; with scope="all", every
request:

    fail_every=N, status, retry_after   every Nth request is answered with that status
    cut_every=N         every Nth body ends in its middle, though its full length was declared
    stall_every=N       every Nth body stops in its middle and the connection stays open
    down_after=N        after N requests every connection is closed without an answer

With link_uses=N, data is behind links on another host name that work N times, as signed ones do for
a time. With token=T the Hub answers those who send T; with gated=True it says why to the others.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 3  # entries in a page of a listing
DATA = (".parquet", ".jsonl", ".gz", ".zst", ".txt")


@dataclass
class Request:
    """What the hub saw."""

    path: str
    host: str
    token: str | None
    bytes_sent: int = 0


@dataclass
class LoopbackHub:
    repos: dict[str, dict[str, bytes]]
    scope: str = "data"
    fail_every: int = 0
    status: int = 503
    retry_after: str | int | None = None
    cut_every: int = 0
    stall_every: int = 0
    down_after: int | None = None
    ranges: bool = True  # False: answers with the whole file whatever is asked
    link_uses: int = 0
    token: str | None = None
    gated: bool = False

    def __enter__(self) -> "LoopbackHub":
        self.requests: list[Request] = []
        self.faults = self.counted = 0
        self.links: dict[str, int] = {}  # how often each was used
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: (
            None
        )  # clients go away, that is what the tests are about
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """Another one for other content."""
        parts = [
            part
            for name, data in sorted(self.repos[repo].items())
            for part in (name.encode(), data)
        ]
        return hashlib.sha1(b"\0".join(parts)).hexdigest()

    def next_fault(self, path: str) -> str | None:
        """What is wrong with the request that comes now, None: nothing."""
        if self.scope == "data" and not path.endswith(DATA):
            return None
        with self.lock:
            self.counted += 1
            every = {"fail": self.fail_every, "cut": self.cut_every, "stall": self.stall_every}
            due = [kind for kind, n in every.items() if n and self.counted % n == 0]
            if self.down_after is not None and self.counted > self.down_after:
                due = ["down"]
            self.faults += bool(due)
        return due[0] if due else None


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        # A user and password in the address ("Basic") are for a proxy before the Hub.
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        token = value if kind == "Bearer" else None
        self.seen = Request(self.path, self.headers["Host"], token)
        self.hub.requests.append(self.seen)
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        redirects = self.hub.link_uses and parts[0] != "link" and url.path.endswith(DATA)
        self.fault = None if redirects else self.hub.next_fault(url.path)
        if self.fault == "down":
            self.close_connection = True
        elif self.fault == "fail":
            after = {} if self.hub.retry_after is None else {"Retry-After": self.hub.retry_after}
            self.answer(self.hub.status, b"fault", after)
        elif parts[0] == "link":
            self.link("/".join(parts), "/".join(parts[2:4]), "/".join(parts[4:]))
        else:
            self.route(parts[parts[0] == "api" :], parse_qs(url.query), redirects)

    do_HEAD = do_POST = do_GET

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = max(1, len(body) // 2) if self.fault in ("cut", "stall") else len(body)
        self.seen.bytes_sent = stop
        try:
            self.wfile.write(body[:stop])
            self.wfile.flush()
        except OSError:
            return  # the client has gone
        if self.fault == "stall":
            self.hub.closing.wait(30)
        self.close_connection = stop < len(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def route(self, parts: list[str], query: dict, redirects: bool) -> None:
        if len(parts) < 3:  # what clients ask beside it
            return self.answer(404)
        parts = parts if len(parts) > 3 else [*parts, "revision", "main"]
        _, org, name, verb, revision, *rest = parts
        repo, path, hub, token = f"{org}/{name}", "/".join(rest), self.hub, self.seen.token

        if repo not in hub.repos or token != hub.token:
            status, code = (
                (403 if token else 401, "GatedRepo") if hub.gated else (401, "RepoNotFound")
            )
            return self.refuse(status, code)
        files, commit = hub.repos[repo], hub.commit(repo)
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        if verb == "revision":
            return self.answer(
                200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode()
            )
        if verb == "tree":
            return self.tree(files, path, query)
        if verb == "paths-info":  # a POST of older clients
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            known = [
                p for p in asked if any(name == p or name.startswith(f"{p}/") for name in files)
            ]
            return self.answer(200, json.dumps([self.entry(files, p) for p in known]).encode())
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        if redirects:
            link = f"link/{len(hub.links)}/{repo}/{path}"
            hub.links[link] = 0
            elsewhere = hub.url.replace("127.0.0.1", "localhost")
            return self.answer(
                302, b"", {"Location": f"{elsewhere}/{quote(link)}", "X-Repo-Commit": commit}
            )
        etag = hashlib.sha1(files[path]).hexdigest()
        self.file(files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def link(self, link: str, repo: str, path: str) -> None:
        self.hub.links[link] += 1
        if self.hub.links[link] > self.hub.link_uses:
            return self.answer(403, b"this link has expired")
        self.file(self.hub.repos[repo][path], {})

    def file(self, content: bytes, headers: dict) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not self.hub.ranges:
            return self.answer(200, content, headers)
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self.answer(206, content[start:stop], headers | part)

    def tree(self, files: dict[str, bytes], folder: str, query: dict) -> None:
        prefix = f"{folder}/" if folder else ""
        parts = [path[len(prefix) :].split("/") for path in files if path.startswith(prefix)]
        depth = 1 if query["recursive"][0].lower() == "false" else 99
        paths = {
            prefix + "/".join(part[:n])
            for part in parts
            for n in range(1, min(depth, len(part)) + 1)
        }
        if not paths:
            return self.refuse(404, "EntryNotFound")
        at = int(query.get("cursor", ["0"])[0])
        paths, rest = sorted(paths)[at : at + PAGE], sorted(paths)[at + PAGE :]
        page = [self.entry(files, path) for path in paths]
        more = f"{self.path.partition('?')[0]}?recursive={query['recursive'][0]}&cursor={at + PAGE}"
        headers = {"Link": f'<{self.hub.url}{more}>; rel="next"'} if rest else {}
        self.answer(200, json.dumps(page).encode(), headers)

    @staticmethod
    def entry(files: dict[str, bytes], path: str) -> dict:
        if path not in files:
            return {"type": "directory", "path": path, "size": 0, "oid": "0"}
        size, sha256 = len(files[path]), hashlib.sha256(files[path]).hexdigest()
        lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 1}
        return {"type": "file", "path": path, "size": size, "oid": "0", "lfs": lfs}
