"""One page that shows a run, or several over each other: curves, samples, settings, and what looks
wrong.

    $ python -m pretrain.report checkpoints
    checkpoints, step 1,230: A loss spike
    checkpoints/report.html, and the curves as report-*.png beside it

The page holds its pictures and loads nothing. It can be made at any time, while the run goes on as
well.
"""

import argparse
import os
import sys
from pathlib import Path

from pretrain.report.drawing import to_png
from pretrain.report.findings import Finding, find
from pretrain.report.page import html_page
from pretrain.report.plots import plots
from pretrain.report.runs import Run, RunError


def main(argv: list[str] | None = None) -> int:
    """Write the page; 1 and one line on stderr for a folder that holds no log."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.report",
        description="Curves, samples and findings of training runs as one page.",
    )
    parser.add_argument(
        "out_dirs", nargs="+", metavar="OUT_DIR", help="--out_dir of a run; several are overlaid"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: report.html in the first OUT_DIR); PNGs go beside it",
    )
    args = parser.parse_args(argv)
    runs, problems = [], []
    for out_dir in dict.fromkeys(args.out_dirs):
        try:
            runs.append(Run.load(out_dir))
        except RunError as problem:
            problems.append(f"error: {problem}")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    page = Path(args.output) if args.output else runs[0].folder / "report.html"
    page = page / "report.html" if page.is_dir() else page
    _name_apart(runs)
    found = [(run, finding) for run in runs for finding in find(run)]
    try:
        write_report(runs, found, page)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or page}: {error.strerror}; name a writable --output",
            file=sys.stderr,
        )
        return 1
    for run, finding in found:
        print(f"{run.name}, step {finding.step:,}: {finding.title}")
    print(f"{page}, and the curves as {page.stem}-*.png beside it")
    return 0


def write_report(runs: list[Run], found: list[tuple[Run, Finding]], page: Path) -> None:
    """Write the page, and every plot as <page's stem>-<plot's name>.png beside it. The page comes
    last."""
    pictures = plots(runs)
    page.parent.mkdir(parents=True, exist_ok=True)
    for plot in pictures:
        _write(page.with_name(f"{page.stem}-{plot.name}.png"), to_png(plot))
    _write(page, html_page(runs, found, pictures).encode())


def _name_apart(runs: list[Run]) -> None:
    """Runs whose folders have the same name get their paths as names."""
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            run.name = str(run.folder)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
