"""The contract of a store, for every implementation."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration
STORES = ["sqlite-full", "sqlite-normal", "sqlite-off", "sqlite-private"]


@pytest.fixture(params=STORES)
def open_store(request: Any, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    from journal import SQLiteStore

    made: list[Any] = []
    mode = request.param.partition("-")[2]

    def make() -> Any:
        private = mode == "private"
        store = SQLiteStore(tmp_path / "t.db", "full" if private else mode, private=private)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], Any]) -> Any:
    store = open_store()
    store.open()
    return store


def job(seq: int, state: str = "queued", **values: Any) -> Any:
    from records import Job

    made = Job(f"id-{seq}", values.pop("name", "work"), "cpu", b"fn", b"args")
    made.seq, made.state, made.created = seq, state, 100.0 + seq
    for name, value in values.items():
        setattr(made, name, value)
    return made


def save(store: Any, *jobs: Any, **parts: Any) -> None:
    from records import Batch

    batch = Batch(tasks=list(jobs), **parts)
    batch.events += [(each.seq, each.created, None, each.state, None, None) for each in jobs]
    store.commit(batch)
    for each in jobs:
        each.stored = each.state


def change(store: Any, changed: Any, state: str, **parts: Any) -> None:
    from records import Batch

    before, changed.state = changed.state, state
    store.commit(
        Batch(changed={changed.seq: changed},
              events=[(changed.seq, 200.0, before, state, "why", 7)],
              **parts)
    )  # fmt: skip
    changed.stored = state


def test_what_is_committed_is_found_and_loaded_whole(store: Any) -> None:
    from tasks import RetryPolicy

    policy = RetryPolicy(3, base=0.5)
    full = job(3, retry=policy, timeout=1.5, idem_key="k", digest=b"d", priority=1, run_at=5.0)
    save(store, job(1), job(2), full, edges=[(3, 0, 2), (3, 1, 1)])

    found, one = store.load([3, 1])[::-1]
    assert (found.id, found.fn, found.args, found.parents) == (
        "id-3",
        b"fn",
        b"args",
        ("id-2", "id-1"),
    )
    assert (found.retry, found.timeout, found.priority, found.run_at) == (policy, 1.5, 1, 5.0)
    assert (found.state, found.stored, one.seq) == ("queued", "queued", 1)
    assert store.find("id-3")["dependencies"] == ["id-2", "id-1"]
    assert store.find("nobody") is None
    assert store.known(["id-1", "id-3", "nobody"]) == {
        "id-1": (1, "queued", None), "id-3": (3, "queued", b"d"),
    }  # fmt: skip
    assert store.with_key("k") == ("id-3", b"d")
    assert store.with_key("other") is None
    assert sorted(store.unfinished()) == ["id-1", "id-2", "id-3"]


def test_thousands_of_rows_go_in_at_once(store: Any) -> None:
    jobs = [job(n) for n in range(1, 3_001)]
    save(store, *jobs)
    for each in jobs[:1001]:
        each.state = "running"
    from records import Batch

    store.commit(Batch(changed={each.seq: each for each in jobs[:1001]}))

    assert store.counts() == {"running": 1001, "queued": 1999}
    assert len(store.known([each.id for each in jobs])) == 3_000
    assert len(store.events(0, 5_000)) == 3_000


def test_a_change_from_another_state_is_refused_whole(store: Any) -> None:
    from errors import StoreUnavailable
    from records import Batch

    first, second = job(1), job(2)
    save(store, first, second)
    first.state, second.state = "running", "running"
    second.stored = "pending"  # it is not
    with pytest.raises(StoreUnavailable, match="somebody else"):
        store.commit(Batch(changed={1: first, 2: second}))

    assert store.counts() == {"queued": 2}


def test_nothing_of_a_failing_batch_is_kept(store: Any) -> None:
    from records import Batch

    save(store, job(1))
    with pytest.raises(sqlite3.Error):
        store.commit(Batch(tasks=[job(2), job(1)]))

    assert store.counts() == {"queued": 1}
    save(store, job(2))


def test_pages_go_back_in_time_and_filter(store: Any) -> None:
    from store import Filter

    save(store, *(job(n, priority=n % 4, name=f"n{n % 2}") for n in range(1, 21)))
    bad = job(21, error='{"message": "the 100% reason"}')
    save(store, bad)
    change(store, bad, "running")
    change(store, bad, "failed")

    assert [row["seq"] for row in store.page(Filter(limit=3))] == [21, 20, 19]
    assert [row["seq"] for row in store.page(Filter(before=19, limit=2))] == [18, 17]
    assert [row["seq"] for row in store.page(Filter(states=["failed"]))] == [21]
    assert [row["seq"] for row in store.page(Filter(text="100%"))] == [21]
    assert {row["priority"] for row in store.page(Filter(priority=3))} == {3}
    assert len(store.page(Filter(name="n1"))) == 10


def test_events_are_numbered_and_tell_a_tasks_history(store: Any) -> None:
    one, two = job(1), job(2)
    save(store, one, two)
    change(store, one, "running")

    events = store.events(0, 10)
    assert [(e["id"], e["from_state"], e["to_state"]) for e in events] == [
        ("id-1", None, "queued"), ("id-2", None, "queued"), ("id-1", "queued", "running"),
    ]  # fmt: skip
    assert store.events(events[1]["eid"], 10) == events[2:]
    assert store.last_event() == events[-1]["eid"]
    assert [(e["to_state"], e["reason"], e["worker"]) for e in store.history(1)] == [
        ("queued", None, None), ("running", "why", 7),
    ]  # fmt: skip


def test_results_are_kept_until_they_expire_or_are_dropped(store: Any) -> None:
    from records import Batch

    one, two, child = job(1), job(2), job(3, "pending")
    save(store, one, two, child, edges=[(3, 0, 2)])
    for each in (one, two):
        change(store, each, "running")
        change(store, each, "completed", results={each.seq: (b"v%d" % each.seq, 1000.0)})

    assert store.results([1, 2, 3]) == {1: b"v1", 2: b"v2"}
    assert store.expire(999.0) == 0
    assert store.expire(1000.0) == 1
    assert (store.result(1), store.result(2)) == (None, b"v2")  # a child waits for the second
    store.commit(Batch(dropped_results=[2], events=[(2, 0.0, "completed", "queued", None, None)]))
    assert store.result(2) is None


def test_cleanup_spares_the_young_and_parents_of_unfinished_tasks(store: Any) -> None:
    jobs = [job(n) for n in range(1, 5)]
    child = job(5, "pending")
    save(store, *jobs, child, edges=[(5, 0, 4)])
    for each in jobs:
        each.finished = 50.0 if each.seq != 3 else 500.0
        change(store, each, "running")
        change(store, each, "completed", results={each.seq: (b"v", None)})

    assert store.cleanup(100.0, ["completed"], 1) == {"completed": 1}
    assert store.cleanup(100.0, ["completed"], 10) == {"completed": 1}
    assert store.cleanup(100.0, ["completed"], 10) == {}
    assert store.counts() == {"completed": 2, "pending": 1}
    assert store.result(1) is None
    assert store.history(1) == []


def test_only_the_last_lines_of_a_log_are_kept(store: Any) -> None:
    save(store, job(1), notes=[(1, float(n), f"line {n}") for n in range(150)])

    lines = [note["line"] for note in store.notes(1)]
    assert (len(lines), lines[0], lines[-1]) == (100, "line 50", "line 149")


def test_a_graph_is_what_is_connected(store: Any) -> None:
    save(store, *(job(n) for n in range(1, 7)), edges=[(2, 0, 1), (3, 0, 2), (4, 0, 2), (6, 0, 5)])

    nodes, edges = store.graph(2, 100)
    assert [node["id"] for node in nodes] == ["id-1", "id-2", "id-3", "id-4"]
    assert edges == [("id-1", "id-2"), ("id-2", "id-3"), ("id-2", "id-4")]


def test_a_second_opening_is_refused_and_allowed_after_the_first_is_closed(
    open_store: Callable[[], Any],
) -> None:
    from errors import StoreLocked

    first, second = open_store(), open_store()
    first.open()
    with pytest.raises(StoreLocked, match=str(os.getpid())):
        second.open()
    first.close()
    first.close()

    assert second.open().counts == {}


@pytest.mark.parametrize(
    "open_store", ["sqlite-full", "sqlite-normal", "sqlite-off"], indirect=True
)
def test_another_opening_finds_everything_that_was_left(open_store: Callable[[], Any]) -> None:
    first = open_store()
    first.open()
    done = job(1)
    save(first, done, job(2, priority=0), job(3, "pending", run_at=9.0), edges=[(3, 0, 1)])
    change(first, done, "running")
    change(first, done, "completed", results={1: (b"v", None)})
    first.close()

    second = open_store()
    recovered = second.open()

    assert recovered.next_seq == 4
    assert recovered.counts == {"completed": 1, "queued": 1, "pending": 1}
    assert recovered.live == [(2, "cpu", 0, "queued", None), (3, "cpu", 2, "pending", 9.0)]
    assert recovered.edges == [(3, 1, "completed")]
    assert second.result(1) == b"v"


def test_the_file_is_for_its_user_only(store: Any) -> None:
    save(store, job(1))
    for path in store.path.parent.glob("t.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_private_store_leaves_nothing_behind(tmp_path: Path) -> None:
    from journal import SQLiteStore

    store = SQLiteStore(tmp_path / "p.db", private=True)
    store.open()
    save(store, job(1))
    store.close()

    assert list(tmp_path.iterdir()) == []


def test_other_layouts_and_other_files_are_refused_by_name(tmp_path: Path) -> None:
    from errors import StoreUnavailable
    from journal import SQLiteStore, reader

    newer = tmp_path / "newer.db"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    noise = tmp_path / "noise.db"
    noise.write_bytes(b"no database at all" * 100)
    for path, text in ((newer, "layout 99"), (noise, "not a database")):
        with pytest.raises(StoreUnavailable, match=text):
            SQLiteStore(path).open()
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        reader(tmp_path / "none.db")
    with pytest.raises(StoreUnavailable, match="closed"):
        SQLiteStore(newer).known(["x"])
