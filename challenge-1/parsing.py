"""From bytes to events: NDJSON in blocks, one object, or an array, in constant memory.

A block of NDJSON is decoded in one call into structs that project the needed fields. Only when
the block as a whole fails is it read line by line, so that a bad line costs its neighbours
nothing. Arrays go through ijson, element by element, behind a scanner that knows where each
element starts and how deep it is nested. `Reader.feed` takes bytes as they come and yields
`Block`s; `Reader.finish` yields the rest.

On every path: strict RFC 8259 in UTF-8 without a byte order mark; NaN and infinities refused;
among duplicate names the last wins; at most `MAX_DEPTH` levels.
"""

import importlib
import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from projection import FromTheFuture, Projection
from windows import FOREVER

BLOCK_BYTES: Final = 128 * 1024
MAX_DEPTH: Final = 64
KEPT_BYTES: Final = 16 * 1024  # of a rejected record; a longer one cannot be replayed
PIECE_BYTES: Final = 256 * 1024  # at most this much leaves the decompressor at once

Form = Literal["ndjson", "json"]


class Rejected(Struct, array_like=True):
    """A record that was refused, where it stood, and the first of its bytes."""

    line: int | None
    index: int | None
    offset: int | None
    code: str  # malformed, encoding, depth, shape, too_large, future; of the applier: late
    message: str
    raw: bytes
    whole: bool = True  # these are all its bytes


@dataclass
class Block:
    """What a stretch of a body came to; `lines` are the raw bytes of `events`, in their order."""

    events: list[Any] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    body: bytes | None = None  # the lines in one piece, where they came so

    @property
    def raw(self) -> bytes:
        """The accepted records as NDJSON."""
        return b"\n".join(self.lines) if self.body is None else self.body

    def split(self) -> list[bytes]:
        """The accepted records one by one."""
        return self.lines if self.body is None else self.body.split(b"\n")


class BodyError(ValueError):
    """The body as a whole cannot be read: status and sentence of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _BadRecord(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _rejected(
    bad: _BadRecord, raw: bytes, offset: int, *, line: int | None = None, index: int | None = None
) -> Rejected:
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
        self.decode_lines = None if engine == "ijson" else self._decoder.decode_lines
        listed: Any = list[projection.shape]  # type: ignore[name-defined]
        self.decode_array = None if engine == "ijson" else msgspec.json.Decoder(listed).decode

    def one(self, raw: bytes) -> Any:
        """Decode and check one document; raise _BadRecord."""
        try:
            raw.decode()
        except UnicodeDecodeError:
            raise _BadRecord("encoding", "The record is not valid UTF-8.") from None
        if too_deep(raw):
            raise _BadRecord("depth", f"The record is nested deeper than {MAX_DEPTH} levels.")
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
            raise _BadRecord("future", str(error)) from None
        except ValueError as error:
            raise _BadRecord("shape", str(error)) from None

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
        """The struct of a document that was parsed already; raise _BadRecord."""
        try:
            event = msgspec.convert(value, self.projection.shape)
        except (msgspec.ValidationError, ValueError) as error:
            raise _BadRecord("shape", _sentence(error)) from None
        self._normalise(event)
        return event

    def _by_msgspec(self, raw: bytes) -> Any:
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            try:  # a wrong shape is found before the end: is it JSON at all?
                _ANY_JSON.decode(raw)
            except (msgspec.DecodeError, RecursionError):
                raise _malformed() from None
            raise _BadRecord("shape", _sentence(error)) from None
        except (msgspec.DecodeError, RecursionError):
            raise _malformed() from None

    def _by_ijson(self, raw: bytes) -> Any:
        if lone_surrogate(raw):
            raise _malformed()
        ijson = load_ijson()
        try:
            values = list(ijson.items(io.BytesIO(raw), "", use_float=True))
        except (ijson.JSONError, ArithmeticError, ValueError):
            raise _malformed() from None
        if len(values) != 1:
            raise _malformed()
        try:
            return msgspec.convert(values[0], self.projection.shape)
        except (msgspec.ValidationError, ValueError) as error:
            raise _BadRecord("shape", _sentence(error)) from None


_ANY_JSON: Final = msgspec.json.Decoder(msgspec.Raw)


def _malformed() -> _BadRecord:
    return _BadRecord("malformed", "The record is not one valid JSON document.")


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
_TO_BRACKET: Final = re.compile(
    rb'[^"{}\[\]]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}\[\]]*+)*+([{}\[\]])', re.DOTALL
)


def too_deep(raw: bytes) -> bool:
    """Whether a document is nested deeper than MAX_DEPTH levels."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    depth = position = 0
    while match := _TO_BRACKET.match(raw, position):
        depth += 1 if match[1] in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
        position = match.end()
    return False


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


# --- bodies -----------------------------------------------------------------------------------


class Reader:
    """A body of one form, fed in pieces of any size.

    `offset` counts the decoded bytes seen. Holds at most one block and one event in memory.
    """

    def __init__(
        self, decoder: Decoder, form: Form, *, max_event_bytes: int, records: str = ""
    ) -> None:
        self.decoder = decoder
        self.is_single = False  # the body turned out to be one object
        self._records = records
        self._max = max_event_bytes
        self._form = form
        self._body: _Lines | _Array | _Single | None = None
        if form == "ndjson":
            self._body = _Lines(self.decoder, max_event_bytes)
        self._blank = 0  # white space before the first byte that tells object from array

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield the blocks that are complete; raise BodyError when the whole must be refused."""
        if self._body is None:
            rest = data.lstrip(b" \t\r\n")
            self._blank += len(data) - len(rest)
            if not rest:
                return
            if rest[:1] == b"[":
                self._body = _Array(self.decoder, self._max, self._blank)
            else:
                self.is_single = True
                self._body = _Single(self.decoder, self._max, self._blank)
            data = rest
        yield from self._body.feed(data)

    def finish(self) -> Iterator[Block]:
        """Yield what is left at the end of the body."""
        if self._body is None:
            raise BodyError(400, "The body is empty: one JSON object or an array was expected.")
        yield from self._body.finish()


class _Single:
    """One JSON object as the whole body."""

    def __init__(self, decoder: Decoder, max_event_bytes: int, offset: int) -> None:
        self._decoder = decoder
        self._max = max_event_bytes
        self._offset = offset
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Block]:
        self._data += data
        if len(self._data) > self._max:
            raise BodyError(413, f"The event is larger than {self._max:,} bytes.")
        return iter(())

    def finish(self) -> Iterator[Block]:
        raw = bytes(self._data).rstrip(b" \t\r\n")
        block = Block()
        try:
            block.events.append(self._decoder.one(raw))
            block.lines.append(_one_line(raw))
        except _BadRecord as bad:
            block.rejected.append(_rejected(bad, raw, self._offset, index=0))
        yield block


class _Lines:
    """NDJSON: one document per line; blank lines count as lines only."""

    def __init__(self, decoder: Decoder, max_event_bytes: int) -> None:
        self._decoder = decoder
        self._max = max_event_bytes
        self._tail = b""
        self._line = 1
        self._offset = 0
        self._skipping = False  # inside a line that was refused as too large

    def feed(self, data: bytes) -> Iterator[Block]:
        data = self._tail + data if self._tail else data
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                self._offset += len(data)
                self._tail = b""
                return
            self._skipping = False
            self._advance(1, end + 1)
            data = data[end + 1 :]
        cut = data.rfind(b"\n") + 1
        if cut and len(data) >= BLOCK_BYTES:
            yield self._block(data[:cut])
            data = data[cut:]
        if len(data) > self._max + 2 and data.find(b"\n") < 0:
            yield Block(rejected=[self._too_large(data)])
            self._offset += len(data)
            self._skipping = True
            data = b""
        self._tail = data

    def finish(self) -> Iterator[Block]:
        if self._tail:
            yield self._block(self._tail)
            self._tail = b""

    def _block(self, data: bytes) -> Block:
        lines = data.count(b"\n")
        body = data.removesuffix(b"\n")
        block = self._whole(body, lines if data.endswith(b"\n") else lines + 1)
        if block is None:
            block = self._by_line(body)
        self._advance(lines, len(data))
        return block

    def _whole(self, body: bytes, lines: int) -> Block | None:
        """Decode the block in one call, or return None if any line of it needs a closer look.

        `decode_lines` takes several documents on a line, and one over several lines. When every
        line starts with `{` and ends with `}`, no document can span two lines, because `}` is
        never followed by `{` inside one; then an equal count means one document per line.
        """
        decode_lines = self._decoder.decode_lines
        if decode_lines is None or not body.startswith(b"{") or not body.endswith(b"}"):
            return None
        if body.count(b"}\n{") != lines - 1 or (len(body) > self._max and lines == 1):
            return None
        try:
            if not body.isascii():
                body.decode()
            events = decode_lines(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if len(events) != lines or self._may_be_deep(body, lines):
            return None
        if lines > 1 and len(body) > self._max and max(map(len, body.split(b"\n"))) > self._max:
            return None
        return Block(events=events, body=body) if self._decoder.normalise(events) else None

    def _may_be_deep(self, body: bytes, lines: int) -> bool:
        levels = self._decoder.levels  # brackets that every valid event opens anyway
        spare = body.count(b"{") + body.count(b"[") - levels * lines
        return spare > MAX_DEPTH - levels and any(map(too_deep, body.split(b"\n")))

    def _by_line(self, body: bytes) -> Block:
        block = Block()
        decode = self._decoder.one
        line, offset = self._line, self._offset
        for raw in body.split(b"\n"):
            text = raw.strip(b" \t\r")
            if text:
                start = offset + len(raw) - len(raw.lstrip(b" \t\r"))
                try:
                    if len(text) > self._max:
                        raise self._oversize()
                    block.events.append(decode(text))
                    block.lines.append(text)
                except _BadRecord as bad:
                    block.rejected.append(_rejected(bad, text, start, line=line))
            line += 1
            offset += len(raw) + 1
        return block

    def _advance(self, lines: int, size: int) -> None:
        self._line += lines
        self._offset += size

    def _oversize(self) -> _BadRecord:
        return _BadRecord("too_large", f"The line is longer than {self._max:,} bytes.")

    def _too_large(self, data: bytes) -> Rejected:
        letter = _rejected(self._oversize(), data, self._offset, line=self._line)
        letter.whole = False
        return letter


class _Array:
    """A JSON array: ijson parses it, a scanner beside it tells where the elements are.

    ijson alone keeps a path prefix per level of nesting, which a small hostile body turns into
    gigabytes; the scanner sees every byte first and stops it at MAX_DEPTH. A syntax error refuses
    the body as a whole, since what follows it has no certain boundaries.
    """

    def __init__(self, decoder: Decoder, max_event_bytes: int, offset: int) -> None:
        self._decoder = decoder
        self._scanner = _ElementScanner(max_event_bytes, offset)
        self._values: deque[Any] = deque()
        ijson = load_ijson()
        self._error: tuple[type[Exception], ...] = (ijson.JSONError, ArithmeticError, ValueError)
        self._parser = ijson.items_coro(_Sink(self._values), "item", use_float=True)
        self._utf8 = _Utf8()
        self._index = 0

    def feed(self, data: bytes) -> Iterator[Block]:
        for start in range(0, len(data), BLOCK_BYTES):
            yield from self._piece(data[start : start + BLOCK_BYTES])

    def finish(self) -> Iterator[Block]:
        try:
            self._parser.close()
        except self._error:
            raise self._refusal() from None
        if not self._scanner.at_end or not self._utf8.at_end:
            raise self._refusal()
        yield self._collect()

    def _piece(self, data: bytes) -> Iterator[Block]:
        if not self._utf8.feed(data):
            raise BodyError(400, "The body is not valid UTF-8.")
        self._scanner.feed(data)
        try:
            self._parser.send(data)
        except self._error:
            raise self._refusal() from None
        yield self._collect()

    def _collect(self) -> Block:
        block = Block()
        values = self._values
        # The parser may be ahead or behind by an element: a number ends with what follows it.
        ready = min(len(values), len(self._scanner.elements))
        for _ in range(ready):
            self._take(block, values.popleft(), *self._scanner.elements.popleft())
        return block

    def _take(self, block: Block, value: Any, offset: int, raw: bytes) -> None:
        try:
            if lone_surrogate(raw):
                raise BodyError(400, "The body has an escape for half of a UTF-16 pair.")
            block.events.append(self._decoder.convert(value))
            block.lines.append(_one_line(raw))
        except _BadRecord as bad:
            block.rejected.append(_rejected(bad, raw, offset, index=self._index))
        self._index += 1

    def _refusal(self) -> BodyError:
        return BodyError(
            400,
            f"The body is not a valid JSON array: it breaks after element {self._index} "
            "(counted from 0) at the latest. Nothing of it was kept.",
        )


class _Sink:
    """What ijson's coroutine sends its values to."""

    def __init__(self, values: deque[Any]) -> None:
        self.send = values.append

    def close(self) -> None:
        """Nothing to release."""


class _Utf8:
    """Checks UTF-8 across pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bool:
        data = self._rest + data
        self._rest = b""
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return False
            self._rest = data[error.start :]
        return True

    @property
    def at_end(self) -> bool:
        return not self._rest


_SPACE_OR_COMMA: Final = re.compile(rb"[ \t\r\n,]*")
_SCALAR: Final = re.compile(rb'(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^",\]\[{}\s]++)', re.DOTALL)
_AFTER: Final = re.compile(rb"[ \t\r\n]*+([,\]])")


class _ElementScanner:
    """Finds where the elements of a top-level array start and end, in constant memory.

    It only has to be right on well-formed input: whether the input is well-formed is the
    parser's to say.
    """

    def __init__(self, max_event_bytes: int, offset: int) -> None:
        self.elements: deque[tuple[int, bytes]] = deque()
        self.at_end = False
        self._max = max_event_bytes
        self._buffer = b""
        self._offset = offset  # of the buffer's first byte in the body
        self._opened = False
        self._scanned = 0  # bytes of the buffer inside the current container that were looked at
        self._depth = 0

    def feed(self, data: bytes) -> None:
        buffer = self._buffer + data
        place = 0
        if not self._opened:
            place, self._opened = 1, True
        while not self.at_end:
            start = _SPACE_OR_COMMA.match(buffer, place).end()  # type: ignore[union-attr]
            place = start
            if start >= len(buffer):
                break
            if buffer[start] == 0x5D:
                self.at_end = True
                place = start + 1
                break
            end = self._end_of_element(buffer, start)
            if end < 0:
                if len(buffer) - start > self._max:
                    raise self._too_large()
                break
            if end - start > self._max:
                raise self._too_large()
            self.elements.append((self._offset + start, buffer[start:end]))
            place = end
        self._buffer = b"" if self.at_end else buffer[place:]
        self._offset += place

    def _end_of_element(self, buffer: bytes, start: int) -> int:
        """Where the element ends, or -1 if it does not end in the buffer."""
        if buffer[start] in b"{[":
            return self._end_of_container(buffer, start)
        match = _SCALAR.match(buffer, start)
        if match is None:
            # A lone quote is a string that goes on; anything else the parser will refuse.
            return -1 if buffer[start] == 0x22 else start + 1
        return match.end() if _AFTER.match(buffer, match.end()) else -1

    def _end_of_container(self, buffer: bytes, start: int) -> int:
        place, depth = start + self._scanned, self._depth
        while match := _TO_BRACKET.match(buffer, place):
            place = match.end()
            if match[1] in b"{[":
                depth += 1
                if depth > MAX_DEPTH:
                    raise BodyError(400, f"An element is nested deeper than {MAX_DEPTH} levels.")
            else:
                depth -= 1
                if depth == 0:
                    self._scanned = self._depth = 0
                    return place
        self._scanned, self._depth = place - start, depth
        return -1

    def _too_large(self) -> BodyError:
        return BodyError(413, f"An element of the array is larger than {self._max:,} bytes.")


def _one_line(raw: bytes) -> bytes:
    """The document without line breaks: outside strings they are white space, inside illegal."""
    if b"\n" in raw or b"\r" in raw:
        return raw.replace(b"\r", b" ").replace(b"\n", b" ")
    return raw


def read_whole(decoder: Decoder, form: Form, data: bytes, max_event_bytes: int) -> Block | None:
    """The block of a small object that came in one piece; None for every other body."""
    if form != "json" or not data.startswith(b"{") or len(data) > max_event_bytes:
        return None
    try:
        return Block(events=[decoder.one(data)], body=_one_line(data))
    except _BadRecord:
        return None  # the long way tells why


# --- transfer ---------------------------------------------------------------------------------


class Inflater:
    """Bounded gunzip: members one after another, never more than PIECE_BYTES at once."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(31)
        self._began = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield decoded pieces; raise BodyError 400 when the data is no gzip."""
        while data:
            if self._stream.eof:
                self._stream = zlib.decompressobj(31)
            self._began = True
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise BodyError(400, "The body is not valid gzip.") from None
            data = self._stream.unconsumed_tail or self._stream.unused_data
            if piece:
                yield piece

    def finish(self) -> Iterator[bytes]:
        """Yield what is left; raise BodyError 400 when the stream was cut off."""
        if rest := self._stream.flush():
            yield rest
        if not self._began or not self._stream.eof:
            raise BodyError(400, "The gzip body ends before its end; send it again whole.")


FORMS: Final[dict[str, Form]] = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/x-jsonlines": "ndjson",
    "text/plain": "ndjson",
}


def form_of(content_type: str) -> Form:
    """The form a media type names; raises BodyError 415 for every other."""
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    form = FORMS.get(media_type)
    charsets = {p.removeprefix("charset=").strip('"') for p in parameters if "charset=" in p}
    if form is None or not charsets <= {"utf-8", "utf8", "us-ascii"}:
        raise BodyError(
            415,
            "The body's media type is not taken here. Send Content-Type: application/json for an "
            "object or an array, or application/x-ndjson for one document per line, in UTF-8.",
        )
    return form


def decoder_of(encoding: str) -> Callable[[], Inflater] | None:
    """How to undo a Content-Encoding (None: nothing to undo); raises BodyError 415."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip"):
        return Inflater
    raise BodyError(415, "Of content encodings only gzip is taken here.")
