import base64
import hashlib
import io
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import once
import pytest
from PIL import Image

from pretrain.report import __main__ as report
from pretrain.report import drawing
from pretrain.report.plots import plots
from pretrain.report.runlog import duration
from pretrain.report.runs import Run

ROOT = Path(__file__).parents[2]
T0 = 1_700_000_000.0  # seconds since 1970
FULL_RUN = "<img src=x onerror=alert(1)>"  # the name of a folder


def healthy_run(points=200, *, interval=10, noise=0.05, seed=0, evals=10):
    """Records of a run as it should be: loss a noisy power law, a warm-up, a gradient norm that
    settles."""
    rng = np.random.default_rng(seed)
    last = points * interval
    trend = lambda step: 2.7 + 8.2 * (1 + step / (0.01 * last)) ** -0.6  # noqa: E731
    records = [
        {"event": "start", "time": T0, "step": 0, "flags": {"max_iters": last, "grad_clip": 1.0}}
    ]
    for i in range(1, points + 1):
        step, part = i * interval, i / points
        rate = 6e-4 * min(1, part / 0.05) * (0.55 + 0.45 * math.cos(math.pi * part))
        values = {
            "loss": trend(step) + noise * rng.standard_normal(),
            "learning_rate": rate,
            "grad_norm": (0.4 + 6 * math.exp(-part / 0.03)) * math.exp(0.2 * rng.standard_normal()),
            "tokens": step * 1024,
            "tokens_per_second": 5e4 * (1 + 0.03 * rng.standard_normal()),
            "milliseconds_per_step": 20.0,
            "mfu": 0.4,
            "memory_bytes": 10**9,
        }
        records.append({"event": "train", "time": T0 + i, "step": step, **values})
        if evals and step % (last // evals) == 0:
            val = trend(step) + 0.03 + 0.004 * rng.standard_normal()
            values = {"val_loss": val, "train_loss": trend(step), "perplexity": math.exp(val)}
            records.append(
                {"event": "eval", "time": T0 + i + 0.5, "step": step, "accuracy": 0.3, **values}
            )
    return records


def only(records, *fields):
    """The same run with fewer numbers, where few pictures show as much."""
    kept = {"event", "time", "step", "flags", "loss", "val_loss", *fields}
    return [{name: record[name] for name in record if name in kept} for record in records]


def of(records, event):
    return [record for record in records if record["event"] == event]


def write_run(folder, records, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """A run with everything in it, HTML in every text among it, and its page."""
    return once.folder(tmp_path_factory, "full-run", write_full_run) / FULL_RUN


def write_full_run(runs):
    records = healthy_run()
    for i, record in enumerate(of(records, "eval")):
        record["hellaswag"] = {
            "style": "completion",
            "acc_norm": 0.25 + 0.004 * i,
            "acc": 0.25,
            "n": 10042,
        }
        text = f"Once & again <script>alert({i})</script> the mill\nturned."
        records.append(
            {"event": "sample", "step": record["step"], "prompt": "Once &", "text": text}
        )
    records.append({"event": "stop", "time": T0 + 300, "step": 2000, "reason": "finished"})
    folder = runs / FULL_RUN
    write_run(
        folder, records, flags={"data_dir": "<b>data</b>", "max_iters": 2000, "grad_clip": 1.0}
    )
    assert report.main([str(folder)]) == 0


class Elements(HTMLParser):
    """Every element with its attributes, and whether what was opened was closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "source"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_all_its_pictures_and_names_nothing_outside(full_run):
    page = Elements((full_run / "report.html").read_text())
    assert page.open == []
    images = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 9
    for tag, attrs in page.elements:
        assert tag not in {"iframe", "object", "embed"}
        for name in ("src", "srcset", "href"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, name)
    for image in images:
        svg = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()
        references = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', svg)
        assert all((a or b).startswith("#") for a, b in references), "an SVG refers to itself alone"


def test_what_comes_from_the_log_is_text_and_never_markup(full_run):
    text = (full_run / "report.html").read_text()
    assert text.count("<script") == 2 and "<b>data</b>" not in text and "<img src=x" not in text
    page = Elements(text)
    assert page.text.count("<script>alert(9)</script>") == 2, (
        "in the sample and in the line above it"
    )
    assert "<b>data</b>" in page.text and "<img src=x onerror=alert(1)>" in page.text
    assert "default-src 'none'" in text


def test_the_one_script_that_may_run_is_the_one_of_the_policys_hash(full_run):
    text = (full_run / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    (allowed,) = re.findall(r"script-src ([^;]*)", policy)
    data, script = re.findall(r"<script([^>]*)>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert script[0] == "" and allowed == f"'sha256-{digest}'" and "unsafe" not in allowed
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|import\(|fetch\(", script[1])
    assert 'type="application/json"' in data[0], "which no browser runs"
    assert json.loads(data[1])["runs"] == [full_run.name]


def test_every_picture_has_its_numbers_as_a_table_and_in_its_alternative_text(full_run):
    page = (full_run / "report.html").read_text()
    figures = re.findall(r'<figure class="card[^"]*" id="plot-([^"]*)">(.*?)</figure>', page, re.S)
    assert len(figures) == 9 and all("<table" in figure for _, figure in figures)
    evals = of(healthy_run(), "eval")
    val = [record["val_loss"] for record in evals]
    figure = dict(figures)["loss"]
    alt = re.search(r'<img alt="([^"]*)"', figure)[1]
    best = val.index(min(val))
    for word, i in (("first", 0), ("last", -1), ("lowest", best)):
        assert f"{word} {val[i]:.5g} at {evals[i]['step']:,}" in alt
    rows = re.findall(r'<tr><th data-of="step">(.*?)</th>(.*?)</tr>', figure)
    assert [step for step, _ in rows] == [f"{record['step']:,}" for record in evals]
    assert [re.findall(r'"validation">([^<]*)', row)[0] for _, row in rows] == [
        f"{loss:.5g}" for loss in val
    ]


def luminance(color):
    """Of WCAG 2.2, relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_lines_stand_out_from_light_and_dark_cards_and_differ_by_more_than_colour():
    css = (ROOT / "pretrain/report/page.css").read_text()
    cards = re.findall(r"--card: (#[0-9a-f]{6})", css)
    assert len(set(cards)) == 2
    for color in drawing.COLORS:
        for card in cards:
            low, high = sorted((luminance(color), luminance(card)))
            assert (high + 0.05) / (low + 0.05) >= 3, (color, card)
    several = [look for _, look in drawing.looks(8)]
    assert len({look.color for look in several}) == 8
    assert all(a.dash != b.dash for a, b in itertools.pairwise(several))
    ((train, val),) = drawing.looks(1)
    assert train.dash != val.dash and train.color != val.color


def test_every_curve_is_a_png_beside_the_page(full_run):
    names = {path.name for path in full_run.glob("report-*.png")}
    kinds = [
        "loss",
        "loss-tokens",
        "perplexity",
        "accuracy",
        "learning-rate",
        "gradient-norm",
        "throughput",
    ]
    assert names == {f"report-{kind}.png" for kind in [*kinds, "mfu", "hellaswag-completion"]}
    for name in names:
        with Image.open(full_run / name) as image:
            assert image.size == (1080, 680)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20, "more than an empty axis"


def test_headings_figures_samples_and_settings_are_on_the_page(full_run):
    text = Elements((full_run / "report.html").read_text()).text
    for heading in (
        "What looks wrong",
        "Curves",
        "Samples",
        "Configuration",
        "HellaSwag, completion style",
    ):
        assert heading in text
    val = [record["val_loss"] for record in of(healthy_run(), "eval")]
    assert f"{min(val):.4f}" in text and f"{math.exp(min(val)):.2f}" in text
    assert "finished" in text and "28.60 %" in text and "2.05M" in text
    assert "data_dir" in text


def test_the_same_log_gives_the_same_page(full_run, tmp_path):
    assert report.main([str(full_run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (full_run / "report.html").read_bytes()
    assert (tmp_path / "again-loss.png").read_bytes() == (full_run / "report-loss.png").read_bytes()


def test_the_curves_show_the_logs_numbers(full_run):
    axes = {plot.name: plot.figure.axes[0] for plot in plots([Run.load(full_run)])}
    train, evals = of(healthy_run(), "train"), of(healthy_run(), "eval")
    raw, smoothed, val = axes["loss"].lines
    assert raw.get_xdata().tolist() == [record["step"] for record in train]
    assert raw.get_ydata().tolist() == [record["loss"] for record in train]
    assert np.std(np.diff(smoothed.get_ydata()[50:])) < np.std(np.diff(raw.get_ydata()[50:])) / 3
    assert val.get_ydata().tolist() == [record["val_loss"] for record in evals]
    by_tokens = axes["loss-tokens"].lines
    assert by_tokens[0].get_xdata().tolist() == [record["tokens"] for record in train]
    assert by_tokens[2].get_xdata().tolist() == [record["step"] * 1024 for record in evals]
    expected = pytest.approx([record["perplexity"] for record in evals])
    assert axes["perplexity"].lines[0].get_ydata() == expected
    for name, field in (("learning-rate", "learning_rate"), ("gradient-norm", "grad_norm")):
        assert axes[name].lines[0].get_ydata().tolist() == [record[field] for record in train]
    assert set(axes["mfu"].lines[0].get_ydata()) == {40.0}


def test_hellaswag_is_drawn_with_the_published_values_of_its_style(tmp_path):
    records = healthy_run()
    for record in of(records, "eval"):
        record["hellaswag"] = {
            "completion": {"acc_norm": 0.27, "acc_norm_stderr": 0.01, "n": 500},
            "lm-eval": {"acc_norm": 0.28, "n": 500},
        }
    found = {plot.name: plot for plot in plots([Run.load(write_run(tmp_path, records))])}
    expected = {"completion": (29.55, 48.93, 27.0), "lm-eval": (31.14, 50.89, 28.0)}
    for style, (small, large, ours) in expected.items():
        plot = found[f"hellaswag-{style}"]
        heights = {round(float(line.get_ydata()[0]), 2) for line in plot.figure.axes[0].lines}
        assert heights == {small, large, ours, 25.0}
        assert "500 examples" in plot.caption and "10,042" in plot.caption


def test_several_runs_lie_over_each_other(tmp_path, capsys):
    folders = [tmp_path / "a" / "$x_1$", tmp_path / "b" / "_second", tmp_path / "c" / "_second"]
    _, second, third = folders
    kept = [healthy_run(60, seed=1), healthy_run(90, seed=2), healthy_run(5, seed=3, evals=5)]
    for folder, records, rate in zip(folders, kept, (6e-4, 3e-4, 3e-4), strict=True):
        write_run(folder, only(records, "learning_rate"), learning_rate=rate, seed=7)
    output = tmp_path / "new" / "compare.html"
    assert report.main([*map(str, folders), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out and (output.parent / "compare-loss.png").exists()
    text = Elements(output.read_text()).text
    assert "$x_1$" in text and str(second) in text and str(third) in text, (
        "equal names get their paths"
    )
    (differs,) = re.findall(r'<tr class="differs">.*?</tr>', output.read_text())
    assert "learning_rate" in differs and "0.0006" in differs and "0.0003" in differs
    runs = [Run.load(folder) for folder in folders]
    loss = plots(runs)[0].figure
    xs = [line.get_xdata().tolist() for line in loss.axes[0].lines]
    assert all(run.steps.tolist() in xs for run in runs)
    assert len({line.get_color() for line in loss.axes[0].lines}) == 3
    names = [entry.get_text().strip() for entry in loss.legends[0].get_texts()]
    assert names == [run.name for run in runs] + ["training", "validation"]


@pytest.mark.parametrize("records", [1, 2])
def test_a_run_that_has_just_begun_has_a_page(tmp_path, records):
    folder = write_run(tmp_path / "run", healthy_run(evals=0)[:records])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"event": "train", "step": 99')  # being written
    assert report.main([str(folder)]) == 0
    text = Elements((folder / "report.html").read_text()).text
    assert "max_iters" in text, "without config.json the settings come from the log"
    assert ("Nothing to draw yet" in text) == (records == 1)


def test_unknown_events_fields_and_broken_values_are_passed_over(tmp_path):
    records = only(healthy_run(60), "learning_rate", "grad_norm", "tokens")
    records[5:5] = [
        {"event": "weather", "step": "many", "sun": [1, 2]},
        {"event": "train"},
        {"event": "train", "step": None, "loss": 1.0},
        {
            "event": "train",
            "step": 15,
            "loss": None,
            "grad_norm": "?",
            "tokens": {},
            "learning_rate": True,
        },
        {"event": "eval", "step": 15, "val_loss": [3], "hellaswag": 7},
        {"event": "eval", "step": 16, "hellaswag": {"acc_norm": "nan"}},
        {"event": "sample", "step": 15, "texts": ["one", 2], "prompt": None},
        {"no": "event"},
    ]
    folder = write_run(tmp_path / "run", records)
    (folder / "config.json").write_text('{"flags": {"max_')
    assert report.main([str(folder)]) == 0
    run = Run.load(folder)
    assert np.isfinite(run.loss).sum() == 60
    assert "one" in Elements((folder / "report.html").read_text()).text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no metrics.jsonl there"),
        (b"", "no readable line"),
        (b'{"event": "tr', "no readable line"),
    ],
)
def test_a_folder_without_a_log_is_one_clear_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert report.main([str(tmp_path), str(tmp_path / "missing")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {tmp_path}") and message in first
    assert "missing: no such folder" in second, "all problems at once"
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_to_is_one_clear_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", healthy_run(5))
    (tmp_path / "file").write_text("")
    assert report.main([str(folder), "--output", str(tmp_path / "file" / "page.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--output" in line


def test_the_command_needs_no_display_and_no_torch(tmp_path):
    folder = write_run(tmp_path / "run", only(healthy_run(30)))
    code = (
        "import sys; from pretrain.report import __main__ as report\n"
        "code = report.main(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-c", code, str(folder / "metrics.jsonl")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "report.html").exists()


def test_the_help_loads_no_plotting_library():
    code = "import sys, pretrain.report.__main__; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_users_matplotlib_settings_change_nothing_and_stay(tmp_path):
    run = Run.load(write_run(tmp_path, healthy_run(30)))
    plain = drawing.to_svg(plots([run])[0])
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "text.usetex": True}):
        assert drawing.to_svg(plots([run])[0]) == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_a_dark_page_gets_the_same_picture_in_light_ink(full_run):
    svg = drawing.to_svg(plots([Run.load(full_run)])[0])
    dark = drawing.darkened(svg)
    assert drawing.INK in svg and drawing.INK not in dark and drawing.COLORS[0] in dark


def test_a_thinned_curve_keeps_its_spikes():
    rng = np.random.default_rng(5)
    x, y = np.arange(60_000.0), rng.standard_normal(60_000)
    y[[17, 31_234, 59_999]] = 50.0, -40.0, 30.0
    thin_x, thin_y = drawing.thin(x, y)
    assert len(thin_x) <= drawing.POINTS and (np.diff(thin_x) > 0).all()
    assert {50.0, -40.0, 30.0} <= set(thin_y)
    assert (y[thin_x.astype(int)] == thin_y).all()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (200, "3 min 20 s"),
        (18_720, "5 h 12 min"),
        (4 * 19 * 3600, "3 d 4 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_png_and_svg_are_what_they_say(full_run):
    plot = plots([Run.load(full_run)])[0]
    assert Image.open(io.BytesIO(drawing.to_png(plot))).format == "PNG"
    assert "<!--" not in drawing.to_svg(plot), "comments would hold the labels"
