"""Tasks that may be asked for over HTTP: each a plain function with typed arguments.

Files are named relative to SCHEDULER_DATA_DIR and cannot lie outside of it; URLs lead to this
machine only.
"""

import asyncio
import csv
import hashlib
import ipaddress
import math
import os
import stat
import time
from collections import defaultdict
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from context import current_task
from registry import task
from settings import Settings
from tasks import RetryPolicy

READ_BYTES = 1024 * 1024
FETCHED_BYTES = 4 * 1024 * 1024
FETCH_SECONDS = 30.0
MOST_FILES = 100_000
PROGRESS_EVERY = 200

Name = Annotated[str, Field(min_length=1, max_length=500)]
Matrix = Annotated[
    list[Annotated[list[float], Field(min_length=1, max_length=2000)]],
    Field(min_length=1, max_length=2000),
]


@task(kind="io")
def list_files(pattern: Annotated[str, Field(max_length=200)] = "**/*") -> list[str]:
    """The files of the data folder whose names fit, sorted."""
    parts = Path(pattern).parts
    if ".." in parts or Path(pattern).is_absolute():
        raise ValueError("The pattern has to stay inside the data folder.")
    if parts.count("**") > 1:
        raise ValueError("The pattern may have one ** only.")
    root = _root()
    found = []
    for path in root.glob(pattern):
        if path.is_file() and path.resolve().is_relative_to(root):  # a link may lead outside
            found.append(path.relative_to(root).as_posix())
            if len(found) > MOST_FILES:
                raise ValueError(f"More than {MOST_FILES:,} files fit; choose a narrower pattern.")
    return sorted(found)


@task(kind="cpu")
def checksum_files(files: Annotated[list[Name], Field(max_length=MOST_FILES)]) -> dict[str, str]:
    """SHA-256 of files in the data folder, by name; also of the list that a parent returns."""
    sums = {}
    for number, name in enumerate(files):
        with _open(name) as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if number % PROGRESS_EVERY == 0:
            current_task().progress(number / len(files), name)
    return sums


@task(kind="cpu")
def count_primes(
    start: Annotated[int, Field(ge=0, le=10**9)], stop: Annotated[int, Field(ge=0, le=10**9)]
) -> int:
    """How many primes there are from `start` to before `stop`."""
    if stop - start > 50_000_000:
        raise ValueError("A range of at most 50,000,000 numbers is sieved at a time.")
    if stop <= max(start, 2):
        return 0
    start = max(start, 2)
    limit = math.isqrt(stop - 1)
    small = bytearray([1]) * (limit + 1)
    segment = bytearray([1]) * (stop - start)
    for prime in range(2, limit + 1):
        if small[prime]:
            multiples = range(prime * prime, limit + 1, prime)
            small[prime * prime :: prime] = bytes(len(multiples))
            first = max(prime * prime, -(-start // prime) * prime)
            segment[first - start :: prime] = bytes(len(range(first, stop, prime)))
    return sum(segment)


@task(kind="io", retry=RetryPolicy(max_attempts=3, base=0.2))
def fetch_url(url: Annotated[str, Field(max_length=2000)]) -> dict[str, Any]:
    """Status, size and SHA-256 of what a URL of this machine answers; no redirects."""
    import httpx2

    parts = urlsplit(url)
    host = _loopback(parts.hostname or "")
    if parts.scheme not in ("http", "https") or host is None:
        raise ValueError("Only http and https URLs of 127.0.0.0/8, ::1 or localhost are fetched.")
    address = parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host)
    size, digest, deadline = 0, hashlib.sha256(), time.monotonic() + FETCH_SECONDS
    with httpx2.stream(
        "GET", address.geturl(), timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False,
        headers={"Accept-Encoding": "identity"},
    ) as answer:  # fmt: skip
        for piece in answer.iter_raw():  # as sent: nothing is unpacked
            size += len(piece)
            if size > FETCHED_BYTES:
                raise ValueError(f"The answer is larger than {FETCHED_BYTES:,} bytes.")
            if time.monotonic() > deadline:  # a thread cannot be ended from outside
                raise TimeoutError(f"The answer took longer than {FETCH_SECONDS:g} s.")
            digest.update(piece)
    return {"status": answer.status_code, "bytes": size, "sha256": digest.hexdigest()}


@task(kind="cpu")
def aggregate_csv(
    file: Name, group_by: Name, value: Name, delimiter: Literal[",", ";", "\t"] = ","
) -> dict[str, dict[str, float]]:
    """Count, sum, least and greatest of a column, by another; only cells that are numbers."""
    groups: dict[str, list[float]] = defaultdict(list)
    with TextIOWrapper(_open(file), encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter=delimiter)
        for column in (group_by, value):
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"The file has no column {column!r}.")
        for row in rows:
            try:
                number = float(row[value] or "")
            except ValueError:
                continue
            if math.isfinite(number):
                groups[row[group_by]].append(number)
    return {
        name: {
            "count": len(numbers), "sum": math.fsum(numbers), "min": min(numbers),
            "max": max(numbers),
        }
        for name, numbers in sorted(groups.items())
    }  # fmt: skip


@task(kind="cpu")
def transform_matrix(
    matrix: Matrix, operation: Literal["invert", "transpose", "blur", "edges"]
) -> list[list[float]]:
    """A grey image as rows of numbers: inverted, transposed, blurred, or its edges."""
    width = len(matrix[0])
    if any(len(row) != width for row in matrix):
        raise ValueError("All rows have to be of the same length.")
    if operation == "transpose":
        return [list(column) for column in zip(*matrix, strict=True)]
    if operation == "invert":
        top = max(map(max, matrix))
        return [[top - value for value in row] for row in matrix]
    return [[_around(matrix, y, x, operation) for x in range(width)] for y in range(len(matrix))]


@task
async def sleep(seconds: Annotated[float, Field(ge=0, le=3600)]) -> float:
    """Wait so long, without a process or a thread."""
    await asyncio.sleep(seconds)
    return seconds


@task(kind="cpu")
def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    """One mapping of those that the parents return; the last wins."""
    return {name: value for part in parts for name, value in part.items()}


def _around(matrix: list[list[float]], y: int, x: int, operation: str) -> float:
    rows = matrix[max(y - 1, 0) : y + 2]
    cells = [value for row in rows for value in row[max(x - 1, 0) : x + 2]]
    mean = math.fsum(cells) / len(cells)
    return mean if operation == "blur" else abs(matrix[y][x] - mean)


def _root() -> Path:
    return Settings().scheduler_data_dir.resolve()


def _open(name: str) -> BufferedReader:
    """A plain file of the data folder; errors name it as the caller did, never where it lies."""
    root = _root()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{name!r} lies outside of the data folder.")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise FileNotFoundError(f"The data folder has no file {name!r}.") from None
    except OSError as error:
        raise OSError(f"{name!r} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe would never end
        os.close(descriptor)
        raise ValueError(f"{name!r} is not a plain file.")
    return os.fdopen(descriptor, "rb")


def _loopback(host: str) -> str | None:
    """The address that a URL is to have; a name, or a zone of an address, could lead elsewhere."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if not address.is_loopback or getattr(address, "scope_id", None):
        return None
    return f"[{address}]" if address.version == 6 else str(address)
