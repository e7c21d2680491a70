"""Bytes to events: both parsers agree, whatever the body, however it is cut."""

import gzip
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from builtin import PROJECTIONS
from parsing import (
    BLOCK_BYTES,
    KEPT_BYTES,
    Block,
    BodyError,
    Decoder,
    Form,
    Inflater,
    Reader,
    decoder_of,
    form_of,
    lone_surrogate,
    too_deep,
)

pytestmark = pytest.mark.unit

MAX = 4096
ENGINES = ("msgspec", "ijson")
GOOD = b'{"data":{"category":"a","value":1.5,"quantity":2,"ts":1700000000}}'


def value_of(event: Any) -> Any:
    return msgspec.to_builtins(event)["data"]["value"]


def with_value(value: str) -> bytes:
    return b'{"data":{"category":"a","value":%s,"quantity":2,"ts":1700000000}}' % value.encode()


def with_extra(extra: str) -> bytes:
    return GOOD[:-1] + b',"extra":' + extra.encode("utf-8", "surrogateescape") + b"}"


def read(
    body: bytes,
    form: Form = "ndjson",
    *,
    engine: str = "msgspec",
    piece: int = 10**9,
    max_: int = MAX,
) -> Block:
    """The whole body as one block, fed in pieces."""
    reader = Reader(Decoder(PROJECTIONS["webhook"], engine), form, max_event_bytes=max_)
    total = Block()

    def blocks() -> Iterator[Block]:
        for start in range(0, len(body), piece):
            yield from reader.feed(body[start : start + piece])
        yield from reader.finish()

    for block in blocks():
        assert len(block.events) == (len(block.split()) if block.raw else 0)
        total.events += block.events
        total.lines += block.split() if block.raw else []
        total.rejected += block.rejected
    return total


def verdicts(block: Block) -> list[tuple[Any, ...]]:
    return [(bad.line, bad.index, bad.offset, bad.code) for bad in block.rejected]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestStrictness:
    """The verdicts of RFC 8259, the same on every path and from both parsers."""

    ACCEPTED = ("1", "-0", "0.5", "1E+2", "1e-3", "123456789012", "-1e289")
    MALFORMED = ("NaN", "Infinity", "-Infinity", "01", "+1", ".5", "1.", "0x1", "1e", "'1'", "")
    MISSHAPEN = ("true", '"1"', "null", "[1]", "{}")
    BAD_EXTRAS = ("tru", '"a\tb"', r'"\x"', '"\x00"', "[1,]", "{,}", '{"a" 1}', r'"\ud800"', "nul")

    @pytest.mark.parametrize("value", ACCEPTED)
    @pytest.mark.parametrize("form", ["ndjson", "json", "array"])
    def test_numbers_that_are_numbers_count(self, engine: str, form: str, value: str) -> None:
        block = self.parse(form, with_value(value), engine)

        assert [value_of(event) for event in block.events] == [float(value)]

    @pytest.mark.parametrize("value", MALFORMED)
    @pytest.mark.parametrize("form", ["ndjson", "json"])
    def test_what_is_no_json_is_malformed(self, engine: str, form: str, value: str) -> None:
        assert verdicts(self.parse(form, with_value(value), engine))[0][3] == "malformed"

    @pytest.mark.parametrize("value", MISSHAPEN)
    @pytest.mark.parametrize("form", ["ndjson", "json", "array"])
    def test_json_of_the_wrong_shape_is_told_apart(
        self, engine: str, form: str, value: str
    ) -> None:
        block = self.parse(form, with_value(value), engine)

        assert [bad.code for bad in block.rejected] == ["shape"]
        assert "$.data.value" in block.rejected[0].message

    @pytest.mark.parametrize("value", MALFORMED[:-1])
    def test_an_array_that_is_no_json_is_refused_whole(self, engine: str, value: str) -> None:
        with pytest.raises(BodyError) as refused:
            self.parse("array", with_value(value), engine)
        assert refused.value.status == 400

    @pytest.mark.parametrize("extra", BAD_EXTRAS)
    def test_fields_that_are_skipped_are_checked_as_well(self, engine: str, extra: str) -> None:
        assert verdicts(read(with_extra(extra), engine=engine))[0][3] == "malformed"

    def test_invalid_utf8_is_refused_even_in_skipped_fields(self, engine: str) -> None:
        body = GOOD + b"\n" + GOOD[:-1] + b',"extra":"\xff"}\n' + GOOD

        block = read(body, engine=engine)

        assert len(block.events) == 2
        assert [(bad.line, bad.code) for bad in block.rejected] == [(2, "encoding")]
        with pytest.raises(BodyError, match="UTF-8"):
            read(b"[" + GOOD[:-1] + b',"extra":"\xff"}]', "json", engine=engine)

    def test_a_byte_order_mark_is_refused(self, engine: str) -> None:
        assert read(b"\xef\xbb\xbf" + GOOD, engine=engine).rejected[0].code == "malformed"
        assert read(b"\xef\xbb\xbf" + GOOD, "json", engine=engine).rejected

    def test_among_duplicate_names_the_last_wins(self, engine: str) -> None:
        body = GOOD.replace(b'"value":1.5', b'"value":1,"value":7')

        for form in ("ndjson", "json", "array"):
            assert value_of(self.parse(form, body, engine).events[0]) == 7

    @pytest.mark.parametrize("depth", [60, 64, 65, 70, 5000])
    def test_nesting_has_one_limit_on_every_path(self, engine: str, depth: int) -> None:
        body = with_extra("[" * (depth - 1) + "]" * (depth - 1))

        block = read(body, engine=engine, max_=10**6)

        assert len(block.events) == (depth <= 64)
        if depth > 64:
            assert block.rejected[0].code == "depth"
            with pytest.raises(BodyError, match="deeper than 64"):
                read(b"[" + body + b"]", "json", engine=engine, max_=10**6)

    @pytest.mark.parametrize(
        ("ts", "counts"),
        [
            ('"2026-01-15T10:00:00Z"', True),
            ('"2026-01-15T10:00:00.25+02:00"', True),
            ("1768471200", True),
            ("1768471200.5", True),
            ("1768471200000", True),
            ('"2026-01-15T10:00:00"', False),
            ('"2026-01-15"', False),
            ('"yesterday"', False),
            ("true", False),
            ("1e30", False),
            ('"9999-12-31T23:59:59Z"', False),
        ],
    )
    def test_times_are_rfc_3339_with_an_offset_or_epoch_numbers(
        self, engine: str, ts: str, counts: bool
    ) -> None:
        body = GOOD.replace(b"1700000000", ts.encode())

        for form in ("ndjson", "json", "array"):
            block = self.parse(form, body, engine)
            assert len(block.events) == counts
            assert [bad.code for bad in block.rejected] == ([] if counts else ["shape"])

    def parse(self, form: str, document: bytes, engine: str) -> Block:
        if form == "array":
            return read(b"[" + document + b"]", "json", engine=engine)
        return read(document, "json" if form == "json" else "ndjson", engine=engine)


class TestTheParsersAgree:
    """One suite over both; what follows is where they differ, and it is all."""

    def documents(self, seed: int) -> list[bytes]:
        chance = random.Random(seed)
        pool = [
            GOOD,
            b"  " + GOOD + b" \r",
            b"",
            b"   ",
            b"{",
            b"nonsense",
            b"[]",
            b'"text"',
            b"5",
            GOOD + GOOD,
            GOOD + b" " + GOOD,
            GOOD[:-1],
            b'{"data":5}',
            b'{"data":{"category":"","value":1,"quantity":1,"ts":1}}',
            with_value("1e291"),
            with_value("true"),
            with_extra('{"deep":[[["x"]],{"a":"b\\"c"}]}'),
            with_extra('"umlaut \u00fc and \U0001f600"'),
            with_extra(r'"\ud83d\ude00"'),
            with_extra('"' + "y" * 3000 + '"'),
            b'{"data":{"category":"' + b"x" * 5000 + b'","value":1,"quantity":1,"ts":1}}',
        ]
        return [chance.choice(pool) for _ in range(chance.randrange(1, 40))]

    @pytest.mark.parametrize("seed", range(60))
    def test_lines_in_pieces_of_any_size(self, seed: int) -> None:
        body = random.Random(seed).choice([b"\n", b"\r\n"]).join(self.documents(seed))
        expected = read(body)

        for engine in ENGINES:
            for piece in (1, 7, 1000, 10**9):
                found = read(body, engine=engine, piece=piece)
                assert verdicts(found) == verdicts(expected)
                assert found.lines == expected.lines
                assert found.events == expected.events

    @pytest.mark.parametrize("seed", range(40))
    def test_arrays_in_pieces_of_any_size(self, seed: int) -> None:
        documents = []
        for document in self.documents(seed):
            try:
                json.loads(document)
            except ValueError:
                continue
            if len(document) <= MAX:
                documents.append(document)
        separator = random.Random(seed).choice([b",", b" ,\n ", b"\t, "])
        body = b" [ " + separator.join(documents) + b" ] "
        expected = [read(document) for document in documents]

        for piece in (1, 7, 1000, 10**9):
            found = read(body, "json", piece=piece)
            assert found.events == [event for block in expected for event in block.events]
            assert [(bad.index, bad.code) for bad in found.rejected] == [
                (index, block.rejected[0].code)
                for index, block in enumerate(expected)
                if block.rejected
            ]
            for bad in found.rejected:
                assert bad.index is not None
                assert body[bad.offset :].startswith(documents[bad.index].strip()[:20])

    def test_ijson_alone_refuses_numbers_beyond_64_bits_in_fields_that_are_skipped(self) -> None:
        for extra in ("123456789012345678901234567890", "1e400"):
            assert len(read(with_extra(extra)).events) == 1
            assert read(with_extra(extra), engine="ijson").rejected[0].code == "malformed"


class TestLines:
    def test_a_bad_line_costs_its_neighbours_nothing_and_is_found_by_line_and_offset(self) -> None:
        lines = [GOOD, b"oops", b"", GOOD, b' {"data":{}} ', GOOD]
        body = b"\n".join(lines)

        block = read(body)

        assert len(block.events) == 3
        assert verdicts(block) == [
            (2, None, body.index(b"oops"), "malformed"),
            (5, None, body.index(b'{"data":{}}'), "shape"),
        ]
        assert block.rejected[0].raw == b"oops"

    def test_numbering_goes_on_across_blocks(self) -> None:
        line = GOOD + b"\n"
        count = 3 * BLOCK_BYTES // len(line)
        body = line * count + b"oops\n" + line * count + b"again"

        block = read(body, piece=10_000)

        assert len(block.events) == 2 * count
        assert [(bad.line, bad.offset) for bad in block.rejected] == [
            (count + 1, count * len(line)),
            (2 * count + 2, 2 * count * len(line) + 5),
        ]

    def test_documents_that_share_or_break_a_line_are_never_counted_by_accident(self) -> None:
        # As many documents as lines, but not one on each: a decoder of blocks takes them all.
        body = b"\n".join([GOOD, GOOD + GOOD, GOOD[:20], GOOD[20:], GOOD])

        block = read(body)

        assert len(block.events) == 2
        assert [bad.line for bad in block.rejected] == [2, 3, 4]

    def test_an_endless_line_is_skipped_in_constant_memory(self) -> None:
        reader = Reader(Decoder(PROJECTIONS["webhook"]), "ndjson", max_event_bytes=MAX)
        rejected = [bad for b in reader.feed(GOOD + b"\n") for bad in b.rejected]
        for _ in range(1000):
            rejected += [bad for b in reader.feed(b"x" * 10_000) for bad in b.rejected]
            assert reader._body._held <= BLOCK_BYTES + 10_000  # type: ignore[union-attr]
        last = [*reader.feed(b"\n" + GOOD), *reader.finish()]

        assert [bad.code for bad in rejected] == ["too_large"]
        assert len(rejected[0].raw) == KEPT_BYTES
        assert len(last[-1].events) == 1

    def test_a_body_quoted_as_one_string_gets_a_hint(self) -> None:
        block = read(json.dumps(GOOD.decode()).encode())

        assert "text/plain" in block.rejected[0].message


class TestArrays:
    def test_an_empty_array_has_no_events(self) -> None:
        assert read(b" [ ] ", "json") == Block()

    @pytest.mark.parametrize(
        "body",
        [
            b"[", b"[1", b"[1,", b"[,]", b"[1 2]", b"[1,]", b"[]]", b"[] x", b"[1}", b'["a]',
            b"[" + GOOD + b" " + GOOD + b"]", b"[" + GOOD + b",", b"[" + GOOD + b"]" + GOOD,
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("piece", [1, 10**9])
    def test_a_broken_array_is_refused_whole(self, body: bytes, piece: int) -> None:
        with pytest.raises(BodyError) as refused:
            read(body, "json", piece=piece)
        assert refused.value.status == 400

    def test_an_element_larger_than_an_event_is_413(self) -> None:
        body = b"[" + GOOD + b"," + with_extra('"' + "x" * MAX + '"') + b"]"

        for piece in (100, 10**9):
            with pytest.raises(BodyError) as refused:
                read(body, "json", piece=piece)
            assert refused.value.status == 413

    def test_half_a_surrogate_pair_is_refused_before_ijson_makes_a_question_mark_of_it(
        self,
    ) -> None:
        with pytest.raises(BodyError, match="UTF-16"):
            read(b"[" + with_extra(r'"\ud800"') + b"]", "json")


def test_a_single_object_larger_than_an_event_is_413() -> None:
    with pytest.raises(BodyError) as refused:
        read(with_extra('"' + "x" * MAX + '"'), "json")
    assert refused.value.status == 413


def test_without_ijson_lines_and_documents_work_and_the_rest_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ijson", None)

    assert len(read(GOOD).events) == 1
    assert len(read(GOOD, "json").events) == 1
    with pytest.raises(BodyError, match="package ijson") as refused:
        read(b"[]", "json", engine="ijson")
    assert refused.value.status == 501


@pytest.mark.parametrize(
    ("raw", "half"),
    [
        (rb'"\ud800"', True),
        (rb'"\udc00"', True),
        (rb'"\ud83d\ude00"', False),
        (rb'"\\ud800"', False),
        (rb'"\\\ud800"', True),
        (rb'"\\ud800\udc00"', True),
    ],
)
def test_half_pairs_are_found_and_escaped_backslashes_are_not_mistaken(
    raw: bytes, half: bool
) -> None:
    assert lone_surrogate(raw) == half


def test_brackets_in_strings_are_not_depth() -> None:
    assert not too_deep(json.dumps(["[{" * 100, '"' * 50]).encode())
    assert too_deep(b"[" * 65)


class TestEvents:
    def event(self, **changes: Any) -> bytes:
        event = {"event_id": "e", "source": "s", "event_type": "t", "data": {"x": 1}}
        return json.dumps({**event, **changes}).encode()

    def code(self, document: bytes) -> str | None:
        reader = Reader(Decoder(PROJECTIONS["events"]), "ndjson", max_event_bytes=10**6)
        (block,) = [*reader.feed(document), *reader.finish()]
        return block.rejected[0].code if block.rejected else None

    def test_numbers_names_and_members_have_bounds(self) -> None:
        assert self.code(self.event()) is None
        assert self.code(self.event(data={f"m{n}": n for n in range(32)})) is None
        assert self.code(self.event(data={f"m{n}": n for n in range(33)})) == "shape"
        assert self.code(self.event(data={f"m{n}": str(n) for n in range(99)})) is None
        assert self.code(self.event(data={"x": 10**300})) == "shape"
        assert self.code(self.event(data={"n" * 257: 1})) == "shape"
        assert self.code(self.event(event_id="")) == "shape"
        assert self.code(self.event(source="s" * 257)) == "shape"
        assert self.code(self.event(timestamp="noon")) == "shape"


class TestTransfer:
    @pytest.mark.parametrize("piece", [1, 100, 10**9])
    def test_gzip_of_several_members_is_one_body(self, piece: int) -> None:
        body = gzip.compress(b"a" * 10**6) + gzip.compress(b"b" * 10)
        inflater = Inflater()

        pieces = [
            out for start in range(0, len(body), piece)
            for out in inflater.feed(body[start : start + piece])
        ]  # fmt: skip
        pieces += inflater.finish()

        assert b"".join(pieces) == b"a" * 10**6 + b"b" * 10
        assert max(map(len, pieces)) <= 256 * 1024

    def test_what_is_cut_off_or_no_gzip_is_400(self) -> None:
        whole = gzip.compress(b"abc" * 1000)
        for body in (whole[:-1], whole[:5], b""):
            inflater = Inflater()
            with pytest.raises(BodyError):
                list(inflater.feed(body))
                list(inflater.finish())
        with pytest.raises(BodyError):
            list(Inflater().feed(b"plain text"))

    def test_media_types_and_encodings_that_are_not_known_are_415(self) -> None:
        assert form_of("application/json; charset=UTF-8") == "json"
        assert form_of('application/json; profile="x"; charset="utf-8"') == "json"
        assert form_of("Text/Plain") == form_of("application/x-ndjson") == "ndjson"
        assert decoder_of("") is None
        for content_type in ("", "application/xml", "application/json; charset=latin-1"):
            with pytest.raises(BodyError) as refused:
                form_of(content_type)
            assert refused.value.status == 415
        with pytest.raises(BodyError) as refused:
            decoder_of("br")
        assert refused.value.status == 415
