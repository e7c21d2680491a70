"""Cursors: texts that say where a page ends, sealed so that only what was issued is taken back.

A page of rows seals the values of its last row with what it belongs to; that is no secret, so it
proves the table and the order only. A saved pipeline's cursor is sealed with the service's secret.
"""

import base64
import datetime as dt
import hashlib
import hmac
import json
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from queries import Term
from sources import LazyError

SEAL_BYTES = 16
MAX_CHARACTERS = 4096  # of a signed cursor


class CursorError(LazyError, ValueError):
    """A cursor that was not issued for these rows in this order."""


def make_cursor(values: Sequence[Any], order: Sequence[Term], identity: str) -> str:
    """A text that stands for the row with these values in the terms of the order."""
    payload = {"values": [_encoded(value) for value in values], "order": order_text(order)}
    return _sealed(payload, lambda body: _digest(body, identity))


def read_cursor(cursor: str, identity: str) -> dict[str, Any]:
    """What the cursor stands for; ValueError if it was not issued for this table and order."""
    payload = _opened(cursor, lambda body: _digest(body, identity))
    if payload is None:
        raise CursorError("This is no cursor of a page of these rows.")
    return payload


def _digest(body: bytes, identity: str) -> bytes:
    return hashlib.blake2b(
        identity.encode() + b"\0" + body, digest_size=SEAL_BYTES, person=b"lazy cursor"
    ).digest()


class SignedCursors:
    """Cursors that belong to one plan; without the secret nobody can make or change them."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def write(self, plan: str, state: dict[str, Any]) -> str:
        """A cursor for this plan."""
        return _sealed(state, lambda body: self._signature(plan, body))

    def read(self, plan: str, cursor: str) -> dict[str, Any] | None:
        """What it says, or None: it was not issued for this plan."""
        if len(cursor) > MAX_CHARACTERS:
            return None
        return _opened(cursor, lambda body: self._signature(plan, body))

    def _signature(self, plan: str, body: bytes) -> bytes:
        return hmac.digest(self._secret, plan.encode() + b"\0" + body, "sha256")[:SEAL_BYTES]


# --- seal and body as one text ----------------------------------------------------------------


def _sealed(payload: dict[str, Any], seal: Callable[[bytes], bytes]) -> str:
    body = json.dumps(payload, separators=(",", ":")).encode()
    return _text(seal(body) + body)


def _opened(cursor: str, seal: Callable[[bytes], bytes]) -> dict[str, Any] | None:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (ValueError, TypeError):
        return None
    # Several texts stand for the same bytes; only the one that was issued is a cursor.
    given, body = raw[:SEAL_BYTES], raw[SEAL_BYTES:]
    if _text(raw) != cursor or not hmac.compare_digest(given, seal(body)):
        return None
    payload: dict[str, Any] = json.loads(body)
    return payload


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


# --- values of the last row -------------------------------------------------------------------


def order_text(order: Sequence[Term]) -> list[list[Any]]:
    """The order as a cursor remembers it."""
    return [[term.column, term.descending, term.collation] for term in order]


_TICK = dt.timedelta(microseconds=1)
_ENCODERS: dict[type, tuple[str, Callable[[Any], str], Callable[[str], Any]]] = {
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    dt.datetime: ("time", dt.datetime.isoformat, dt.datetime.fromisoformat),
    dt.date: ("date", dt.date.isoformat, dt.date.fromisoformat),
    dt.time: ("clock", dt.time.isoformat, dt.time.fromisoformat),
    dt.timedelta: ("span", lambda span: str(span // _TICK), lambda text: int(text) * _TICK),
    Decimal: ("decimal", str, Decimal),
    uuid.UUID: ("uuid", str, uuid.UUID),
}


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    try:
        name, encode, _ = _ENCODERS[type(value)]
    except KeyError:
        raise ValueError(
            f"A {type(value).__name__} in the order of the rows cannot be put into a cursor."
        ) from None
    return {name: encode(value)}


def decoded(value: Any) -> Any:
    """A value of the last row as the database takes it."""
    if isinstance(value, dict):
        ((name, text),) = value.items()
        return next(decode for kind, _, decode in _ENCODERS.values() if kind == name)(text)
    return value
