"""Saved pipelines, and the secret that signs the cursors through them; both are files."""

import hashlib
import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

ID = re.compile(r"[0-9a-f]{24}")
MAX_SAVED = 100_000


class Full(Exception):
    """No more pipelines can be saved."""


class Saved:
    """Pipelines by what they are: saving the same one twice gives the same id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self) -> None:
        """Make the directory."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, plan: dict[str, Any]) -> str:
        """Keep the plan on the disk; return its id."""
        text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
        name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        path = self.directory / f"{name}.json"
        if not path.exists():
            if sum(1 for _ in self.directory.iterdir()) >= MAX_SAVED:
                raise Full(f"{MAX_SAVED:,} pipelines are saved already.")
            write_whole(path, text.encode())
        return name

    def find(self, name: str) -> dict[str, Any] | None:
        """The plan of this id."""
        if not ID.fullmatch(name):
            return None
        try:
            plan: dict[str, Any] = json.loads((self.directory / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None
        return plan


def cursor_secret(directory: Path, given: str | None) -> bytes:
    """The secret as it was set, or one that is made once and kept beside the data."""
    if given:
        return given.encode()
    path = directory / "cursor.key"
    if not path.exists():
        write_whole(path, secrets.token_bytes(32))
    return path.read_bytes()


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, also after a power cut."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        sync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Make the names of files in it survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
