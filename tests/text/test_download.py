"""Downloads against a server on the loopback interface that misbehaves on demand."""

import hashlib
import http.server
import threading
import time

import pytest

from pretrain.text.download import DownloadError, fetch
from pretrain.text.source import Patience

CONTENT = b"".join(b'{"line": %d}\n' % i for i in range(40_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HASTY = Patience(
    give_up_seconds=1.5, read_seconds=0.5, first_wait_seconds=0.05, longest_wait_seconds=0.1
)


class Server(http.server.ThreadingHTTPServer):
    """Answers requests by `script`, one entry each, the last one for ever: a status, or what else
    to do."""

    daemon_threads = True

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.pause = list(script), 0, 0.0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.jsonl"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests += 1
        what = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        time.sleep(server.pause)
        status = what if isinstance(what, int) else 200
        body = (
            CONTENT
            if what in (200, "cut", "stall")
            else b"<html>Log in to the wireless network</html>"
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body[: len(body) // 3] if what in ("cut", "stall") else body)
        if what == "stall":
            time.sleep(2)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*script):
        servers.append(Server(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server, path, **more):
    fetch(server.url, path, size=len(CONTENT), sha256=SHA256, patience=HASTY, **more)


def visible(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("fault", [503, 500, 429, "cut", "stall"])
def test_faults_that_pass_are_waited_out(serve, tmp_path, fault):
    server = serve(fault, 200) if fault in (429, "stall") else serve(fault, fault, 200)
    path = tmp_path / "new" / "file.jsonl"
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["file.jsonl"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [(404, "HTTP 404"), (503, "HTTP 503"), ("cut", "closed"), ("page", "not the file")],
)
def test_what_is_not_the_file_is_never_left_as_the_file(serve, tmp_path, fault, message):
    server, path = serve(fault), tmp_path / "file.jsonl"
    with pytest.raises(DownloadError, match=message) as error:
        get(server, path)
    assert server.url in str(error.value) and "\n" not in str(error.value)
    assert visible(tmp_path) == []
    assert not list(tmp_path.glob(".*.part"))


def test_a_page_saved_as_the_file_is_replaced_and_a_good_file_is_left_alone(serve, tmp_path):
    server, path = serve(200), tmp_path / "file.jsonl"
    path.write_text("<html>404 not found</html>")
    get(server, path)
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.requests == 1


def test_without_a_known_hash_the_check_decides(serve, tmp_path):
    path = tmp_path / "file.jsonl"
    with pytest.raises(DownloadError, match="no lines"):
        fetch(serve("page").url, path, check=lambda file: "no lines", patience=HASTY)
    assert visible(tmp_path) == []
    fetch(serve(200).url, path, check=lambda file: None, patience=HASTY)
    assert path.read_bytes() == CONTENT


def race(server, path, count=6):
    """The outcomes of several processes' calls at once (threads do: every call opens a lock of its
    own)."""
    outcomes, started = [], threading.Barrier(count)

    def one():
        started.wait()
        try:
            outcomes.append(get(server, path))
        except DownloadError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_one_of_many_downloads_and_the_others_wait(serve, tmp_path):
    server = serve(200)
    server.pause = 0.3
    assert race(server, tmp_path / "file.jsonl") == [None] * 6
    assert server.requests == 1


def test_when_the_one_fails_the_others_fail_with_it_and_a_later_call_tries_again(serve, tmp_path):
    server = serve(404, 200)
    server.pause = 0.3
    outcomes = race(server, tmp_path / "file.jsonl")
    assert len(set(outcomes)) == 1 and "HTTP 404" in outcomes[0]
    assert server.requests == 1
    get(server, tmp_path / "file.jsonl")
    assert visible(tmp_path) == ["file.jsonl"]


def test_no_server_at_all_ends_in_one_line(serve, tmp_path):
    server = serve(200)
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="refused"):
        get(server, tmp_path / "file.jsonl")
