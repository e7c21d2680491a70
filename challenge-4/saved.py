"""Saved pipelines, and the signed cursors that page through them."""

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

ID = re.compile(r"[0-9a-f]{24}")
MAX_SAVED = 100_000
MAX_CURSOR_CHARACTERS = 4096


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


class Cursors:
    """Texts that say where to go on in one plan; nobody else can make or change them."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def write(self, plan: str, state: dict[str, Any]) -> str:
        """A cursor for this plan."""
        body = json.dumps(state, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._seal(plan, body) + body).decode().rstrip("=")

    def read(self, plan: str, cursor: str) -> dict[str, Any] | None:
        """What it says, or None: it was not issued for this plan."""
        if len(cursor) > MAX_CURSOR_CHARACTERS:
            return None
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            return None
        seal, body = raw[:16], raw[16:]
        if not hmac.compare_digest(seal, self._seal(plan, body)):
            return None
        state: dict[str, Any] = json.loads(body)
        return state

    def _seal(self, plan: str, body: bytes) -> bytes:
        return hmac.digest(self._secret, plan.encode() + b"\0" + body, "sha256")[:16]


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
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
