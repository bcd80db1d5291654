"""One page that shows a run, or several over each other: curves, samples, settings, and what looks
wrong.

    $ python -m pretrain.report checkpoints
    checkpoints, step 1,230: A loss spike
    checkpoints/report.html, and the curves as report-*.png beside it
    $ python -m pretrain.report runs/a runs/b runs/c --csv runs.csv     # the best run first
    $ python -m pretrain.report checkpoints --follow         # written anew while the run goes on
    $ python -m pretrain.report checkpoints --serve          # http://127.0.0.1:8000/, no file

The page holds its pictures and loads nothing. It can be made at any time, while the run goes on as
well.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pretrain
from pretrain import files
from pretrain.errors import program
from pretrain.flags import COUNT, number, parse
from pretrain.report import compare
from pretrain.report.drawing import to_png
from pretrain.report.findings import Finding, find
from pretrain.report.live import follow, serve
from pretrain.report.page import html_page
from pretrain.report.plots import plots
from pretrain.report.runs import Run, RunError

PROGRAM = "python -m pretrain.report"
FOLLOWED_EVERY, PORT = 60, 8000  # seconds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Curves, samples and findings of training runs as one page.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"report {pretrain.__version__}")
    parser.add_argument(
        "out_dirs", nargs="*", metavar="OUT_DIR", help="--out_dir of a run; several are overlaid"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: report.html in the first OUT_DIR); PNGs go beside it",
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="also a table of the runs for a spreadsheet; - prints it"
    )
    live = parser.add_mutually_exclusive_group()
    live.add_argument(
        "--follow",
        type=COUNT,
        nargs="?",
        const=FOLLOWED_EVERY,
        metavar="SECONDS",
        help="write the page anew while a run goes on, and let the browser load it again, every so "
        f"many seconds ({FOLLOWED_EVERY}); PNGs and tables at the end",
    )
    live.add_argument(
        "--serve",
        type=number(int, minimum=0, maximum=65535),
        nargs="?",
        const=PORT,
        metavar="PORT",
        help="show the page at http://127.0.0.1:PORT/, to this machine alone, and write nothing "
        f"({PORT}; from elsewhere: ssh -L {PORT}:127.0.0.1:{PORT} HOST)",
    )
    parser.add_argument("--md", metavar="FILE", help="the same as Markdown; - prints it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. 1 and a line on stderr for each folder that holds no log, 2 for wrong
    flags."""
    args, _, problems = parse(build_parser(), sys.argv[1:] if argv is None else argv)
    if not args.out_dirs and not problems:
        problems = ["OUT_DIR: name the folder of a run"]
    if problems:
        _say(problems)
        return 2
    with program(PROGRAM) as outcome:
        outcome.status = report(args)
    return outcome.status


def report(args: argparse.Namespace) -> int:
    """Load, write and say; the exit status. Raises UserError."""
    if args.serve is not None:
        serve(args.out_dirs, lambda runs: _page(runs, FOLLOWED_EVERY), args.serve)
        return 0
    runs, problems = [], []
    for out_dir in dict.fromkeys(args.out_dirs):
        try:
            runs.append(Run.load(out_dir))
        except RunError as problem:
            problems.append(str(problem))
    if problems:
        _say(problems)
        return 1
    page = Path(args.output) if args.output else runs[0].folder / "report.html"
    page = page / "report.html" if page.is_dir() else page
    try:
        if args.follow:
            runs = _follow(list(dict.fromkeys(args.out_dirs)), page, args.follow)
        found = _found(runs)
        write_report(runs, found, page)
        tables = write_tables(runs, args.csv, args.md)
    except BrokenPipeError:
        raise
    except OSError as error:
        _say([f"{error.filename or page}: {error.strerror}; name a writable --output"])
        return 1
    for run, finding in found:
        print(f"{run.name}, step {finding.step:,}: {finding.title}")
    print(f"{page}, and the curves as {page.stem}-*.png beside it{tables}")
    return 0


def _found(runs: list[Run]) -> list[tuple[Run, Finding]]:
    """The findings of the runs, which have names of their own after it."""
    _name_apart(runs)
    return [(run, finding) for run in runs for finding in find(run)]


def _page(runs: list[Run], seconds: int) -> str:
    """The page of runs as they are; it is loaded again while one of them goes on."""
    found = _found(runs)
    again = seconds if any(run.is_going for run in runs) else 0
    return html_page(runs, found, plots(runs), renewed_every=again)


def _follow(folders: list[str], page: Path, seconds: int) -> list[Run]:
    """Write the page until no run goes on; the runs as they are then."""
    last: list[Run] = []

    def write(runs: list[Run], is_going: bool) -> None:
        if is_going:
            if not last:
                print(f"{page}, again every {seconds} s while a run goes on", flush=True)
            page.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(page, _page(runs, seconds))
        last[:] = runs

    follow(folders, write, seconds)
    return last


def write_report(runs: list[Run], found: list[tuple[Run, Finding]], page: Path) -> None:
    """Write the page, and every plot as <page's stem>-<plot's name>.png beside it: all of them, or
    on an error none. Raises OSError."""
    page.parent.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, Path]] = []
    try:
        for path, data in _contents(runs, found, page):
            # A full disk shows before anything has its name, and before more is drawn for it.
            part = path.with_name(f".{path.name}.new")
            written.append((part, path))
            try:
                with files.atomic_write(part) as file:
                    file.write(data)
            except OSError as error:
                error.filename = str(path)  # as its user calls it
                raise
        for part, path in written:
            files.publish(part, path)
    finally:
        for part, _ in written:
            with contextlib.suppress(OSError):
                part.unlink()


def _contents(
    runs: list[Run], found: list[tuple[Run, Finding]], page: Path
) -> Iterator[tuple[Path, bytes]]:
    """The files of a report, each drawn when it is asked for."""
    pictures = plots(runs)
    for plot in pictures:
        yield page.with_name(f"{page.stem}-{plot.name}.png"), to_png(plot)
    yield page, html_page(runs, found, pictures).encode("utf-8", "replace")


def write_tables(runs: list[Run], csv: str | None, markdown: str | None) -> str:
    """Write or print the comparison where it is asked for; what the last line says of it."""
    said = ""
    for target, form in ((csv, compare.to_csv), (markdown, compare.to_markdown)):
        if target == "-":
            print(form(compare.compare(runs)), end="")
        elif target:
            files.write_text(target, form(compare.compare(runs)))
            said += f"; {target}"
    return said


def _say(problems: list[str]) -> None:
    for problem in problems:
        with contextlib.suppress(OSError, ValueError):
            line = " ".join(problem.encode("utf-8", "replace").decode().split())
            print(f"error: {line}", file=sys.stderr)


def _name_apart(runs: list[Run]) -> None:
    """Runs whose folders have the same name get their paths as names."""
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            run.name = str(run.folder)


if __name__ == "__main__":
    sys.exit(main())
