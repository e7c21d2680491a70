"""Bodies of one JSON array, or of documents one after the other, in blocks.

An array is cut where it can be proved: if `[` + P + `]` decodes as an array, then P ends between
two elements. So the last `},` is a guess worth one call of the decoder; a wrong guess (inside a
string, or an inner array) costs that call and nothing else. Learning the first key of the first
element makes wrong guesses rare. When too many are wrong, ijson takes over, element by element.

Elements that could be nested too deep are decoded a few at a time, cut in the same way: where the
brackets of a few elements are few, none of them is deep.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import msgspec

from decoding import (
    RAW_ARRAY,
    TO_BRACKET,
    BadRecord,
    Block,
    BodyError,
    Decoder,
    Depths,
    one_line,
    rejected,
    too_deep,
)
from ijson_bodies import BLOCK_BYTES, SPACE_OR_COMMA, IjsonArray, nested_too_deep, too_large

GUESSES: Final = 4  # cuts tried in one block
LOOKS: Final = 64  # places looked at for a guess


class Body(Protocol):
    """A body of one kind, fed in pieces of any size."""

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield the blocks that are complete; raise BodyError when the whole must be refused."""
        ...

    def finish(self) -> Iterator[Block]:
        """Yield what is left at the end of the body."""
        ...


# --- arrays by proof --------------------------------------------------------------------------

_FIRST_KEY: Final = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*("(?:[^"\\]|\\.){0,256}")[ \t\r\n]*:')


class SplitArray:
    """A JSON array in blocks, each decoded in one call."""

    def __init__(self, decoder: Decoder, max_event_bytes: int, offset: int) -> None:
        self._decoder = decoder
        self._max = max_event_bytes
        self._buffer = bytearray()  # begins with a bracket, the body's or one in place of a comma
        self._offset = offset  # of the buffer's first byte in the body
        self._index = 0
        self._try_at = BLOCK_BYTES
        self._next_key: re.Pattern[bytes] | None = None  # what follows a cut, if it is a true one
        self._between = b""  # the bytes of a true cut, up to the next element's first key
        self._deep = Depths(decoder.levels)
        self._dense = False  # the last block had brackets enough for a deep element
        self._slow: IjsonArray | None = None

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield blocks that end between two elements."""
        for start in range(0, len(data), BLOCK_BYTES):
            piece = data[start : start + BLOCK_BYTES] if len(data) > BLOCK_BYTES else data
            if self._slow is not None:
                yield from self._slow.feed(piece)
                continue
            self._buffer += piece
            if len(self._buffer) >= self._try_at:
                yield from self._advance()

    def _advance(self) -> Iterator[Block]:
        block = self._cut()
        if block is not None:
            yield block
        elif len(self._buffer) >= max(4 * BLOCK_BYTES, self._max):
            yield from self._give_over()
        else:
            self._try_at = 2 * len(self._buffer)

    def finish(self) -> Iterator[Block]:
        """Yield the last block, or say what is wrong with the array."""
        if self._slow is None:
            block = self._decode(bytes(self._buffer).rstrip(b" \t\r\n"))
            if block is not None:
                yield block
                return
            try:
                yield from self._give_over()
            except BodyError as error:
                if error.status == 501:  # without ijson nobody says where it breaks
                    raise BodyError(400, "The body is not a valid JSON array.") from None
                raise
        slow: IjsonArray = self._slow  # type: ignore[assignment]
        yield from slow.finish()

    def _give_over(self) -> Iterator[Block]:
        """Let ijson go on: it knows every boundary, and what is wrong where there is none."""
        self._slow = IjsonArray(self._decoder, self._max, self._offset, first=self._index)
        buffer, self._buffer = bytes(self._buffer), bytearray()
        yield from self._slow.feed(buffer)

    def _cut(self) -> Block | None:
        buffer = self._buffer
        for comma in self._guesses():
            buffer[comma] = 0x5D
            with memoryview(buffer) as view:
                text = bytes(view[: comma + 1])
            block = self._decode(text)
            if block is None:
                buffer[comma] = 0x2C
                continue
            del buffer[:comma]
            buffer[0] = 0x5B
            self._offset += comma
            self._try_at = BLOCK_BYTES
            return block
        return None

    def _guesses(self) -> Iterator[int]:
        """Commas behind a `}`, from the end; the likely ones only."""
        buffer = self._buffer
        if self._next_key is None and (found := _FIRST_KEY.match(buffer, 1)):
            self._next_key = re.compile(rb"\s*\{\s*" + re.escape(found[1]) + rb"\s*:")
            del found  # it would hold the buffer
        place, given = len(buffer), 0
        for _ in range(LOOKS):
            place = buffer.rfind(b"},", 0, place)
            if place < 0 or given == GUESSES:
                return
            if self._next_key is None:
                given += 1
                yield place + 1
            elif found := self._next_key.match(buffer, place + 2):
                given += 1
                self._between = b"}," + found[0]
                del found
                yield place + 1

    def _decode(self, text: bytes) -> Block | None:
        """The elements of a whole array; None when it is none, or needs a closer look."""
        decode = self._decoder.decode_array
        assert decode is not None  # noqa: S101  (with ijson this class is not used)
        events = self._few_at_a_time(text, decode) if self._dense else None
        if events is None:
            try:
                events = decode(text)
            except msgspec.ValidationError:
                return self._one_by_one(text)
            except (msgspec.DecodeError, RecursionError):
                return None
            self._dense = not self._deep.are_few(text, len(events))
            if (self._dense or len(text) > self._max) and self._needs_care(text):
                return self._one_by_one(text)
        try:
            if not text.isascii():
                text.decode()
        except UnicodeDecodeError:
            raise BodyError(400, "The body is not valid UTF-8.") from None
        if not self._decoder.normalise(events):
            return self._one_by_one(text)
        self._index += len(events)
        return Block(events=events, array=text)

    def _few_at_a_time(self, text: bytes, decode: Callable[[bytes], list[Any]]) -> list[Any] | None:
        """The elements, none of them deep or too large; None when this way does not show it."""
        between, deep = self._between, self._deep
        events: list[Any] = []
        start, last = 1, len(text) - 2
        if not text.endswith(b"]"):
            return None
        while start <= last:
            end = last
            if start + deep.stretch < last:
                end = text.rfind(between, start, start + deep.stretch)
            if end < 0 or end - start >= self._max:
                return None
            few = b"[%b]" % text[start : end + 1]
            if not deep.is_shallow(few):
                return None
            try:
                events += decode(few)
            except (msgspec.DecodeError, RecursionError):
                return None
            start = end + 2
        return events

    def _needs_care(self, text: bytes) -> bool:
        """Whether an element is too deep or too large."""
        raws = list(map(bytes, RAW_ARRAY.decode(text)))
        return max(map(len, raws), default=0) > self._max or any(map(too_deep, raws))

    def _one_by_one(self, text: bytes) -> Block | None:
        try:
            raws = RAW_ARRAY.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return None
        block = Block()
        place = 1
        for raw in map(bytes, raws):
            place = SPACE_OR_COMMA.match(text, place).end()  # type: ignore[union-attr]
            if len(raw) > self._max:
                raise too_large(self._max)
            try:
                block.events.append(self._decoder.one(raw))
                block.lines.append(one_line(raw))
            except BadRecord as bad:
                if bad.code == "depth":
                    raise nested_too_deep() from None
                if bad.code == "encoding":
                    raise BodyError(400, "The body is not valid UTF-8.") from None
                block.rejected.append(rejected(bad, raw, self._offset + place, index=self._index))
            self._index += 1
            place += len(raw)
        return block


# --- one document after the other -------------------------------------------------------------


class Documents:
    """One JSON document, or several one after the other, pretty-printed or not.

    `is_single` tells at the end whether it was one. What brackets enclose is a document; where
    there is none, and it is not the only one, the body is refused as a whole.
    """

    def __init__(self, decoder: Decoder, max_event_bytes: int, offset: int) -> None:
        self.is_single = True
        self._decoder = decoder
        self._max = max_event_bytes
        self._buffer = b""
        self._offset = offset
        self._index = 0
        self._try_at = BLOCK_BYTES

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield the documents that are whole."""
        for start in range(0, len(data), BLOCK_BYTES):
            self._buffer += data[start : start + BLOCK_BYTES]
            if len(self._buffer) < self._try_at:
                continue
            spans = list(_containers(self._buffer))
            if spans:
                yield self._take(spans)
                self._try_at = BLOCK_BYTES
            elif len(self._buffer) > self._max:
                raise BodyError(413, f"The event is larger than {self._max:,} bytes.")
            else:
                self._try_at = 2 * len(self._buffer)

    def finish(self) -> Iterator[Block]:
        """Yield the last documents; a rest that is none stands alone, or refuses the body."""
        buffer = self._buffer.rstrip(b" \t\r\n")
        spans = list(_containers(buffer))
        if len(buffer) > self._max and not spans:
            raise BodyError(413, f"The event is larger than {self._max:,} bytes.")
        rest = buffer[spans[-1][1] if spans else 0 :].lstrip(b" \t\r\n")
        if rest and (spans or self._index):
            raise BodyError(
                400,
                f"The body is not a sequence of JSON documents: it breaks after document "
                f"{self._index + len(spans) - 1} (counted from 0). Nothing of it was kept.",
            )
        if rest:
            spans = [(len(buffer) - len(rest), len(buffer))]
        self._buffer = buffer
        if spans:
            yield self._take(spans)
        self.is_single = self._index <= 1

    def _take(self, spans: list[tuple[int, int]]) -> Block:
        block = Block()
        for start, end in spans:
            raw = self._buffer[start:end]
            if len(raw) > self._max:
                raise BodyError(413, f"The event is larger than {self._max:,} bytes.")
            try:
                block.events.append(self._decoder.one(raw))
                block.lines.append(one_line(raw))
            except BadRecord as bad:
                block.rejected.append(rejected(bad, raw, self._offset + start, index=self._index))
            self._index += 1
        end = spans[-1][1]
        self._buffer = self._buffer[end:]
        self._offset += end
        return block


_SPACE: Final = re.compile(rb"[ \t\r\n]*")


def _containers(buffer: bytes) -> Iterator[tuple[int, int]]:
    """Where the whole documents at the front of a buffer begin and end."""
    place = 0
    while True:
        start = _SPACE.match(buffer, place).end()  # type: ignore[union-attr]
        if start >= len(buffer) or buffer[start] not in b"{[":
            return
        depth, place = 0, start
        while match := TO_BRACKET.match(buffer, place):
            place = match.end()
            depth += 1 if match[1] in b"{[" else -1
            if depth == 0:
                break
        else:
            return
        yield start, place
