"""From bytes to events, in constant memory: NDJSON in blocks, documents, arrays, gzip.

The lines of a block of NDJSON are decoded in one go into structs that project the needed fields.
Only when one fails are they looked at one by one, so that a bad line costs its neighbours nothing.
`Reader.feed` takes bytes as they come and yields `Block`s; `Reader.finish` the rest.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Final, Literal

import msgspec

from arrays import Body, Documents, SplitArray
from decoding import (
    KEPT_BYTES,
    BadRecord,
    Block,
    BodyError,
    Decoder,
    Depths,
    Rejected,
    lone_surrogate,
    one_line,
    rejected,
    too_deep,
)
from ijson_bodies import BLOCK_BYTES, IjsonArray, RecordsAt

__all__ = [
    "BLOCK_BYTES", "KEPT_BYTES", "Block", "BodyError", "Decoder", "Form", "Inflater", "Reader",
    "Rejected", "decoder_of", "form_of", "lone_surrogate", "read_whole", "too_deep",
]  # fmt: skip

PIECE_BYTES: Final = 256 * 1024  # at most this much leaves the decompressor at once

Form = Literal["ndjson", "json"]


class Reader:
    """A body of one form, fed in pieces of any size; `records` is a path to take records from.

    Holds at most a few blocks and one event in memory.
    """

    def __init__(
        self, decoder: Decoder, form: Form, *, max_event_bytes: int, records: str = ""
    ) -> None:
        if records and form == "ndjson":
            raise BodyError(
                422, "`records` names a place in one document: send it as application/json."
            )
        self.decoder = decoder
        self._max = max_event_bytes
        self._records = records
        self._body: Body | None = None
        if form == "ndjson":
            self._body = _Lines(self.decoder, max_event_bytes)
        self._blank = 0  # white space before the first byte that tells object from array

    @property
    def is_single(self) -> bool:
        """Whether the body turned out to be one document."""
        return isinstance(self._body, Documents) and self._body.is_single

    def feed(self, data: bytes) -> Iterator[Block]:
        """Yield the blocks that are complete; raise BodyError when the whole must be refused."""
        if self._body is None:
            rest = data.lstrip(b" \t\r\n")
            self._blank += len(data) - len(rest)
            if not rest:
                return
            self._body = self._of(rest[:1])
            data = rest
        yield from self._body.feed(data)

    def _of(self, first: bytes) -> Body:
        decoder, largest, offset = self.decoder, self._max, self._blank
        if self._records:
            return RecordsAt(decoder, largest, self._records)
        if first != b"[":
            return Documents(decoder, largest, offset)
        if decoder.decode_array is None:
            return IjsonArray(decoder, largest, offset)
        return SplitArray(decoder, largest, offset)

    def finish(self) -> Iterator[Block]:
        """Yield what is left at the end of the body."""
        if self._body is None:
            raise BodyError(400, "The body is empty: one JSON object or an array was expected.")
        yield from self._body.finish()


class _Lines:
    """NDJSON: one document per line; blank lines count as lines only."""

    def __init__(self, decoder: Decoder, max_event_bytes: int) -> None:
        self._decoder = decoder
        self._max = max_event_bytes
        self._parts: list[bytes] = []  # of a block that is not complete
        self._held = 0
        self._line = 1
        self._offset = 0
        self._skipping = False  # inside a line that was refused as too large
        self._deep = Depths(decoder.levels)

    def feed(self, data: bytes) -> Iterator[Block]:
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                self._offset += len(data)
                return
            self._skipping = False
            self._advance(1, end + 1)
            data = data[end + 1 :]
        if not data:
            return
        self._parts.append(data)
        self._held += len(data)
        if self._held < BLOCK_BYTES and self._held <= self._max + 2:
            return
        cut = data.rfind(b"\n")
        if cut < 0:  # perhaps the end of a line is in an earlier piece
            data = b"".join(self._parts)
            self._parts = [data]
            cut = data.rfind(b"\n")
        if cut >= 0 and self._held >= BLOCK_BYTES:
            self._parts[-1] = data[:cut]
            yield self._block(b"".join(self._parts), ended=True)
            self._parts, self._held = [data[cut + 1 :]], len(data) - cut - 1
        elif cut < 0 and self._held > self._max + 2:
            yield Block(rejected=[self._too_large(data)])
            self._offset += len(data)
            self._skipping = True
            self._parts, self._held = [], 0

    def finish(self) -> Iterator[Block]:
        body = b"".join(self._parts)
        self._parts, self._held = [], 0
        if body:
            ended = body.endswith(b"\n")
            yield self._block(body[:-1] if ended else body, ended=ended)

    def _block(self, body: bytes, *, ended: bool) -> Block:
        lines = body.split(b"\n")
        block = self._whole(body, lines)
        if block is None:
            block = self._by_line(body)
        self._advance(len(lines) if ended else len(lines) - 1, len(body) + ended)
        return block

    def _whole(self, body: bytes, lines: list[bytes]) -> Block | None:
        """The block if all is well with it; None if any line of it needs a closer look.

        Each line is decoded for itself: `decode_lines` would take several documents on a line, and
        one over several lines, and to tell that from a good block costs more than the calls.
        """
        decode = self._decoder.decode
        if decode is None or (len(body) > self._max and max(map(len, lines)) > self._max):
            return None
        try:
            if not body.isascii():
                body.decode()
            events = list(map(decode, lines))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if self._deep.in_lines(body, len(lines)) or not self._decoder.normalise(events):
            return None
        return Block(events=events, body=body)

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
                except BadRecord as bad:
                    block.rejected.append(rejected(bad, text, start, line=line))
            line += 1
            offset += len(raw) + 1
        return block

    def _advance(self, lines: int, size: int) -> None:
        self._line += lines
        self._offset += size

    def _oversize(self) -> BadRecord:
        return BadRecord("too_large", f"The line is longer than {self._max:,} bytes.")

    def _too_large(self, data: bytes) -> Rejected:
        letter = rejected(self._oversize(), data, self._offset, line=self._line)
        letter.whole = False
        return letter


def read_whole(decoder: Decoder, form: Form, data: bytes, max_event_bytes: int) -> Block | None:
    """The block of a small object that came in one piece; None for every other body."""
    if form != "json" or not data.startswith(b"{") or len(data) > max_event_bytes:
        return None
    try:
        return Block(events=[decoder.one(data)], body=one_line(data))
    except BadRecord:
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
    if (usual := FORMS.get(content_type)) is not None:
        return usual
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
