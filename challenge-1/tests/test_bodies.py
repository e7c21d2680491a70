"""Arrays, concatenated documents and record paths: exact wherever the pieces end."""

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from arrays import SplitArray
from builtin import PROJECTIONS
from decoding import MAX_DEPTH, Block, BodyError, Decoder, Depths
from ijson_bodies import IjsonArray
from parsing import Reader

pytestmark = pytest.mark.unit

GOOD = b'{"data":{"category":"a","value":1.5,"quantity":2,"ts":1700000000}}'
MAX = 4096


def read(
    body: bytes, *, records: str = "", piece: int = 10**9, engine: str = "msgspec", max_: int = MAX
) -> Block:
    reader = Reader(
        Decoder(PROJECTIONS["webhook"], engine), "json", max_event_bytes=max_, records=records
    )
    total = Block()

    def blocks() -> Iterator[Block]:
        for start in range(0, len(body), piece):
            yield from reader.feed(body[start : start + piece])
        yield from reader.finish()

    for block in blocks():
        total.lines += block.split() if block.raw else []
        total.events += block.events
        total.rejected += block.rejected
    return total


def values(block: Block) -> list[Any]:
    return [msgspec.to_builtins(event)["data"]["value"] for event in block.events]


def adversarial(chance: random.Random) -> bytes:
    """An array full of what looks like a boundary and is none."""
    inner = [
        '"},{"', '"},{\\"data\\":"', '[{"data":1},{"data":2}]', '{"a":[{"b":{}},{"c":[]}]}',
        '"]"', '"[{"', "1", "null", '[[],{},[{"data":{}}]]', '"\\\\"', '"\\"},"',
    ]  # fmt: skip
    documents = []
    for _ in range(chance.randrange(0, 40)):
        extra = ",".join(f'"x{n}":{chance.choice(inner)}' for n in range(chance.randrange(4)))
        first = f'"data":{{"category":"a","value":{chance.randrange(9)},"quantity":2,"ts":17}}'
        parts = [part for part in (first, extra) if part]
        chance.shuffle(parts)
        documents.append("{" + ",".join(parts) + "}")
        if chance.random() < 0.1:
            documents.append(chance.choice(["5", "null", '"},{"', "[]", '{"data":5}', "{}"]))
    space = chance.choice(["", " ", "\n", "\n  "])
    return f"[{space}{f'{space},{space}'.join(documents)}{space}]".encode()


class TestArrays:
    @pytest.mark.parametrize("seed", range(150))
    def test_whatever_looks_like_a_boundary_ijson_and_the_splitter_agree(
        self, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arrays.BLOCK_BYTES", 64)
        chance = random.Random(seed)
        body = adversarial(chance)
        decoder = Decoder(PROJECTIONS["webhook"])

        def outcome(kind: Any, piece: int) -> Any:
            array = kind(decoder, MAX, 0)
            blocks = [
                block
                for start in range(0, len(body), piece)
                for block in array.feed(body[start : start + piece])
            ]
            blocks += array.finish()
            return (
                [value for block in blocks for value in values(block)],
                [line for block in blocks for line in (block.split() if block.raw else [])],
                [(r.index, r.offset, r.code, r.raw) for block in blocks for r in block.rejected],
            )

        expected = outcome(IjsonArray, 10**6)
        for piece in (1, 13, 100, 10**6):
            assert outcome(SplitArray, piece) == expected

    @pytest.mark.parametrize("seed", range(60))
    def test_a_damaged_array_is_refused_by_both(
        self, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arrays.BLOCK_BYTES", 64)
        chance = random.Random(seed)
        body = bytearray(adversarial(chance))
        place = chance.randrange(1, len(body))
        body[place : place + 1] = chance.choice([b"", b"}", b",", b"]", b'"', b"\\"])
        outcomes: list[Any] = []
        for engine in ("msgspec", "ijson"):
            try:
                outcomes.append(values(read(bytes(body), engine=engine, piece=7)))
            except BodyError as error:
                outcomes.append(error.status)
        assert outcomes[0] == outcomes[1]

    @pytest.mark.parametrize("seed", range(80))
    def test_elements_full_of_brackets_are_cut_and_refused_as_ijson_does(
        self, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arrays.BLOCK_BYTES", 2048)
        chance = random.Random(seed)
        first = '"data":{"category":"a","value":1,"quantity":2,"ts":17}'
        between = chance.choice([",", ", ", ",\n"])
        elements = []
        for _ in range(chance.randrange(20, 120)):
            depth = chance.choice([1, 5, 20, 40, MAX_DEPTH - 1])
            extra = f'"x":{"[" * depth}"}},{{\\"data\\":"{"]" * depth}'
            if chance.random() < 0.3:
                extra += ',"y":[{"data":1},{"data":[{}]}]'
            elements.append(f"{{{first},{extra}}}")
        fault = chance.choice(["", "", "deep", "large", "end", "comma", "shape"])
        place = chance.randrange(len(elements))
        if fault == "deep":
            elements[place] = f'{{{first},"x":{"[" * MAX_DEPTH}{"]" * MAX_DEPTH}}}'
        elif fault == "large":
            elements[place] = f'{{{first},"x":"{"z" * MAX}"}}'
        elif fault == "shape":
            elements[place] = '{"data":5}'
        body = f"[{between.join(elements)}{',' if fault == 'comma' else ''}]"
        if fault == "end":
            body = body[:-1] + chance.choice(["}", "", ",", "]]", "]x"])

        def outcome(engine: str, piece: int) -> Any:
            try:
                block = read(body.encode(), engine=engine, piece=piece)
            except BodyError as error:
                return error.status
            return block.lines, [(r.index, r.offset, r.code) for r in block.rejected]

        expected = outcome("ijson", 10**6)
        assert isinstance(expected, int) == (fault not in ("", "shape"))
        for piece in (500, 10**6):
            assert outcome("msgspec", piece) == expected

    def test_an_element_that_is_too_large_is_found_where_brackets_become_few(self) -> None:
        dense = GOOD[:-1] + b',"x":[[[[]]]],"y":"' + b"z" * 300 + b'"}'
        sparse = GOOD[:-1] + b',"y":"' + b"z" * 900 + b'"}'
        large = GOOD[:-1] + b',"y":"' + b"z" * (MAX - len(GOOD)) + b'"}'
        elements = [dense] * 2000 + [sparse] * 30 + [large] + [sparse] * 5

        with pytest.raises(BodyError) as refused:
            read(b"[" + b",".join(elements) + b"]")

        assert refused.value.status == 413

    def test_an_array_is_read_few_elements_at_a_time_where_brackets_are_many(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inner = b'{"a":[[{"b":1}],{"c":[]}],"text":"' + b"x" * 200 + b'"}'
        body = b"[" + b",".join([GOOD[:-1] + b',"inner":' + inner + b"}"] * 3000) + b"]"
        taken_apart = 0

        def counting(text: bytes) -> Any:
            nonlocal taken_apart
            taken_apart += 1
            return msgspec.json.decode(text, type=list[msgspec.Raw])

        monkeypatch.setattr("arrays.RAW_ARRAY", type("Raws", (), {"decode": counting}))
        array = SplitArray(Decoder(PROJECTIONS["webhook"]), MAX, 0)

        blocks = [*array.feed(body), *array.finish()]

        assert sum(len(block.events) for block in blocks) == 3000
        assert taken_apart == 1  # the first block; the others are known to be dense

    def test_hundreds_of_elements_in_one_block_need_one_call(self) -> None:
        body = b"[" + b",".join([GOOD] * 5000) + b"]"
        decoder = Decoder(PROJECTIONS["webhook"])
        calls = 0
        real = decoder.decode_array
        assert real is not None

        def counting(text: bytes) -> Any:
            nonlocal calls
            calls += 1
            return real(text)

        decoder.decode_array = counting  # type: ignore[assignment]
        array = SplitArray(decoder, MAX, 0)
        blocks = [*array.feed(body), *array.finish()]

        assert sum(len(block.events) for block in blocks) == 5000
        assert calls == len(blocks) == -(-len(body) // (128 * 1024))

    def test_inner_arrays_of_objects_do_not_make_it_slow(self) -> None:
        inner = ",".join('{"k":1}' for _ in range(50))
        document = GOOD[:-1] + b',"inner":[' + inner.encode() + b"]}"
        body = b"[" + b",".join([document] * 2000) + b"]"
        decoder = Decoder(PROJECTIONS["webhook"])
        array = SplitArray(decoder, MAX, 0)

        blocks = [*array.feed(body), *array.finish()]

        assert array._slow is None
        assert sum(len(block.events) for block in blocks) == 2000

    def test_when_no_guess_is_right_ijson_takes_over_with_the_right_places(self) -> None:
        tricky = GOOD[:-1] + b',"x":[' + b",".join([b'{"data":1}'] * 300) + b"]}"
        body = b"[" + b",".join([tricky, b"5"] * 300) + b"]"
        decoder = Decoder(PROJECTIONS["webhook"])
        array = SplitArray(decoder, MAX, 0)

        blocks = [*array.feed(body), *array.finish()]

        assert sum(len(block.events) for block in blocks) == 300
        rejected = [each for block in blocks for each in block.rejected]
        assert [each.index for each in rejected] == list(range(1, 600, 2))
        assert all(body[each.offset or 0 :][:1] == b"5" for each in rejected)

    def test_arrays_work_without_ijson_and_a_record_path_names_the_package(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "ijson", None)

        assert values(read(b"[" + GOOD + b"]")) == [1.5]
        with pytest.raises(BodyError) as refused:
            read(b"[" + GOOD)
        assert refused.value.status == 400
        with pytest.raises(BodyError, match="package ijson") as refused:
            read(b"{}", records="a.item")
        assert refused.value.status == 501


class TestDocuments:
    @pytest.mark.parametrize("piece", [1, 50, 10**9])
    @pytest.mark.parametrize("between", [b"", b" ", b"\n", b"\n\n\t"])
    def test_one_after_the_other_and_pretty_printed(self, between: bytes, piece: int) -> None:
        pretty = json.dumps(json.loads(GOOD), indent=2).encode()
        body = between.join([GOOD, pretty, pretty, GOOD]) + b"\n"

        block = read(body, piece=piece)

        assert values(block) == [1.5] * 4
        assert all(b"\n" not in line and json.loads(line) for line in block.lines)

    def test_a_stream_of_many_blocks_in_constant_memory(self) -> None:
        pretty = json.dumps(json.loads(GOOD), indent=4).encode()

        block = read(pretty * 3000, piece=60_000)

        assert len(block.events) == 3000

    def test_a_bad_one_costs_its_neighbours_nothing_and_is_found_by_index_and_offset(self) -> None:
        body = GOOD + b"\n" + b'{"data":5}' + GOOD + b'{"a" 1}' + GOOD

        block = read(body)

        assert len(block.events) == 3
        assert [(r.index, r.offset, r.code) for r in block.rejected] == [
            (1, body.index(b'{"data":5}'), "shape"),
            (3, body.index(b'{"a" 1}'), "malformed"),
        ]

    @pytest.mark.parametrize("rest", [b"x", b"5", b"{", b'{"a":1', b"]", b',{"a":1}'])
    def test_what_is_no_document_refuses_the_whole(self, rest: bytes) -> None:
        with pytest.raises(BodyError, match="after document 1") as refused:
            read(GOOD + GOOD + rest)
        assert refused.value.status == 400

    def test_one_larger_than_an_event_is_413_wherever_it_stands(self) -> None:
        large = GOOD[:-1] + b',"x":"' + b"y" * 200_000 + b'"}'
        for body in (large, GOOD * 3 + large, large + GOOD):
            for piece in (1000, 10**9):
                with pytest.raises(BodyError) as refused:
                    read(body, piece=piece)
                assert refused.value.status == 413


class TestRecords:
    def body(self, count: int, path: str = "features.item") -> bytes:
        records: Any = [json.loads(GOOD) for _ in range(count)]
        for part in reversed(path.split(".")):
            records = records if part == "item" else {"type": "x", part: records, "after": [1, {}]}
        return json.dumps(records).encode()

    @pytest.mark.parametrize("piece", [1, 1000, 10**9])
    @pytest.mark.parametrize("path", ["features.item", "a.b.c.item", "item"])
    def test_records_are_taken_from_inside_a_large_document(self, path: str, piece: int) -> None:
        count = 20 if piece == 1 else 3000

        block = read(self.body(count, path), records=path, piece=piece)

        assert values(block) == [1.5] * count
        assert block.lines[0] == msgspec.json.encode(json.loads(GOOD))

    def test_a_bad_record_is_rejected_alone(self) -> None:
        body = b'{"rows":[' + GOOD + b',{"data":5},7,' + GOOD + b"]}"

        block = read(body, records="rows.item")

        assert len(block.events) == 2
        assert [(r.index, r.offset, r.code) for r in block.rejected] == [
            (1, None, "shape"),
            (2, None, "shape"),
        ]

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b'{"rows":[' + GOOD, 400),
            (b'{"rows":[' + GOOD + b"]} x", 400),
            (b'{"other":[]}', 422),
            (b'{"rows":[{"a":"' + b"x" * 300_000 + b'"}]}', 413),
            (b'{"rows":[{"a":[' + b"1," * 300_000 + b"1]}]}", 413),
            (b'{"rows":' + b"[" * 5000, 400),
            (b'{"rows":["\xff"]}', 400),
            (b'{"rows":[{"a":"' + rb"\ud800" + b'"}]}', 400),
            (b'{"rows":[NaN]}', 400),
        ],
    )
    @pytest.mark.parametrize("piece", [999, 10**9])
    def test_what_is_wrong_refuses_the_whole(self, body: bytes, status: int, piece: int) -> None:
        with pytest.raises(BodyError) as refused:
            read(body, records="rows.item", piece=piece)
        assert refused.value.status == status

    def test_what_stands_beside_the_records_may_be_long(self) -> None:
        body = b'{"numbers":[' + b"1," * 100_000 + b'1],"rows":[' + GOOD + b"]}"

        assert values(read(body, records="rows.item", piece=5000)) == [1.5]


class TestDepths:
    @pytest.mark.parametrize("seed", range(80))
    def test_a_deep_record_is_found_among_shallow_ones_wherever_it_stands(self, seed: int) -> None:
        chance = random.Random(seed)
        depths = Depths(1)
        records = []
        for _ in range(chance.randrange(1, 60)):
            depth = chance.choice([1, 2, 9, 30, MAX_DEPTH - 1])
            records.append(b'{"a":' + b"[" * depth + b'"[{"' + b"]" * depth + b"}")
        has_deep = chance.random() < 0.5
        if has_deep:
            deep = b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"
            records.insert(chance.randrange(len(records) + 1), deep)

        assert depths.in_lines(b"\n".join(records), len(records)) == has_deep
