"""One suite over all registry stores: memory, SQLite, and Redis for real."""

import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from redis_store import RedisStore
from stores import MemoryStore, PluginRecord, RegistryStore, SQLiteStore, StoreError

pytestmark = pytest.mark.integration

EXPIRY_SECONDS = 15.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def record(
    name: str = "P", signature: str = "s", code: str = "c", host: str = "h1", version: str = "1.0.0"
) -> PluginRecord:
    return PluginRecord(
        name, version, "Processor", signature.ljust(64, "0"), code, host, f"node-{host}",
        ["process"], {"process": {"type": "integer"}}, {"process": {}}, "Does it.", "ada",
    )  # fmt: skip


@pytest.fixture(params=["memory", "sqlite", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(kind: str, clock: Clock, tmp_path: Path, needs: Any) -> Iterator[RegistryStore]:
    if kind == "memory":
        yield MemoryStore(clock)
    elif kind == "sqlite":
        sqlite = SQLiteStore(tmp_path / "registry.db", clock)
        yield sqlite
        sqlite.close()
    else:
        needs.package("redis", "requirements-services.txt")
        host, port = needs.server("Redis", 6379)
        prefix = f"test-c3-{uuid.uuid4().hex}"
        redis = RedisStore(f"redis://{host}:{port}/0", prefix=prefix)
        yield redis
        client = redis._client
        if keys := client.keys(f"*{prefix}*"):
            client.delete(*keys)
        redis.close()


@pytest.fixture
def pass_seconds(kind: str, store: RegistryStore, clock: Clock) -> Callable[[float], None]:
    """Let time pass: by the clock, or for Redis by shortening what is left to each key."""

    def passing(seconds: float) -> None:
        clock.now += seconds
        if isinstance(store, RedisStore):
            for key in store._client.keys(f"{store._prefix}:node:*"):
                left = store._client.pttl(key) - int(seconds * 1000)
                store._client.pexpire(key, max(1, left))
                if left <= 1:
                    store._client.delete(key)

    return passing


class TestEveryStore:
    def test_what_is_announced_is_there_for_all(self, store: RegistryStore) -> None:
        assert store.announce("n1", [record(), record("Q", version="2.0.0")]) == []

        first, second = store.records()

        assert (first.name, first.version, first.contract) == ("P", "1.0.0", "Processor")
        assert first.input_schema == {"process": {"type": "integer"}}
        assert (second.key, second.host, second.divergent) == ("Q@2.0.0", "h1", False)
        assert first["author"] == dict(first)["author"] == "ada"
        assert first.heartbeat > 0

    def test_a_conflicting_signature_is_refused_and_the_rest_gets_in(
        self, store: RegistryStore
    ) -> None:
        store.announce("n1", [record(host="h1")])

        conflicts = store.announce("n2", [record(signature="other", host="h2"), record("Q")])

        assert [(c.record.key, c.host) for c in conflicts] == [("P@1.0.0", "h1")]
        assert [(r.name, r.host) for r in store.records()] == [("P", "h1"), ("Q", "h1")]

    def test_another_version_is_no_conflict(self, store: RegistryStore) -> None:
        store.announce("n1", [record()])
        assert store.announce("n2", [record(signature="other", version="2.0.0")]) == []

    def test_the_same_signature_with_other_code_is_flagged(self, store: RegistryStore) -> None:
        store.announce("n1", [record(host="h1"), record("Q")])
        assert store.announce("n2", [record(host="h2", code="changed")]) == []

        assert [(r.name, r.host, r.divergent) for r in store.records()] == [
            ("P", "h1", True), ("P", "h2", True), ("Q", "h1", False),
        ]  # fmt: skip

    def test_a_node_may_change_its_own_mind(self, store: RegistryStore) -> None:
        store.announce("n1", [record()])
        assert store.announce("n1", [record(signature="new")]) == []
        assert [r.signature_hash[:3] for r in store.records()] == ["new"]

    def test_a_node_that_stops_beating_is_forgotten_and_its_place_is_free(
        self, store: RegistryStore, pass_seconds: Any
    ) -> None:
        store.announce("n1", [record()])
        pass_seconds(EXPIRY_SECONDS - 5)
        assert store.heartbeat("n1")
        pass_seconds(EXPIRY_SECONDS - 5)
        assert len(store.records()) == 1
        pass_seconds(6)

        assert store.records() == []
        assert not store.heartbeat("n1")
        assert store.announce("n2", [record(signature="other")]) == []

    def test_withdrawing_and_leaving(self, store: RegistryStore) -> None:
        store.announce("n1", [record(), record("Q")])
        store.announce("n2", [record(host="h2")])

        store.withdraw("n1", ["P@1.0.0"])
        assert [(r.name, r.host) for r in store.records()] == [("P", "h2"), ("Q", "h1")]
        store.leave("n1")
        assert [(r.name, r.host) for r in store.records()] == [("P", "h2")]
        assert not store.heartbeat("n1")
        store.withdraw("nobody", ["P@1.0.0"])
        store.leave("nobody")
        store.ping()

    def test_a_node_without_plugins_is_alive(self, store: RegistryStore) -> None:
        store.announce("n1", [])
        assert store.heartbeat("n1")
        assert store.records() == []

    def test_of_nodes_that_race_with_different_signatures_one_wins(
        self, store: RegistryStore
    ) -> None:
        for trial in range(10):
            barrier = threading.Barrier(4)
            refused: list[int] = []

            def race(
                number: int, trial: int = trial, barrier: Any = barrier, refused: Any = refused
            ) -> None:
                barrier.wait()
                offered = record(f"R{trial}", signature=str(number), host=f"h{number}")
                refused.extend(number for _ in store.announce(f"n{number}", [offered]))

            threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(refused) == 3

    @pytest.mark.parametrize("kind", ["sqlite", "redis"])  # nobody else writes into memory
    @pytest.mark.parametrize("text", ["no JSON", '{"name": "P", "of": "a later release"}', "[]"])
    def test_what_cannot_be_read_is_left_out(self, store: RegistryStore, text: str) -> None:
        """Neither answers nor announcements fail because of what another has written."""
        store.announce("n1", [record("P"), record("Q")])
        if isinstance(store, SQLiteStore):
            with sqlite3.connect(store._path) as connection:
                connection.execute("UPDATE plugins SET record = ? WHERE key = 'P@1.0.0'", (text,))
            connection.close()
        elif isinstance(store, RedisStore):
            signature = "s".ljust(64, "0")
            store._client.hset(store._hash("n1"), "P@1.0.0", f"{signature}{text}")
            store._client.sadd(store._nodes, "no-hash")
            store._client.set(store._hash("no-hash"), "of another kind")

        assert [each.name for each in store.records()] == ["Q"]
        assert [c.record.key for c in store.announce("n2", [record("P", "other")])] == ["P@1.0.0"]

    def test_a_thousand_records_in_one_go(self, store: RegistryStore) -> None:
        many = [record(f"P{number}") for number in range(1000)]
        assert store.announce("n1", many) == []
        assert len(store.records()) == 1000


class TestSQLite:
    def test_its_files_are_for_their_owner_alone(self, tmp_path: Path) -> None:
        store = SQLiteStore(str(tmp_path / "registry.db"))
        store.announce("n1", [record()])

        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        store.close()

    def test_a_process_that_has_ended_is_dead_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "registry.db"
        code = (
            "import sys; sys.path.insert(0, sys.argv[2])\n"
            "import test_stores as t, os\n"
            "from stores import SQLiteStore\n"
            "SQLiteStore(sys.argv[1]).announce('n1', [t.record()])\n"
            "print('said', flush=True)\n"
            "sys.stdin.read()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(Path(__file__).parent)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == b"said\n"
        store = SQLiteStore(path)
        assert len(store.records()) == 1

        process.kill()
        process.wait()

        assert store.records() == []
        store.close()

    def test_a_file_that_is_none_says_so_and_works_again_when_it_is_gone(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "registry.db"
        path.write_text("this is no database, and it is long enough to look like one" * 20)
        store = SQLiteStore(path)

        with pytest.raises(StoreError, match="cannot be used"):
            store.records()
        with pytest.raises(StoreError):
            store.ping()
        path.unlink()
        assert store.records() == []
        store.close()


def test_redis_that_is_not_there_is_an_error_of_the_store_without_its_address(needs: Any) -> None:
    needs.package("redis", "requirements-services.txt")
    store = RedisStore("redis://user:secret@127.0.0.1:1/0")
    for ask in (store.records, store.ping, lambda: store.heartbeat("n"),
                lambda: store.announce("n", []), lambda: store.leave("n"),
                lambda: store.withdraw("n", ["k"])):  # fmt: skip
        with pytest.raises(StoreError) as caught:
            ask()
        assert "secret" not in str(caught.value)
        assert "127.0.0.1" not in str(caught.value)
