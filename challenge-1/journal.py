"""What is kept of a run on the disk: the journal that a cut run goes on from, and whole files."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spool import sync_directory


class NothingToResume(Exception):
    """There is no cut run, or it was one over other sources."""


class Journal:
    """The items of a run, one line each, so that a cut run can go on; a torn last line is ignored.

    A line survives the process; with `sync` it also survives the machine.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def begin(self, head: Mapping[str, Any]) -> None:
        """Start a new journal in place of an old one."""
        write_atomically(self.path, json.dumps(head).encode() + b"\n")
        self._file = self.path.open("ab", buffering=0)

    def resume(self) -> list[dict[str, Any]]:
        """The lines of the cut run, the head first; what is added goes behind them."""
        try:
            whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        except FileNotFoundError:
            raise NothingToResume(
                f"There is no cut run in {self.path.parent}; start one without --resume."
            ) from None
        try:
            lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            lines = []
        if not lines:
            raise NothingToResume(
                f"{self.path} is damaged; start a new run without --resume."
            ) from None
        write_atomically(self.path, whole + b"\n")
        self._file = self.path.open("ab", buffering=0)
        return lines

    def add(self, line: Mapping[str, Any], *, sync: bool = False) -> None:
        """Append a line."""
        self._file.write(json.dumps(line).encode() + b"\n")
        if sync:
            os.fsync(self._file.fileno())

    def close(self, *, keep: bool) -> None:
        """Close it, and remove it when the run is complete."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if not keep:
                self.path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new file stands there already
        sync_directory(path.parent)
