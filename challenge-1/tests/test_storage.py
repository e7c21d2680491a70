"""The contract of the store, and what SQLite adds to it."""

import math
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aggregation import Delta, measure
from parsing import Rejected
from sqlite_store import SQLiteStore
from storage import (
    KEPT_DEAD_LETTERS,
    AggregateQuery,
    Answer,
    Changes,
    StagedUpload,
    Store,
    StoreError,
    StoreRefused,
    Totals,
)
from windows import Clock

pytestmark = pytest.mark.unit


@pytest.fixture(params=[SQLiteStore])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Every implementation of the contract: opens the same store again on every call."""
    opened = []

    def open_(**options: Any) -> Any:
        store = request.param(tmp_path / "data" / "store.db", **options)
        store.ensure_built_in({"webhook": 0, "events": 0})
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()


WEBHOOK, EVENTS = -1, -2  # the builds of the built-in pipelines


def delta(start: int, group: str, values: list[float], late: int = 0, source: str = "") -> Delta:
    return Delta(start, start + 10, (group,), source, len(values), late, {"value": measure(values)})


def sums(store: Store) -> dict[Any, float]:
    return {
        (row.window_start, row.group[0]): row.measures["value"].total + row.measures["value"].rest
        for row in store.aggregates(AggregateQuery(limit=1000))
    }


class TestTheContract:
    def test_a_batch_is_there_after_a_restart_together_with_its_position(
        self, open_store: Callable[..., Any]
    ) -> None:
        store = open_store()
        changes = Changes(
            77,
            deltas=[(WEBHOOK, "webhook", delta(0, "a", [1.0, 2.0]))],
            clocks={(WEBHOOK, ""): (Clock(5, 1, 70, 9), 5)},
        )
        changes.total("webhook").add(Totals(2, 1, 3, 0))
        changes.keys = b"12345678"
        changes.answers.append(Answer(b"k", b"b", b"answer"))
        changes.rejected.append(("webhook", 9, 77, Rejected(3, None, 8, "shape", "no", b"raw")))
        changes.uploads.append(StagedUpload("u", 77, 1000))
        store.apply([changes])
        secret = store.secret
        store.close()

        store = open_store()

        assert store.position() == 77
        assert store.secret == secret
        assert sums(store) == {(0, "a"): 3.0}
        clock = store.clock(WEBHOOK, "")
        assert (clock.latest, clock.floor, clock.seen, clock.arrival) == (5, 1, 70, 9)
        assert store.clock(WEBHOOK, "other") is None
        assert store.totals() == {("webhook", ""): Totals(2, 1, 3, 0)}
        assert list(store.seen()) == [b"12345678"]
        assert store.answer(b"k") == Answer(b"k", b"b", b"answer")
        assert store.answer(b"other") is None
        (letter,) = store.dead_letters(0, 10)
        assert letter.record == Rejected(3, None, 8, "shape", "no", b"raw")
        assert store.uploads() == [StagedUpload("u", 77, 1000)]
        store.forget_uploads(["u"])
        assert store.uploads() == []

    def test_a_batch_that_fails_half_way_leaves_nothing(
        self, open_store: Callable[..., Any]
    ) -> None:
        store = open_store()

        def broken() -> Iterator[Changes]:
            yield Changes(5, deltas=[(WEBHOOK, "webhook", delta(0, "a", [1.0]))], keys=b"12345678")
            raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError):
            store.apply(broken())

        assert store.position() == 0
        assert sums(store) == {}
        assert list(store.seen()) == []
        store.apply([Changes(6, deltas=[(WEBHOOK, "webhook", delta(0, "a", [1.0]))])])
        assert sums(store) == {(0, "a"): 1.0}

    @pytest.mark.parametrize("seed", range(10))
    def test_sums_are_right_to_the_last_bit_however_the_values_were_batched(
        self, open_store: Callable[..., Any], seed: int
    ) -> None:
        store = open_store()
        chance = random.Random(seed)
        values = [chance.uniform(-1, 1) * 10 ** chance.randrange(-10, 17) for _ in range(300)]
        at = 0
        while at < len(values):
            size = chance.choice([1, 3, 50])
            store.apply(
                [Changes(at, deltas=[(WEBHOOK, "webhook", delta(0, "a", values[at : at + size]))])]
            )
            at += size

        (row,) = store.aggregates(AggregateQuery())

        total = row.measures["value"].total + row.measures["value"].rest
        assert abs(total - math.fsum(values)) <= 1e-30 * math.fsum(map(abs, values)) + math.ulp(
            total
        )
        assert row.measures["value"].least == min(values)
        assert row.measures["value"].greatest == max(values)
        assert row.count == row.measures["value"].count == 300

    @pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 3], [1, 1, 1, 1, 1]])
    def test_the_revision_counts_late_events_however_they_were_batched(
        self, open_store: Callable[..., Any], sizes: list[int]
    ) -> None:
        store = open_store()
        flags = [0, 0, 1, 1, 1]  # two on time, three late
        at = 0
        for size in sizes:
            late = sum(flags[at : at + size])
            store.apply(
                [Changes(1, deltas=[(WEBHOOK, "webhook", delta(0, "on time", [1.0] * size, late))])]
            )
            store.apply(
                [
                    Changes(
                        1, deltas=[(WEBHOOK, "webhook", delta(0, "all late", [1.0] * size, size))]
                    )
                ]
            )
            at += size

        rows = {row.group[0]: row.revision for row in store.aggregates(AggregateQuery())}

        assert rows == {"on time": 4, "all late": 5}

    def test_pages_are_complete_ordered_and_filtered(self, open_store: Callable[..., Any]) -> None:
        store = open_store()
        deltas = [
            (build, name, delta(start, group, [1.0], source=group))
            for build, name in ((WEBHOOK, "webhook"), (EVENTS, "events"))
            for start in range(0, 100, 10)
            for group in ("a", "b'; DROP TABLE windows; --", "\u00fc")
        ]
        random.Random(3).shuffle(deltas)
        clocks = {(WEBHOOK, "a"): (Clock(50), 50)}
        store.apply([Changes(1, deltas=deltas, clocks=clocks)])

        def page_through(**filters: Any) -> list[Any]:
            rows: list[Any] = []
            after = None
            while page := store.aggregates(AggregateQuery(after=after, limit=7, **filters)):
                rows += page
                after = page[-1].cursor
            return rows

        rows = page_through()
        assert len(rows) == 60
        assert [row.cursor for row in rows] == sorted(row.cursor for row in rows)
        assert len(page_through(pipeline="events")) == 30
        assert len(page_through(start=20, end=50)) == 18
        assert [row.window_end for row in page_through(final=True)] == [10, 20, 30, 40, 50]
        assert len(page_through(final=False)) == 55
        hostile = ((("webhook", 0, "b'; DROP TABLE windows; --"),),)
        assert len(page_through(group=hostile)) == 10
        assert len(page_through(group=((("webhook", 0, "a"), ("events", 0, "a")),))) == 20

    def test_the_latest_window_of_each_group_is_found(self, open_store: Callable[..., Any]) -> None:
        store = open_store()
        deltas = [
            (EVENTS, "events", delta(start, group, [1.0]))
            for start in (30, 0, 10)
            for group in "ab"
        ]
        store.apply([Changes(1, deltas=deltas)])

        assert [(r.group, r.window_start) for r in store.latest("events")] == [
            (["a"], 30),
            (["b"], 30),
        ]

    def test_keys_answers_and_dead_letters_have_bounds(
        self, open_store: Callable[..., Any]
    ) -> None:
        store = open_store(keep_keys=100)
        for number in range(60):
            changes = Changes(number, keys=bytes([number]) * 8 * 10)
            changes.answers += [Answer(b"%d" % number, b"", b"")] * 10
            store.apply([changes])
        held = b"".join(store.seen())

        assert 100 <= len(held) // 8 <= 110
        assert held.endswith(bytes([59]) * 80)
        assert store.answer(b"59") is not None
        assert store.answer(b"49") is None
        store = open_store()
        letters = Changes(1)
        letters.rejected = [
            ("webhook", 0, 0, Rejected(n, None, n, "shape", "", b""))
            for n in range(KEPT_DEAD_LETTERS + 5)
        ]
        store.apply([letters])
        assert store.dead_letters(0, 1)[0].record.line == 5

    def test_of_very_many_sources_the_busiest_are_listed(
        self, open_store: Callable[..., Any]
    ) -> None:
        store = open_store()
        changes = Changes(1)
        for number in range(3000):
            changes.by_source("events", f"s{number}").add(Totals(accepted=number))
        changes.total("events").add(Totals(accepted=1))
        store.apply([changes])

        totals = store.totals()

        assert len(totals) == 1000
        assert totals["events", ""] == Totals(accepted=1)
        assert ("events", "s2999") in totals

    def test_a_checkpoint_says_what_is_safe(self, open_store: Callable[..., Any]) -> None:
        store = open_store()
        store.apply([Changes(42)])

        assert store.checkpoint() == 42


class TestSQLite:
    def test_a_reader_that_holds_on_keeps_nobody_waiting_and_nothing_is_called_safe(
        self, tmp_path: Path
    ) -> None:
        store = SQLiteStore(tmp_path / "a.db")
        store.apply([Changes(1)])
        with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM meta").fetchall()
            store.apply([Changes(2)])
            store._writer.execute("PRAGMA busy_timeout = 3600000")  # it would wait for ever

            assert store.checkpoint() == 0

        assert store.checkpoint() == 2
        store.close()

    def test_a_commit_is_synced(self, tmp_path: Path) -> None:
        store = SQLiteStore(tmp_path / "a.db")

        assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)
        store.close()

    def test_files_are_for_their_owner_alone(self, tmp_path: Path) -> None:
        store = SQLiteStore(tmp_path / "a.db")
        store.apply([Changes(1)])

        assert {p.stat().st_mode & 0o777 for p in tmp_path.glob("a.db*")} == {0o600}
        store.close()

    def test_a_file_that_is_no_database_is_refused_by_name_of_the_setting(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "text.db").write_text("this is not a database, and long enough to tell so")

        with pytest.raises(StoreError, match="DB_PATH"):
            SQLiteStore(tmp_path / "text.db")

    def test_another_version_of_the_schema_is_refused(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "other.db") as connection:
            connection.execute("PRAGMA user_version = 99")

        with pytest.raises(StoreError, match="version 99"):
            SQLiteStore(tmp_path / "other.db")

    def test_a_full_disk_refuses_the_batch_and_keeps_the_rest(self, tmp_path: Path) -> None:
        store = SQLiteStore(tmp_path / "a.db")
        store.ensure_built_in({"webhook": 0})
        store.apply([Changes(1, deltas=[(WEBHOOK, "webhook", delta(0, "a", [1.0]))])])
        pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
        store._writer.execute(f"PRAGMA max_page_count = {pages}")

        many = [(WEBHOOK, "webhook", delta(n * 10, "b" * 100, [1.0])) for n in range(2000)]
        with pytest.raises(StoreRefused, match="full"):
            store.apply([Changes(2, deltas=many)])

        assert store.position() == 1
        store._writer.execute("PRAGMA max_page_count = 1000000")
        store.apply([Changes(2, deltas=many)])
        assert store.position() == 2
        store.close()
