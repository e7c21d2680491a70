"""One JSON document to one struct: strict RFC 8259 in UTF-8, in both parsers the same.

NaN and infinities are refused, among duplicate names the last wins, at most `MAX_DEPTH` levels, no
byte order mark, no half of a UTF-16 pair.
"""

import importlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import Struct

from projection import FromTheFuture, Projection
from windows import FOREVER

MAX_DEPTH: Final = 64
KEPT_BYTES: Final = 16 * 1024  # of a rejected record; a longer one cannot be replayed


class Rejected(Struct, array_like=True):
    """A record that was refused, where it stood, and the first of its bytes."""

    line: int | None
    index: int | None
    offset: int | None
    code: str  # malformed, encoding, depth, shape, too_large, future; of the applier: late
    message: str
    raw: bytes
    whole: bool = True  # these are all its bytes


@dataclass(slots=True)
class Block:
    """What a stretch of a body came to; `lines` are the raw bytes of `events`, in their order."""

    events: list[Any] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    body: bytes | None = None  # the lines in one piece, where they came so
    array: bytes | None = None  # the events as one JSON array, taken apart only when needed

    @property
    def raw(self) -> bytes:
        """The accepted records as NDJSON."""
        return b"\n".join(self.split()) if self.body is None else self.body

    def split(self) -> list[bytes]:
        """The accepted records one by one."""
        if self.array is not None:
            self.lines = [one_line(bytes(each)) for each in RAW_ARRAY.decode(self.array)]
            self.array = None
        return self.lines if self.body is None else self.body.split(b"\n")


RAW_ARRAY: Final = msgspec.json.Decoder(list[msgspec.Raw])


class BodyError(ValueError):
    """The body as a whole cannot be read: status and sentence of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BadRecord(Exception):
    """One record is refused; its neighbours are not."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def rejected(
    bad: BadRecord,
    raw: bytes,
    offset: int | None,
    *,
    line: int | None = None,
    index: int | None = None,
) -> Rejected:
    """The record as it is reported and kept."""
    whole = len(raw) <= KEPT_BYTES
    return Rejected(line, index, offset, bad.code, str(bad), raw[:KEPT_BYTES], whole)


# --- one document -----------------------------------------------------------------------------


class Decoder:
    """One JSON document to one struct, by msgspec or (`engine="ijson"`) by ijson.

    `horizon` tells up to when an event time is believed, in microseconds.
    """

    def __init__(
        self,
        projection: Projection,
        engine: str = "msgspec",
        horizon: Callable[[], int] = lambda: FOREVER,
    ) -> None:
        self.projection = projection
        self.horizon = horizon
        self.levels = projection.levels
        self._decode = self._by_ijson if engine == "ijson" else self._by_msgspec
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(projection.shape)
        self.decode = None if engine == "ijson" else self._decoder.decode
        listed: Any = list[projection.shape]  # type: ignore[name-defined]
        self.decode_array = None if engine == "ijson" else msgspec.json.Decoder(listed).decode

    def one(self, raw: bytes) -> Any:
        """Decode and check one document; raise BadRecord."""
        try:
            raw.decode()
        except UnicodeDecodeError:
            raise BadRecord("encoding", "The record is not valid UTF-8.") from None
        if too_deep(raw):
            raise BadRecord("depth", f"The record is nested deeper than {MAX_DEPTH} levels.")
        event = self._decode(raw)
        self._normalise(event)
        return event

    def normalise(self, events: list[Any]) -> bool:
        """Check what the struct cannot say; False when an event needs a closer look."""
        try:
            self.projection.normalise(events, self.horizon())
        except ValueError:
            return False
        return True

    def _normalise(self, event: Any) -> None:
        try:
            self.projection.normalise((event,), self.horizon())
        except FromTheFuture as error:
            raise BadRecord("future", str(error)) from None
        except ValueError as error:
            raise BadRecord("shape", str(error)) from None

    def accepted(self, body: bytes, arrival: int) -> list[Any]:
        """Decode NDJSON that has been accepted before; ValueError when the spec has changed."""
        if not body:
            return []
        try:
            events = self._decoder.decode_lines(body)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None
        self.projection.normalise(events, FOREVER)
        self.projection.arrived(events, arrival)
        return events

    def convert(self, value: Any) -> Any:
        """The struct of a document that was parsed already; raise BadRecord."""
        try:
            event = msgspec.convert(value, self.projection.shape)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadRecord("shape", _sentence(error)) from None
        self._normalise(event)
        return event

    def _by_msgspec(self, raw: bytes) -> Any:
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            try:  # a wrong shape is found before the end: is it JSON at all?
                _ANY_JSON.decode(raw)
            except (msgspec.DecodeError, RecursionError):
                raise malformed() from None
            raise BadRecord("shape", _sentence(error)) from None
        except (msgspec.DecodeError, RecursionError):
            raise malformed() from None

    def _by_ijson(self, raw: bytes) -> Any:
        if lone_surrogate(raw):
            raise malformed()
        ijson = load_ijson()
        try:
            values = list(ijson.items(io.BytesIO(raw), "", use_float=True))
        except (ijson.JSONError, ArithmeticError, ValueError):
            raise malformed() from None
        if len(values) != 1:
            raise malformed()
        try:
            return msgspec.convert(values[0], self.projection.shape)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadRecord("shape", _sentence(error)) from None


_ANY_JSON: Final = msgspec.json.Decoder(msgspec.Raw)


def malformed() -> BadRecord:
    """The refusal of what is no JSON."""
    return BadRecord("malformed", "The record is not one valid JSON document.")


def _sentence(error: Exception) -> str:
    text = str(error)
    if text.startswith("Expected `object`, got `str`") and " at " not in text:
        text += "; a body in quotes was JSON encoded twice (in Swagger UI choose text/plain)"
    return text[:300] + ("" if text.endswith(".") else ".")


def load_ijson() -> Any:
    """The ijson module; raises BodyError 501 naming the package when it is absent."""
    try:
        return importlib.import_module("ijson")
    except ImportError:
        raise BodyError(
            501,
            "JSON arrays need the package ijson, which is not installed: "
            "pip install -r requirements.txt. NDJSON and single objects work without it.",
        ) from None


# Strings are skipped inside the pattern, so that Python sees one match per bracket only.
TO_BRACKET: Final = re.compile(
    rb'[^"{}\[\]]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}\[\]]*+)*+([{}\[\]])', re.DOTALL
)


def too_deep(raw: bytes) -> bool:
    """Whether a document is nested deeper than MAX_DEPTH levels."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    depth = position = 0
    while match := TO_BRACKET.match(raw, position):
        depth += 1 if match[1] in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
        position = match.end()
    return False


class Depths:
    """Finds records nested deeper than MAX_DEPTH, at the price of counting brackets once.

    A stretch of records in which at most MAX_DEPTH brackets open has no deep one in it. How long a
    `stretch` may be is learned from the ones before, so few are counted twice.
    """

    def __init__(self, levels: int) -> None:
        self.stretch = 2048
        self._levels = levels  # brackets that every valid event opens

    def are_few(self, text: bytes, records: int) -> bool:
        """Whether short records open too few brackets for one of them to be deep."""
        if len(text) > MAX_DEPTH * 3 * records:
            return False
        opened = text.count(b"{") + (text.count(b"[") if b"[" in text else 0)
        return opened - self._levels * records <= MAX_DEPTH - self._levels

    def in_lines(self, body: bytes, lines: int) -> bool:
        """Whether one of these lines is too deep."""
        if self.are_few(body, lines):
            return False
        start, size = 0, len(body)
        while start < size:
            end = size
            if start + self.stretch < size:
                end = body.rfind(b"\n", start, start + self.stretch)
                end = body.find(b"\n", start) if end < 0 else end
                end = size if end < 0 else end
            if self.is_shallow(body[start:end]):
                start = end + 1
            elif body.find(b"\n", start, end) < 0:
                if too_deep(body[start:end]):
                    return True
                start = end + 1
        return False

    def is_shallow(self, text: bytes) -> bool:
        """Whether so few brackets open in a stretch that nothing in it can be deep."""
        opened = len(text) - len(text.translate(None, b"{["))
        if not MAX_DEPTH * 3 // 4 <= opened <= MAX_DEPTH:
            fitting = len(text) * (MAX_DEPTH - 8) // max(opened, 1)
            self.stretch = min(max(fitting, 64), 2 * self.stretch, 1 << 20)
        return opened <= MAX_DEPTH


def lone_surrogate(raw: bytes) -> bool:
    """Whether an escape names half of a UTF-16 pair (ijson would turn it into a question mark)."""
    if b"\\ud" not in raw and b"\\uD" not in raw:
        return False
    try:
        msgspec.json.decode(raw)
    except msgspec.ValidationError:
        return False
    except (msgspec.DecodeError, RecursionError):
        return True
    return False


def one_line(raw: bytes) -> bytes:
    """The document without line breaks: outside strings they are white space, inside illegal."""
    if b"\n" in raw or b"\r" in raw:
        return raw.replace(b"\r", b" ").replace(b"\n", b" ")
    return raw
