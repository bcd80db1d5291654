"""A report while its runs go on: written anew as they proceed, or served on this machine alone.

follow(folders, write, seconds=60)      # until no run goes on
serve(folders, page, port=8000)         # http://127.0.0.1:8000/, until Ctrl-C
"""

import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.report.runs import Run

LOOPBACK = "127.0.0.1"


def state_of(runs: Sequence[Run]) -> list[tuple[int, str]]:
    """What changes where a page has something new to show: lines of the logs, and how runs
    stand: a killed one adds no line."""
    return [(len(run.records), run.status()) for run in runs]


def follow(
    folders: Sequence[str | Path], write: Callable[[list[Run], bool], None], seconds: float
) -> None:
    """Call write(runs, whether one goes on) now, whenever something is new, at most every
    `seconds`, and a last time when none goes on. Raises RunError, and what `write` raises."""
    shown = None
    while True:
        runs = [Run.load(folder) for folder in folders]
        is_going = any(run.is_going for run in runs)
        if (state := state_of(runs)) != shown:
            write(runs, is_going)
            shown = state
        if not is_going:
            return
        time.sleep(seconds)


class Server(HTTPServer):
    """One page at /, made anew where its runs have something new to show. Nothing else is
    answered, nothing of the request is used."""

    def __init__(self, folders: Sequence[str | Path], page: Callable[[list[Run]], str], port: int):
        """port 0: any that is free, then in server_port. Raises UserError where it is taken."""
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise UserError(f"--serve {port}: {error.strerror}; name another port") from None
        self.folders, self._make = folders, page
        self._state: Any = None
        self._page = b""

    def page(self) -> bytes:
        runs = [Run.load(folder) for folder in self.folders]
        if (state := state_of(runs)) != self._state:
            self._page = self._make(runs).encode("utf-8", "replace")
            self._state = state
        return self._page


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # Another name for this address is a page elsewhere that reaches for this one.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if self.path != "/" or host not in (LOOPBACK, "localhost"):
            self.send_error(404)
            return
        try:
            page = self.server.page()
        except UserError as error:
            self.send_error(503, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """No line a request."""


def serve(folders: Sequence[str | Path], page: Callable[[list[Run]], str], port: int) -> None:
    """Answer at http://127.0.0.1:port/ until Ctrl-C."""
    with Server(folders, page, port) as server:
        print(f"http://{LOOPBACK}:{server.server_port}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
