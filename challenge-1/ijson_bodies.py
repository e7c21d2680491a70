"""What ijson is for: arrays element by element, and records under a path in a large document.

ijson alone keeps a path prefix per level of nesting, which a small hostile body turns into
gigabytes; so a scanner sees every byte first. ijson's arrays are the oracle of the quicker way in
`arrays.py`, and take over where that gives up.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from decoding import (
    MAX_DEPTH,
    TO_BRACKET,
    BadRecord,
    Block,
    BodyError,
    Decoder,
    load_ijson,
    lone_surrogate,
    one_line,
    rejected,
)

BLOCK_BYTES: Final = 128 * 1024


def too_large(largest: int) -> BodyError:
    """The refusal of an element that is larger than an event may be."""
    return BodyError(413, f"An element of the array is larger than {largest:,} bytes.")


def nested_too_deep() -> BodyError:
    """The refusal of a body with an element that is nested too deep."""
    return BodyError(400, f"An element is nested deeper than {MAX_DEPTH} levels.")


class IjsonArray:
    """A JSON array: ijson parses it, a scanner beside it tells where the elements are.

    ijson alone keeps a path prefix per level of nesting, which a small hostile body turns into
    gigabytes; the scanner sees every byte first and stops it at MAX_DEPTH. A syntax error refuses
    the body as a whole, since what follows it has no certain boundaries.
    """

    def __init__(
        self, decoder: Decoder, max_event_bytes: int, offset: int, *, first: int = 0
    ) -> None:
        self._decoder = decoder
        self._scanner = _ElementScanner(max_event_bytes, offset)
        self._values: deque[Any] = deque()
        ijson = load_ijson()
        self._error: tuple[type[Exception], ...] = (ijson.JSONError, ArithmeticError, ValueError)
        self._parser = ijson.items_coro(_Sink(self._values), "item", use_float=True)
        self._utf8 = _Utf8()
        self._index = first

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield the elements that are whole."""
        for start in range(0, len(data), BLOCK_BYTES):
            yield from self._piece(data[start : start + BLOCK_BYTES])

    def finish(self) -> Iterator[Block]:
        """Yield the last elements; the array has to end here."""
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
            block.lines.append(one_line(raw))
        except BadRecord as bad:
            block.rejected.append(rejected(bad, raw, offset, index=self._index))
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


SPACE_OR_COMMA: Final = re.compile(rb"[ \t\r\n,]*")
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
            start = SPACE_OR_COMMA.match(buffer, place).end()  # type: ignore[union-attr]
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
                    raise too_large(self._max)
                break
            if end - start > self._max:
                raise too_large(self._max)
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
        while match := TO_BRACKET.match(buffer, place):
            place = match.end()
            if match[1] in b"{[":
                depth += 1
                if depth > MAX_DEPTH:
                    raise nested_too_deep()
            else:
                depth -= 1
                if depth == 0:
                    self._scanned = self._depth = 0
                    return place
        self._scanned, self._depth = place - start, depth
        return -1


# --- records under a path ---------------------------------------------------------------------

_TOKENS: Final = re.compile(
    rb'[^"{}\[\]]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}\[\]]*+)*+', re.DOTALL
)
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class RecordsAt:
    """The records under a path (`features.item`) inside one large document, by ijson.

    A guard sees every byte first: what is nested too deep, a string or record that is too large,
    half a UTF-16 pair. ijson does not tell where a record stands: a refused one is found by its
    `index` (its `offset` is null), and what is kept of it is written anew.
    """

    def __init__(self, decoder: Decoder, max_event_bytes: int, path: str) -> None:
        self._decoder = decoder
        self._max = max_event_bytes
        self._levels = path.count(".") + 1
        self._index = 0
        self._values: deque[Any] = deque()
        self._utf8 = _Utf8()
        self._carry = b""  # a string that is not complete
        self._depth = 0
        self._inside = 0  # bytes of the record that is open
        ijson = load_ijson()
        self._error: tuple[type[Exception], ...] = (ijson.JSONError, ArithmeticError, ValueError)
        self._parser = ijson.items_coro(_Sink(self._values), path, use_float=True)

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield the records that are whole."""
        for start in range(0, len(data), BLOCK_BYTES):
            piece = data[start : start + BLOCK_BYTES]
            self._guard(piece)
            try:
                self._parser.send(piece)
            except self._error:
                raise self._refusal() from None
            if self._values:
                self._inside = 0
                yield self._collect()
            elif self._depth > self._levels:
                self._inside += len(piece)
                if self._inside > self._max + BLOCK_BYTES:
                    raise BodyError(413, f"A record is larger than {self._max:,} bytes.")

    def finish(self) -> Iterator[Block]:
        """Yield the last records; the document has to end here."""
        try:
            self._parser.close()
        except self._error:
            raise self._refusal() from None
        if not self._utf8.at_end:
            raise self._refusal()
        yield self._collect()
        if not self._index:
            raise BodyError(
                422, "There are no records at the path in `records`; an array's are at `….item`."
            )

    def _guard(self, piece: bytes) -> None:
        if not self._utf8.feed(piece):
            raise BodyError(400, "The body is not valid UTF-8.")
        buffer, place = self._carry + piece, 0
        while True:
            place = _TOKENS.match(buffer, place).end()  # type: ignore[union-attr]
            if place >= len(buffer) or buffer[place] == 0x22:
                break
            self._depth += 1 if buffer[place] in b"{[" else -1
            if self._depth > MAX_DEPTH + self._levels:
                raise nested_too_deep()
            place += 1
        seen, self._carry = buffer[:place], buffer[place:]
        if len(self._carry) > self._max:
            raise BodyError(413, f"A string is larger than {self._max:,} bytes.")
        if b"\\ud" in seen or b"\\uD" in seen:
            for text in _STRING.findall(seen):
                if lone_surrogate(text):
                    raise BodyError(400, "The body has an escape for half of a UTF-16 pair.")

    def _collect(self) -> Block:
        block = Block()
        while self._values:
            value = self._values.popleft()
            try:
                raw = msgspec.json.encode(value)
            except (ValueError, OverflowError):
                raise BodyError(422, "A record holds a number beyond 64 bits.") from None
            if len(raw) > self._max:
                raise BodyError(413, f"A record is larger than {self._max:,} bytes.")
            try:
                block.events.append(self._decoder.convert(value))
                block.lines.append(raw)
            except BadRecord as bad:
                block.rejected.append(rejected(bad, raw, None, index=self._index))
            self._index += 1
        return block

    def _refusal(self) -> BodyError:
        return BodyError(
            400,
            f"The body is not one valid JSON document: it breaks after record {self._index} "
            "(counted from 0) at the latest. Nothing of it was kept.",
        )
