"""The data sets that pipelines run over: airports, a table, and what was uploaded.

An upload is received onto the disk, checked and rewritten as NDJSON there, and takes its name when
it is whole; who reads an older version reads it to its end.
"""

import json
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard

import airportsdata

from budgets import Budget
from databases import BUNDLED, open_sqlite, postgres_driver
from files import BadLineError, NdjsonFile
from lazy import LazyCollection
from saved import write_whole
from tables import DatabaseLazyCollection
from uploads import Rewriter, UploadRefused

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CONNECT_SECONDS = 5
SQLITE_STEPS = 20_000  # of its virtual machine between two looks
FETCH_ROWS = 500  # of PostgreSQL, between two looks at the clock
MAX_DATASETS = 1000
EVENT_FIELDS = ("event_id", "source", "event_type", "data", "timestamp")


@dataclass(frozen=True)
class Dataset:
    """What is known about a data set."""

    name: str
    kind: Literal["airports", "table", "upload"]
    fields: list[str]
    rows: int | None = None
    bytes: int | None = None
    file: str = ""  # of the rows of an upload


class Datasets:
    """All data sets of the service; uploads live in a directory."""

    def __init__(self, directory: Path, database_url: str | None, max_bytes: int) -> None:
        self.directory = directory
        self.database_url = database_url
        if _is_postgres(database_url):
            postgres_driver()  # refuse at the start, not with the first query
        self.max_bytes = max_bytes
        self._switching = threading.Lock()

    def prepare(self) -> None:
        """Make the directory, and clear what an interrupted upload left."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        used = {dataset.file for dataset in self.all()}
        for path in self.directory.iterdir():
            if path.suffix != ".json" and path.name not in used:
                path.unlink()

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
            about = json.loads((self.directory / f"{name}.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        return Dataset(**{"file": f"{name}.ndjson", **about})  # older ones do not name it

    def open(self, dataset: Dataset, budget: Budget) -> LazyCollection[Any]:
        """Its rows, lazily, for as long as the budget lasts."""
        if dataset.kind == "airports":
            return LazyCollection(_Watched(self.airports, budget))
        if dataset.kind == "table":
            return DatabaseLazyCollection.from_table(
                "processed_events", fetch_size=FETCH_ROWS, connection=self._connect(budget)
            )
        path = self.directory / dataset.file
        return LazyCollection(_Watched(NdjsonFile(path, "raise"), budget))

    def _connect(self, budget: Budget) -> Any:
        """A factory of connections that stop when the budget is over."""
        url = self.database_url
        if _is_postgres(url):
            milliseconds = max(1, int(budget.seconds * 1000))

            def connect() -> Any:
                import psycopg

                class Watched(psycopg.ServerCursor[Any]):
                    def fetchmany(self, size: int = 0) -> list[Any]:
                        budget.check()
                        return super().fetchmany(size)

                connection = psycopg.connect(url, connect_timeout=CONNECT_SECONDS)
                connection.server_cursor_factory = Watched
                connection.execute(f"SET statement_timeout = {milliseconds}")
                connection.commit()
                return connection

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

    def keep(
        self, received: Path, name: str, form: str, bad_lines: str, budget: Budget
    ) -> tuple[Dataset, int]:
        """Check the rows and give the data set its name; return it and how many were skipped."""
        if not NAME.fullmatch(name):
            raise UploadRefused(422, "A name has 1 to 64 letters, digits, - and _.")
        if name in ("airports", "events"):
            raise UploadRefused(409, f"{name} is built in; choose another name.")
        known = self.find(name) is not None
        if not known and len(list(self.directory.glob("*.json"))) >= MAX_DATASETS:
            raise UploadRefused(429, f"There are {MAX_DATASETS:,} data sets already.")
        try:
            rewriter = Rewriter(received, form, bad_lines, self.max_bytes, budget)
            target = received.with_suffix(".rows.part")
            try:
                rows, fields = rewriter.write(target)
                size = target.stat().st_size
                file = f"{name}.{received.stem}.ndjson"
                dataset = Dataset(name, "upload", fields, rows, size, file)
                self._switch_to(dataset, target)
            finally:
                target.unlink(missing_ok=True)
        except BadLineError as error:
            raise UploadRefused(422, f"Line {error.line:,}: {error.reason}") from None
        return dataset, rewriter.skipped

    def _switch_to(self, dataset: Dataset, rows: Path) -> None:
        """What is said about the rows names their file: both change at one moment, or neither."""
        with self._switching:
            before = self.find(dataset.name)
            rows.replace(self.directory / dataset.file)
            write_whole(
                self.directory / f"{dataset.name}.json", json.dumps(asdict(dataset)).encode()
            )
            if before is not None:
                (self.directory / before.file).unlink(missing_ok=True)


class _Watched:
    """Rows that can be read again and again within a budget."""

    def __init__(self, rows: Iterable[Any], budget: Budget) -> None:
        self.rows, self.budget = rows, budget

    def __iter__(self) -> Iterator[Any]:
        return self.budget.watch(self.rows)


def _is_postgres(url: str | None) -> TypeGuard[str]:
    return url is not None and url.startswith(("postgres:", "postgresql:"))
