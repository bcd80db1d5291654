"""The report as a browser shows it: headless Chromium, steered by a pipe; skipped where there is
none."""

import base64
import json
import os
import re
import select
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image
from test_report import healthy_run, write_run

from pretrain.report import __main__ as report
from pretrain.report.drawing import COLORS

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
)
fcntl = pytest.importorskip("fcntl", reason="a browser is steered through inherited descriptors")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Browser:
    """One page of a headless browser. It reads JSON messages, each ended by a zero byte, on
    descriptor 3 and writes its own on descriptor 4."""

    def __init__(self, folder):
        low = [*os.pipe(), *os.pipe()]
        high = [
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low
        ]  # so that 3 and 4 are free
        for end in low:
            os.close(end)
        theirs_in, self._out, self._in, theirs_out = high
        flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        self._log = folder / "chromium.log"
        actions = [
            (os.POSIX_SPAWN_OPEN, 1, self._log, os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, theirs_in, 3),
            (os.POSIX_SPAWN_DUP2, theirs_out, 4),
        ]
        command = [CHROMIUM, *flags, "about:blank"]
        self._pid = os.posix_spawn(
            CHROMIUM, command, dict(os.environ), file_actions=actions, setpgroup=0
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._received, self._number, self._session = b"", 0, None
        self.events = []

    def open_page(self):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        """Send a command, return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._wait(lambda answer: answer.get("id") == self._number)["result"]

    def _wait(self, wanted, seconds=60):
        deadline = time.monotonic() + seconds
        while True:
            *complete, self._received = self._received.split(b"\0")
            messages = [json.loads(message) for message in complete]
            self.events += [message for message in messages if "method" in message]
            for message in messages:
                if wanted(message):
                    assert "error" not in message, message
                    return message
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, (
                f"Chromium does not answer: {self._log.read_text(errors='replace')[-2000:]}"
            )
            self._received += data

    def show(self, page, *, width=1200, dark=False):
        """Open a file in a window of that width and wait until it has loaded."""
        self.events = []
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **window)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.as_uri())
        if not self.saw("Page.loadEventFired"):
            self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def saw(self, method):
        return [event["params"] for event in self.events if event["method"] == method]

    def evaluate(self, expression):
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def screenshot(self, path):
        """The whole page as a PNG."""
        picture = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self):
        os.close(self._out)
        os.close(self._in)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        browser.open_page()
    except (
        AssertionError,
        BrokenPipeError,
    ) as error:  # no sandbox for this user, a library missing
        browser.close()
        pytest.skip(str(error))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs, the second with a long name and a script in its sample."""
    folder = tmp_path_factory.mktemp("runs")
    records = healthy_run()
    script = (
        "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    )
    records.append({"event": "sample", "step": 2000, "prompt": "The", "text": f"The {script} mill"})
    runs = [
        write_run(folder / "a", healthy_run(400), seed=1),
        write_run(folder / ("b" * 60), records, seed=2),
    ]
    assert report.main([*map(str, runs), "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375], ids=["desktop", "phone"])
def test_the_page_renders_whole_and_without_errors(browser, page, width, dark):
    browser.show(page, width=width, dark=dark)
    assert [entry["entry"] for entry in browser.saw("Log.entryAdded")] == []
    assert (
        browser.saw("Runtime.consoleAPICalled") == []
        and browser.saw("Runtime.exceptionThrown") == []
    )
    urls = {params["request"]["url"] for params in browser.saw("Network.requestWillBeSent")}
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}, (
        "nothing else is loaded"
    )
    charts = browser.evaluate(
        "[...document.querySelectorAll('.chart > svg')].map(s => [s.clientWidth,"
        " s.querySelectorAll('path').length, s.getAttribute('aria-label').length])"
    )
    assert len(charts) == 8 and not browser.evaluate("document.images.length")
    assert all(shown > 290 and paths >= 2 and said > 40 for shown, paths, said in charts)
    headings = browser.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].map(h => h.innerText)"
    )
    sections = {"What looks wrong", "Curves", "Samples", "Configuration"}
    assert {"Training report", "Loss against steps", *sections} <= set(headings)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "nothing sticks out"
    )
    assert browser.evaluate("document.title").startswith("Training report: ")
    assert browser.evaluate("document.querySelectorAll('script').length") == 2, "data, and page.js"
    assert browser.evaluate("document.title").find("owned") < 0
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark


@pytest.fixture
def without_scripts(browser):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    yield browser
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_without_scripts_the_page_shows_its_pictures_and_their_numbers(without_scripts, page):
    shown = {}
    for width, dark in ((1200, False), (1200, True), (375, False)):
        without_scripts.show(page, width=width, dark=dark)
        images = without_scripts.evaluate(
            "[...document.images].map(i => [i.currentSrc, i.complete && i.naturalWidth > 0 &&"
            " i.clientWidth > 290])"
        )
        assert len(images) == 8 and all(is_seen for _, is_seen in images)
        shown[width, dark] = {source for source, _ in images}
        assert without_scripts.evaluate(
            "[...document.querySelectorAll('.numbers table')].every(t => t.rows.length > 2)"
        )
    assert not shown[1200, False] & shown[1200, True], "a dark page has dark pictures"
    assert len(shown[1200, False] - shown[375, False]) == 1, "a phone has the loss at its own size"


def move(browser, x, y, kind="mouseMoved", **more):
    """The pointer at a share of the width and height of the picture of the loss."""
    box = browser.evaluate(
        "(() => { const svg = document.querySelector('#plot-loss svg');"
        " svg.scrollIntoView({ block: 'center' }); const r = svg.getBoundingClientRect();"
        " return [r.left, r.top, r.width, r.height]; })()"
    )
    at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
    browser.ask("Input.dispatchMouseEvent", type=kind, **at, **more)


TIP = "document.querySelector('#plot-loss .tip')"
TICKS = "[...document.querySelectorAll('#plot-loss .frame text')].map(t => t.textContent)"
LINES = "document.querySelectorAll('#plot-loss path').length"
CLICK = "document.querySelector({!r}).click(), 0"


def test_the_values_under_the_pointer_are_those_of_the_log(browser, page):
    browser.show(page)
    assert browser.evaluate(f"{TIP}.hidden")
    move(browser, 0.5, 0.5)
    said = browser.evaluate(f"[...{TIP}.children].map(e => e.innerText.replace(/\\s+/g, ' '))")
    step = int(said[0].removeprefix("step ").replace(",", ""))
    log = [json.loads(line) for line in (page.parent / "a/metrics.jsonl").read_text().splitlines()]
    steps = {record["step"] for record in log if record["event"] == "train"}
    assert step in steps and len(said) == 1 + 4, "two kinds of two runs"
    at = browser.evaluate(f"[...{TIP}.querySelectorAll('div')].map(e => e.innerText)")
    row = next(text for text in at if text.startswith("a, validation") or "a, validation" in text)
    values = [f"{r['val_loss']:.5g}" for r in log if r["event"] == "eval"]
    assert any(value in row for value in values)
    move(browser, 0.5, -0.2)
    assert browser.evaluate(f"{TIP}.hidden"), "gone with the pointer"


def test_a_stretch_is_zoomed_and_runs_and_axes_are_switched_and_kept(browser, page):
    browser.show(page)
    ticks, lines = browser.evaluate(TICKS), browser.evaluate(LINES)
    move(browser, 0.3, 0.5, "mousePressed", button="left", clickCount=1)
    move(browser, 0.5, 0.5, button="left", buttons=1)
    move(browser, 0.5, 0.5, "mouseReleased", button="left", clickCount=1)
    zoomed = browser.evaluate(TICKS)
    assert zoomed != ticks
    browser.evaluate(CLICK.format("#legend [data-of='1']"))
    assert browser.evaluate(LINES) == lines / 2, "one run of two"
    zoomed = browser.evaluate(TICKS)  # fitted to the run that is left
    browser.show(page)
    assert browser.evaluate(LINES) == lines / 2 and browser.evaluate(TICKS) == zoomed, "--follow"
    browser.evaluate(CLICK.format("#legend [data-of='1']"))
    browser.evaluate(CLICK.format("#plot-loss .tools button:last-child"))
    assert browser.evaluate(TICKS) == ticks and browser.evaluate(LINES) == lines
    browser.evaluate(CLICK.format("#plot-loss .tools button"))
    assert browser.evaluate(TICKS) != ticks, "logarithmic"
    assert browser.saw("Runtime.exceptionThrown") == []
    browser.evaluate("sessionStorage.clear(), 0")


def test_no_column_is_cut_on_a_phone_or_on_paper(browser, page):
    cut = (
        "[...document.querySelectorAll('td, th')].filter(c => c.getClientRects().length &&"
        " (c.scrollWidth > c.clientWidth + 1"
        " || c.getBoundingClientRect().right > innerWidth)).length"
    )
    browser.show(page, width=375)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true), 0")
    assert browser.evaluate(cut) == 0
    browser.show(page, width=700)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true), 0")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(cut) == 0
    browser.ask("Emulation.setEmulatedMedia", media="")


def test_the_curves_are_visible_in_the_picture_that_the_browser_draws(browser, page, tmp_path):
    browser.show(page)
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 1200 and picture.height > 2000
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for color in COLORS[:2]:  # one per run
        near = (
            np.abs(pixels - list(bytes.fromhex(color[1:]))).max(axis=-1) < 16
        )  # edges are mixed with white
        assert near.sum() > 1000
