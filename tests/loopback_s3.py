"""An S3 server on the loopback interface, for tests: moto's, behind a proxy that injects faults.

    with LoopbackS3() as s3:
        s3.use(monkeypatch)             # the endpoint and the keys in the environment
        s3.put("s3://bucket/key", b"...")
        s3.faults(fail_every=3)         # every third request gets HTTP 503
        ...
        assert s3.requests and s3.faulty

    fail_every=N, status    every Nth request is answered with that status
    cut_every=N             every Nth body ends in its middle, though its full length was declared
    stall_every=N           every Nth body stops in its middle and the connection stays open
    down=N                  every Nth connection is closed without an answer, and nothing is done
    lose_every=N            every Nth request is done, and its connection closed without an answer
    match=REGEX             only requests whose "METHOD /path" it finds count

`before` is called with "METHOD /path" before each request is passed on, to act between two of a
program's steps; what it raises closes the connection.
"""

import contextlib
import http.client
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY, SECRET = "AKIAEXAMPLEKEY", "secret/of/the+tests"


class LoopbackS3:
    def __enter__(self) -> "LoopbackS3":
        from moto import backends
        from moto.server import ThreadedMotoServer

        # moto lists the folders of its package for each request, half of what that costs.
        services = frozenset(backends.list_of_moto_modules())
        backends.list_of_moto_modules = lambda: services
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.behind = self.moto.get_host_and_port()
        handler = type("Handler", (_Handler,), {"s3": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients go away: that is what is tested
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.reset()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.moto.stop()

    def reset(self) -> None:
        """No faults, and nothing stored."""
        self.faults()
        self._direct("POST", "/moto-api/reset")
        self.buckets: set[str] = set()

    def faults(self, match="", status=503, **every) -> None:
        self.match, self.status, self.every = match, status, every
        self.before = lambda what: None
        self.requests: list[str] = []
        self.sent = self.counted = self.faulty = 0

    def use(self, monkeypatch) -> None:
        """Make this the S3 of this process and of those that it starts."""
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # ---- what is stored, without the proxy

    def put(self, address: str, data: bytes) -> None:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        if bucket not in self.buckets:
            self._direct("PUT", f"/{bucket}")
            self.buckets.add(bucket)
        self._direct("PUT", f"/{bucket}/{key}", data)

    def get(self, address: str) -> bytes:
        return self._direct("GET", "/" + address.removeprefix("s3://"))

    def keys(self, bucket: str) -> list[str]:
        answer = self._direct("GET", f"/{bucket}?list-type=2").decode()
        return sorted(re.findall("<Key>(.*?)</Key>", answer))

    def delete(self, address: str) -> None:
        self._direct("DELETE", "/" + address.removeprefix("s3://"))

    def _direct(self, method: str, path: str, data: bytes | None = None) -> bytes:
        client = http.client.HTTPConnection(*self.behind)
        with contextlib.closing(client):
            authorization = {
                "Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/x, "
            }
            client.request(method, path, data, authorization)
            return client.getresponse().read()

    def next_fault(self, what: str) -> str | None:
        if not re.search(self.match, what):
            return None
        with self.lock:
            self.counted += 1
            due = [kind for kind, n in self.every.items() if n and self.counted % int(n) == 0]
            self.faulty += bool(due)
        return due[0] if due else None


class _Handler(BaseHTTPRequestHandler):
    s3: LoopbackS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        s3, what = self.s3, f"{self.command} {self.path}"
        body = self._body()
        s3.requests.append(what)
        fault = s3.next_fault(what)
        if fault == "down":
            self.close_connection = True
            return
        if fault == "fail_every":
            self._answer(s3.status, [], b"<Error><Code>SlowDown</Code></Error>", None)
            return
        s3.before(what)
        client = http.client.HTTPConnection(*s3.behind)
        with contextlib.closing(client):
            client.request(self.command, self.path, body, dict(self.headers))
            response = client.getresponse()
            content = response.read()
        if fault == "lose_every":
            self.close_connection = True
            return
        self._answer(response.status, response.getheaders(), content, fault)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            self.headers["Content-Length"] = str(len(b"".join(chunks)))
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length) if length else None

    def _answer(self, status: int, headers, content: bytes, fault: str | None) -> None:
        self.send_response(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = len(content) // 2 if fault in ("cut_every", "stall_every") else len(content)
        self.s3.sent += stop
        try:
            self.wfile.write(content[:stop])
            self.wfile.flush()
        except OSError:
            return
        if fault == "stall_every":
            self.s3.closing.wait(30)
        self.close_connection = stop < len(content)
