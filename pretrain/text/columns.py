"""A text column of a source's own, behind a `#`, and files that are named more than once.

>>> split("news.parquet#content")
('news.parquet', 'content')
"""

import glob
import os
from dataclasses import replace

from pretrain.text.readers import format_of
from pretrain.text.source import File, SourceError

SHOWN = 3  # files that are named in a note


def split(given: str | os.PathLike) -> tuple[str, str | None]:
    """(path, column, None where none is named).

    What exists under the whole name is that: names may hold a `#`. So are names that go on behind
    it as paths do: with a folder, a pattern, or the ending of a format.
    """
    given = os.fspath(given)
    path, mark, column = given.rpartition("#")
    is_path = "/" in column or os.sep in column or glob.has_magic(column) or format_of(column)
    if not (mark and path and column) or is_path or os.path.lexists(given):
        return given, None
    return path, column


class Chosen:
    """The files of a source in the order in which they were named, each once."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}  # by real path
        self._again: list[str] = []  # paths of those that were named again

    def add(self, real: str, file: File, column: str | None) -> bool:
        """Whether the file was not here yet. A column that is named for it goes before the common
        one of a folder that it lies in. Raises SourceError for two."""
        if file.kind == "txt":
            column = None
        before = self.files.get(real)
        if before is None:
            self.files[real] = replace(file, column=column)
            return True
        if before.column == column:
            self._again.append(before.path)
        elif before.column and column:
            raise SourceError(
                f"{file.path}: given with the columns {before.column!r} and {column!r}; give one"
            )
        elif column:
            self.files[real] = replace(before, column=column)
        return False

    def notes(self) -> tuple[str, ...]:
        """A line where files were named again, for people."""
        again = list(dict.fromkeys(self._again))
        if not again:
            return ()
        more = f" and {len(again) - SHOWN:,} more" if len(again) > SHOWN else ""
        each = (
            "is given more than once and" if len(again) == 1 else "are given more than once, each"
        )
        return (f"{', '.join(again[:SHOWN])}{more} {each} read once",)
