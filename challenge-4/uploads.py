"""An upload becomes a data set: checked and rewritten as NDJSON of objects, in constant memory.

Bytes, lines and time are bounded where lines are read, because a small gzip file may unpack to
anything. A bad line refuses the whole, or is left out and counted.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from budgets import CHECK_ROWS, Budget
from files import BadLineError, CsvFile, NdjsonFile

MAX_FIELDS = 1000
MAX_NAME = 200  # characters of a field's name, as in a pipeline
MAX_NESTING = 64


class UploadRefused(Exception):
    """An upload cannot be kept, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Rewriter:
    """Turns what was received into NDJSON of objects, in constant memory."""

    def __init__(
        self, received: Path, form: str, bad_lines: str, max_bytes: int, budget: Budget
    ) -> None:
        self.received, self.form, self.bad_lines = received, form, bad_lines
        self.max_bytes, self.budget = max_bytes, budget
        self.skipped = 0
        self.fields: dict[str, None] = {}

    def write(self, target: Path) -> tuple[int, list[str]]:
        """Write the rows; return their number and the names of their fields."""
        rows = size = 0
        encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode
        with target.open("w", encoding="ascii") as out:
            for row in self._rows():
                size += out.write(f"{encode(row)}\n")
                if size > self.max_bytes:  # also of what a small gzip file unpacks to
                    raise UploadRefused(413, f"Its rows take more than {self.max_bytes:,} bytes.")
                rows += 1
            out.flush()
            os.fsync(out.fileno())
        return rows, list(self.fields)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.form == "csv":
            return self._csv()
        return self._ndjson()

    def _bounded(self, file: Any) -> "_Bounded":
        return _Bounded(file, self.max_bytes, self.budget)

    def _ndjson(self) -> Iterator[dict[str, Any]]:
        file = _CheckedNdjson(self.received, self.bad_lines, self._bounded)
        for row in file:
            reason = _unfit(row)
            if reason is None and len(self.fields.keys() | row.keys()) > MAX_FIELDS:
                reason = f"more than {MAX_FIELDS:,} different fields."
            if reason is not None:
                file.bad(file.line, reason)
                continue
            self.fields.update(dict.fromkeys(row))
            yield row
        self.skipped = file.skipped

    def _csv(self) -> Iterator[dict[str, Any]]:
        """A column whose every value is a number holds numbers; empty is null there."""
        numeric: dict[str, bool] = {}
        for row in _CheckedCsv(self.received, "skip", self._bounded):
            for name, text in row.items():
                if text:
                    numeric[name] = numeric.get(name, True) and _is_number(text)
        file = _CheckedCsv(self.received, self.bad_lines, self._bounded)
        for row in file:
            yield {
                name: (_number(text) if text else None) if numeric.get(name) else text
                for name, text in row.items()
            }
        self.fields = dict.fromkeys(file.fields)
        self.skipped = file.skipped


class _Checked:
    """What an upload adds to reading a file: limits, and a count of the lines left out."""

    bounded: Callable[[Any], "_Bounded"]
    skipped = 0

    def read(self, file: Any) -> Iterator[Any]:
        return super().read(self.bounded(file))  # type: ignore[misc,no-any-return]

    def bad(self, line: int, reason: str, error: Exception | None = None) -> None:
        super().bad(line, reason, error)  # type: ignore[misc]
        self.skipped += 1


class _CheckedNdjson(_Checked, NdjsonFile):
    def __init__(self, path: Path, bad_lines: str, bounded: Callable[[Any], "_Bounded"]) -> None:
        super().__init__(path, bad_lines)
        self.bounded = bounded


class _CheckedCsv(_Checked, CsvFile):
    def __init__(self, path: Path, bad_lines: str, bounded: Callable[[Any], "_Bounded"]) -> None:
        super().__init__(path, bad_lines, ",")
        self.bounded = bounded
        self.fields: list[str] = []

    def check_header(self, header: list[str]) -> None:
        super().check_header(header)
        if len(header) > MAX_FIELDS:
            raise BadLineError(self.path.name, 1, f"more than {MAX_FIELDS:,} fields.")
        if reason := next(filter(None, map(_unfit_name, header)), None):
            raise BadLineError(self.path.name, 1, reason)
        self.fields = header


class _Bounded:
    """Lines of a file, up to a number of bytes: a small gzip file may unpack to a huge one."""

    def __init__(self, file: Any, limit: int, budget: Budget) -> None:
        self.file, self.limit, self.budget = file, limit, budget
        self.left, self.lines = limit, 0

    def readline(self, size: int) -> bytes:
        self.lines += 1
        if self.lines % CHECK_ROWS == 0:
            self.budget.check()
        line: bytes = self.file.readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise UploadRefused(413, f"Unpacked it has more than {self.limit:,} bytes.")
        return line


def _unfit_name(name: str) -> str | None:
    if len(name) > MAX_NAME:
        return f"the name of a field has more than {MAX_NAME} characters."
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "the name of a field is not valid Unicode."
    return None


def _unfit(row: Any) -> str | None:
    """Why this JSON value cannot be a row."""
    if not isinstance(row, dict):
        return "a row is a JSON object."
    todo: list[tuple[Any, int]] = [(row, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > MAX_NESTING:
            return f"nested more than {MAX_NESTING} levels deep."
        if isinstance(value, dict):
            if depth == 1 and (reason := next(filter(None, map(_unfit_name, value)), None)):
                return reason
            todo += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list):
            todo += [(part, depth + 1) for part in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "a whole number has at most 64 bits."
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            return "a number is too large."
    return None


_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?")


def _is_number(text: str) -> bool:
    return len(text) <= 60 and _NUMBER.fullmatch(text) is not None


def _number(text: str) -> int | float:
    with contextlib.suppress(ValueError):
        return int(text)
    return float(text)
