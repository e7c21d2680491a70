"""Hosts that share a registry: conflicts, divergence, and what an outage costs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster
from registry import Registry, State
from stores import MemoryStore, StoreError
from utils import (
    APIContractBase,
    APIContractMeta,
    ContractEnforcerMeta,
    PluginBase,
    registry,
)

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parent.parent
PLUGIN = """
from utils import PluginBase

class Shared(PluginBase):
    version = "1.0.0"

    def process(self, data: {kind}) -> {kind}:
        return data
"""


def define(name: str, **body: Any) -> Any:
    body.setdefault("process", lambda self, data: data)
    return ContractEnforcerMeta(name, (PluginBase,), {"version": "1.0.0", **body})


class Flaky(MemoryStore):
    """A store that can be out, and forgets everything meanwhile."""

    out = False

    def announce(self, node: str, records: Any) -> Any:
        self.ping()
        return super().announce(node, records)

    def heartbeat(self, node: str) -> bool:
        self.ping()
        return super().heartbeat(node)

    def records(self) -> Any:
        self.ping()
        return super().records()

    def ping(self) -> None:
        if self.out:
            self._beats.clear()
            self._records.clear()
            raise StoreError("It is out.")


class TestSteps:
    def test_an_outage_fails_no_request_and_state_returns(self) -> None:
        define("P")
        store = Flaky()
        cluster = Cluster(registry, store)
        cluster.step()
        assert cluster.works()
        store.out = True

        cluster.step()

        assert not cluster.works()
        assert not cluster.reachable
        records, shared = cluster.records()
        assert ("P" in {record.name for record in records}, shared) == (True, False)
        assert registry.create("P", PluginBase).process(1) == 1
        store.out = False
        cluster.step()
        assert "P" in {record.name for record in store.records()}
        assert cluster.reachable

    def test_a_conflict_is_listed_refused_and_ends_with_the_other_host(self) -> None:
        store = MemoryStore()
        theirs = Registry()
        define("P")
        other = registry.find("P")
        registry.unregister("P")
        other.state = State.ENABLED
        theirs.register(other)
        first = Cluster(theirs, store, host="first")
        first.step()
        define("P", process=lambda self, data, mode=1: data)
        second = Cluster(registry, store, host="second")

        second.step()
        second.step()

        assert registry.find("P").state is State.CONFLICT
        failure = registry.failures["P@1.0.0"]
        assert (failure.name, failure.phase) == ("P", "conflict")
        assert "first" in failure.error
        first.stop()
        second.step()
        assert registry.find("P").state is State.ENABLED
        assert "P@1.0.0" not in registry.failures
        second.stop()

    def test_what_is_gone_is_withdrawn(self) -> None:
        store = MemoryStore()
        cluster = Cluster(registry, store)
        define("P")
        cluster.step()
        registry.unregister("P")
        cluster.step()
        assert "P" not in {record.name for record in store.records()}

    def test_a_thread_announces_by_itself(self) -> None:
        store = MemoryStore()
        cluster = Cluster(registry, store, heartbeat_seconds=60)
        cluster.start()
        define("P")
        deadline = time.monotonic() + 10
        while not any(r.name == "P" for r in store.records()) and time.monotonic() < deadline:
            time.sleep(0.01)
        cluster.stop()
        assert time.monotonic() < deadline
        assert store.records() == []


def test_get_redis_registry_answers_from_the_embedded_store_without_redis() -> None:
    import cluster

    class Mine(APIContractBase):
        version, description, author = "1.2.0", "Mine.", "ada"

        def process(self, data: int) -> int:
            return data

        def validate(self, data: int) -> bool:
            return True

    try:
        found = APIContractMeta.get_redis_registry()["Mine"]
        assert (found.version, found["contract"], found.author) == (
            "1.2.0", "APIContractBase", "ada",
        )  # fmt: skip
        assert APIContractMeta.get_registry()["Mine"] is Mine
        assert Path("plugin_registry.db").exists()
    finally:
        cluster.leave()


class OwnRedis:
    """A server that may be killed."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.directory = directory
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no"],
            cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise AssertionError("Redis did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def expire_at_once(self, *pids: int) -> None:
        """Let pass what is left of the 15 s of these processes, which no longer beat."""
        import redis

        client = redis.Redis(port=self.port)
        for pid in pids:
            (key,) = client.keys(f"*:node:*:{pid}:*")
            assert 0 < client.pttl(key) <= 15_000
            client.pexpire(key, 1)
        client.close()


@pytest.fixture
def own_redis(tmp_path: Path, needs: Any) -> Iterator[OwnRedis]:
    needs.package("redis", "requirements-services.txt")
    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("needs redis-server")
        pytest.skip("needs redis-server")
    server = OwnRedis(tmp_path)
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGCONT)
        server.kill()


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def names(server: Any) -> set[tuple[str, str]]:
    return {(record["name"], record["node"]) for record in server.get("/cluster/plugins")}


@pytest.mark.kill
class TestHosts:
    def test_conflict_divergence_and_death(
        self, make_server: Callable[[], Any], own_redis: OwnRedis
    ) -> None:
        first, second, third = make_server(), make_server(), make_server()
        first.write("shared.py", PLUGIN.format(kind="int"))
        second.write("shared.py", PLUGIN.format(kind="str"))
        third.write("shared.py", PLUGIN.format(kind="int") + "\n# other code\n")
        first.start(REDIS_URL=own_redis.url)
        until(lambda: names(first))

        second.start(REDIS_HOST="127.0.0.1", REDIS_PORT=str(own_redis.port), REDIS_DB="0")
        third.start(REDIS_URL=own_redis.url)

        (failure,) = until(lambda: second.get("/plugins/failed"))
        assert failure["name"] == "Shared"
        assert failure["phase"] == "conflict"
        assert second.post("/plugins/Shared/process", "x").status_code == 409
        assert first.post("/plugins/Shared/process", 1).status_code == 200
        records = until(lambda: len(first.get("/cluster/plugins")) == 2) and first.get(
            "/cluster/plugins"
        )
        assert {record["divergent"] for record in records} == {True}
        assert len({record["code_hash"] for record in records}) == 2
        assert len({record["signature_hash"] for record in records}) == 1
        done = subprocess.run(
            [sys.executable, "-c",
             "from utils import APIContractMeta;"
             "r = APIContractMeta.get_redis_registry()['Shared'];"
             "print(r.version, r.contract, len(r.code_hash), bool(r.host))"],
            env={**os.environ, "REDIS_URL": own_redis.url}, cwd=FOLDER, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout == "1.0.0 PluginBase 64 True\n", done.stderr

        first.kill()
        third.kill()
        assert first.process is not None
        assert third.process is not None
        own_redis.expire_at_once(first.process.pid, third.process.pid)

        until(lambda: second.post("/plugins/Shared/process", "x").status_code == 200)
        assert second.get("/plugins/failed") == []

    def test_an_outage_degrades_health_fails_no_request_and_state_returns(
        self, make_server: Callable[[], Any], own_redis: OwnRedis
    ) -> None:
        server = make_server()
        server.write("shared.py", PLUGIN.format(kind="int"))
        server.start(REDIS_URL=own_redis.url)
        until(lambda: names(server))
        own_redis.kill()

        with server.client() as client:
            health = client.get("/health")
            assert health.status_code == 503
            assert health.json() == {"status": "degraded", "components": {"registry_store": False}}
            for number in range(50):
                assert client.post("/plugins/Shared/process", json=number).json() == number
            told = client.get("/cluster/plugins")
            assert told.status_code == 200
            assert told.headers["x-registry-store"] == "unreachable"
            assert [record["name"] for record in told.json()] == ["Shared"]
            own_redis.start()
            until(lambda: client.get("/health").status_code == 200)
            until(lambda: client.get("/cluster/plugins").json())
            own_redis.process.send_signal(signal.SIGSTOP)  # it accepts, and never answers
            started = time.monotonic()
            assert client.post("/plugins/Shared/process", json=1).json() == 1
            assert time.monotonic() - started < 0.9  # asking Redis would take 1 s
            assert client.get("/health").status_code == 503
            own_redis.process.send_signal(signal.SIGCONT)
            until(lambda: client.get("/health").status_code == 200)
        server.stop()
        assert "Traceback" not in server.log.read_text()

    def test_a_server_starts_while_redis_is_out(
        self, make_server: Callable[[], Any], needs: Any
    ) -> None:
        needs.package("redis", "requirements-services.txt")
        server = make_server()
        server.write("shared.py", PLUGIN.format(kind="int"))
        server.start(REDIS_URL="redis://user:hush@127.0.0.1:1/0")

        assert server.post("/plugins/Shared/process", 3).json() == 3
        server.stop()
        assert "hush" not in server.log.read_text()

    def test_an_address_that_is_none_ends_the_start_with_one_sentence(
        self, make_server: Callable[[], Any], needs: Any
    ) -> None:
        needs.package("redis", "requirements-services.txt")
        server = make_server()

        with pytest.raises(AssertionError, match="the server ended"):
            server.start(REDIS_URL="hunter2")

        log = server.log.read_text()
        assert log.count("The address of Redis cannot be used: REDIS_URL is like redis://") == 1
        assert "Traceback" not in log
        assert "hunter2" not in log

    def test_hosts_without_redis_share_a_file(
        self, make_server: Callable[[], Any], tmp_path: Path
    ) -> None:
        path = str(tmp_path / f"{uuid.uuid4().hex}.db")
        first, second = make_server(), make_server()
        for server in (first, second):
            server.write("shared.py", PLUGIN.format(kind="int"))
            server.start(REGISTRY_PATH=path)
        until(lambda: len(names(first)) == 2)

        second.kill()

        until(lambda: len(names(first)) == 1, 2)
