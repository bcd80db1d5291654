"""A page while its runs go on: written anew, or served on this machine alone."""

import contextlib
import http.client
import json
import threading
import time

import pytest
from test_report import T0, healthy_run, write_run

from pretrain.errors import UserError
from pretrain.report import __main__ as report
from pretrain.report import live
from pretrain.report.live import Server, follow
from pretrain.report.runs import Run


def append(folder, *records):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def going(folder, points=5):
    """A run whose last line is of now, so that it may go on."""
    records = healthy_run(points)
    append(write_run(folder, records), {"event": "train", "time": time.time(), "step": 60})
    return folder


def test_a_page_is_written_anew_while_its_run_goes_on_and_a_last_time_at_the_end(
    tmp_path, monkeypatch, capsys
):
    folder, pages = going(tmp_path / "run"), []

    def sleep(seconds):
        assert seconds == 7
        pages.append((folder / "report.html").read_text())
        if len(pages) == 2:  # after a time in which nothing is new
            append(folder, {"event": "train", "time": time.time(), "step": 70, "loss": 2.5})
        if len(pages) == 3:
            append(folder, {"event": "stop", "time": time.time(), "step": 70, "reason": "finished"})

    monkeypatch.setattr(live.time, "sleep", sleep)
    monkeypatch.setattr(report, "plots", lambda runs: [])  # they are others' to test
    assert report.main([str(folder), "--follow", "7"]) == 0
    assert pages[0] == pages[1] != pages[2]
    assert all('http-equiv="refresh" content="7"' in page for page in pages)
    last = (folder / "report.html").read_text()
    assert "refresh" not in last and "finished" in last
    first, end = capsys.readouterr().out.splitlines()
    assert "again every 7 s" in first and end.endswith("report-*.png beside it"), "at the end"


def test_a_run_that_was_killed_ends_the_following_though_it_writes_no_line(tmp_path, monkeypatch):
    folder, written, held = going(tmp_path / "run"), [], [True]
    monkeypatch.setattr("pretrain.report.runs.files.is_locked", lambda path: held[0])
    monkeypatch.setattr(live.time, "sleep", lambda seconds: held.__setitem__(0, False))
    follow([folder], lambda runs, is_going: written.append((runs[0].status(), is_going)), 1)
    assert written == [("still going", True), ("interrupted: its process is gone", False)]


@contextlib.contextmanager
def served(folder, page):
    with Server([folder], page, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)


def get(port, path="/", host="127.0.0.1"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_is_served_to_this_machine_alone_and_made_anew_when_something_is_new(tmp_path):
    folder = write_run(tmp_path / "run", healthy_run(3))
    made = []

    def page(runs):
        made.append(runs[0].last_step)
        return f"step {runs[0].last_step}"

    with served(folder, page) as server:
        port = server.server_port
        assert server.server_address[0] == "127.0.0.1"
        assert get(port) == get(port, host="localhost") == (200, "step 30") and made == [30]
        append(folder, {"event": "train", "time": T0 + 9, "step": 40, "loss": 3.0})
        assert get(port) == (200, "step 40")
        assert get(port, host="elsewhere.example")[0] == 404, "a name that was bound to 127.0.0.1"
        assert get(port, "/../metrics.jsonl")[0] == get(port, "/report.html")[0] == 404
        (folder / "metrics.jsonl").unlink()
        status, text = get(port)
        assert status == 503 and "no metrics.jsonl there" in text
        with pytest.raises(UserError, match="name another port"):
            Server([folder], page, port)


def test_what_is_served_is_the_page_and_no_file_is_written(tmp_path, monkeypatch):
    folder, shown = going(tmp_path / "run"), []
    before = sorted(folder.iterdir())
    monkeypatch.setattr(report, "plots", lambda runs: [])
    monkeypatch.setattr(
        report, "serve", lambda folders, page, port: shown.append((port, page([Run.load(folder)])))
    )
    assert report.main([str(folder), "--serve"]) == 0
    ((port, page),) = shown
    assert port == 8000 and "Training report" in page and 'http-equiv="refresh"' in page
    assert sorted(folder.iterdir()) == before


def test_following_and_serving_are_one_or_the_other(tmp_path, capsys):
    assert report.main([str(tmp_path), "--follow", "--serve"]) == 2
    assert "not allowed with" in capsys.readouterr().err
