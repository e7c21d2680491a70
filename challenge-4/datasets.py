"""The data sets that pipelines run over: airports, a table, and what was uploaded.

An upload is received onto the disk, checked and rewritten as NDJSON there, and takes its name when
it is whole; who reads an older version reads it to its end.
"""

import contextlib
import json
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import airportsdata

from databases import BUNDLED, open_sqlite
from files import BadLineError, CsvFile, NdjsonFile
from lazy import LazyCollection
from tables import DatabaseLazyCollection

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CHECK_ROWS = 256  # rows between two looks at the clock
SQLITE_STEPS = 20_000  # of its virtual machine between two looks
MAX_FIELDS = 1000
MAX_DATASETS = 1000
MAX_NESTING = 64
EVENT_FIELDS = ("event_id", "source", "event_type", "data", "timestamp")


class Stopped(Exception):
    """A run was ended: its time was up, or nobody waits for it any more."""


class UploadRefused(Exception):
    """An upload cannot be kept, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Budget:
    """How long a run may go on, and whether somebody still waits for it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._deadline = clock() + seconds
        self.left = threading.Event()

    def over(self) -> bool:
        """Whether to stop."""
        return self.left.is_set() or self._clock() > self._deadline

    def check(self) -> None:
        """Stop if it is time."""
        if self.over():
            raise Stopped(f"It ran for more than {self.seconds:g} s.")

    def watch(self, rows: Iterable[Any]) -> Iterator[Any]:
        """The rows, with a look at the clock now and then."""
        self.check()
        for number, row in enumerate(rows):
            if number % CHECK_ROWS == 0:
                self.check()
            yield row


@dataclass(frozen=True)
class Dataset:
    """What is known about a data set."""

    name: str
    kind: Literal["airports", "table", "upload"]
    fields: list[str]
    rows: int | None = None
    bytes: int | None = None


class Datasets:
    """All data sets of the service; uploads live in a directory."""

    def __init__(self, directory: Path, database_url: str | None, max_bytes: int) -> None:
        self.directory = directory
        self.database_url = database_url
        self.max_bytes = max_bytes

    def prepare(self) -> None:
        """Make the directory, and clear what an interrupted upload left."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.part"):
            leftover.unlink()

    @cached_property
    def airports(self) -> list[dict[str, Any]]:
        """28,000 airports with code, place and elevation in feet."""
        return [dict(airport) for airport in airportsdata.load("ICAO").values()]

    def all(self) -> list[Dataset]:
        """Every data set, by name."""
        uploads = [self.find(path.stem) for path in self.directory.glob("*.json")]
        built_in = [self.find("airports"), self.find("events")]
        return sorted((d for d in built_in + uploads if d is not None), key=lambda d: d.name)

    def find(self, name: str) -> Dataset | None:
        """The data set of this name."""
        if name == "airports":
            rows = self.airports
            return Dataset(name, "airports", list(rows[0]), len(rows))
        if name == "events":
            return Dataset(name, "table", list(EVENT_FIELDS))
        if not NAME.fullmatch(name):
            return None
        try:
            return Dataset(**json.loads((self.directory / f"{name}.json").read_text("utf-8")))
        except FileNotFoundError:
            return None

    def open(self, dataset: Dataset, budget: Budget) -> LazyCollection[Any]:
        """Its rows, lazily, for as long as the budget lasts."""
        if dataset.kind == "airports":
            return LazyCollection(_Watched(self.airports, budget))
        if dataset.kind == "table":
            return DatabaseLazyCollection.from_table(
                "processed_events", connection=self._connect(budget)
            )
        path = self.directory / f"{dataset.name}.ndjson"
        return LazyCollection(_Watched(NdjsonFile(path, "raise"), budget))

    def _connect(self, budget: Budget) -> Any:
        """A factory of connections that stop when the budget is over."""
        url = self.database_url
        if url is not None and url.startswith(("postgres:", "postgresql:")):
            milliseconds = max(1, int(budget.seconds * 1000))

            def connect() -> Any:
                import psycopg

                return psycopg.connect(
                    url, options=f"-c statement_timeout={milliseconds}", connect_timeout=5
                )

            return connect

        def open_file() -> sqlite3.Connection:
            path = (url or str(BUNDLED)).removeprefix("sqlite:///").removeprefix("sqlite:")
            connection = open_sqlite(path)
            connection.set_progress_handler(lambda: int(budget.over()), SQLITE_STEPS)
            return connection

        return open_file

    # --- uploads ---

    def receive(self) -> Any:
        """A file for the bytes of an upload, removed unless it is kept."""
        handle, name = tempfile.mkstemp(suffix=".part", dir=self.directory)
        return os.fdopen(handle, "wb"), Path(name)

    def keep(self, received: Path, name: str, form: str, bad_lines: str) -> tuple[Dataset, int]:
        """Check the rows and give the data set its name; return it and how many were skipped."""
        if not NAME.fullmatch(name):
            raise UploadRefused(422, "A name has 1 to 64 letters, digits, - and _.")
        if name in ("airports", "events"):
            raise UploadRefused(409, f"{name} is built in; choose another name.")
        known = self.find(name) is not None
        if not known and len(list(self.directory.glob("*.json"))) >= MAX_DATASETS:
            raise UploadRefused(429, f"There are {MAX_DATASETS:,} data sets already.")
        try:
            rewriter = _Rewriter(received, form, bad_lines, self.max_bytes)
            target = received.with_suffix(".rows.part")
            try:
                rows, fields = rewriter.write(target)
                size = target.stat().st_size
                dataset = Dataset(name, "upload", fields, rows, size)
                about = received.with_suffix(".about.part")
                about.write_text(json.dumps(asdict(dataset)), "utf-8")
                target.replace(self.directory / f"{name}.ndjson")
                about.replace(self.directory / f"{name}.json")
            finally:
                target.unlink(missing_ok=True)
        except BadLineError as error:
            raise UploadRefused(422, f"Line {error.line:,}: {error.reason}") from None
        return dataset, rewriter.skipped


class _Watched:
    """Rows that can be read again and again within a budget."""

    def __init__(self, rows: Iterable[Any], budget: Budget) -> None:
        self.rows, self.budget = rows, budget

    def __iter__(self) -> Iterator[Any]:
        return self.budget.watch(self.rows)


class _Rewriter:
    """Turns what was received into NDJSON of objects, in constant memory."""

    def __init__(self, received: Path, form: str, bad_lines: str, max_bytes: int) -> None:
        self.received, self.form, self.bad_lines = received, form, bad_lines
        self.max_bytes = max_bytes
        self.skipped = 0
        self.fields: dict[str, None] = {}

    def write(self, target: Path) -> tuple[int, list[str]]:
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

    def _ndjson(self) -> Iterator[dict[str, Any]]:
        file = _CountingFile(self.received, self.bad_lines)
        for line, row in file.numbered():
            reason = _unfit(row)
            if reason is None and len(self.fields.keys() | row.keys()) > MAX_FIELDS:
                reason = f"more than {MAX_FIELDS:,} different fields."
            if reason is not None:
                file.bad(line, reason)
                continue
            self.fields.update(dict.fromkeys(row))
            yield row
        self.skipped = file.skipped

    def _csv(self) -> Iterator[dict[str, Any]]:
        """A column whose every value is a number holds numbers; empty is null there."""
        numeric: dict[str, bool] = {}
        for row in CsvFile(self.received, "skip", ","):
            for name, text in row.items():
                if text:
                    numeric[name] = numeric.get(name, True) and _is_number(text)
        file = _CountingCsv(self.received, self.bad_lines, ",")
        for row in file:
            self.fields.update(dict.fromkeys(row))
            yield {
                name: (_number(text) if text else None) if numeric.get(name) else text
                for name, text in row.items()
            }
        self.skipped = file.skipped


class _CountingFile(NdjsonFile):
    skipped = 0

    def bad(self, line: int, reason: str, error: Exception | None = None) -> None:
        super().bad(line, reason, error)
        self.skipped += 1

    def numbered(self) -> Iterator[tuple[int, Any]]:
        for row in self:
            yield self.line, row


class _CountingCsv(CsvFile):
    skipped = 0

    def bad(self, line: int, reason: str, error: Exception | None = None) -> None:
        super().bad(line, reason, error)
        self.skipped += 1


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
