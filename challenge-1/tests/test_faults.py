"""Killed at random moments, a full disk, hanging clients: what was acknowledged is counted once."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytestmark = [pytest.mark.integration]

FOLDER = Path(__file__).resolve().parent.parent
ROUNDS = 20
PRODUCERS = 6
BACK_SECONDS = 3


def event(number: str, value: int) -> dict[str, Any]:
    return {
        "event_id": number, "source": f"s{value % 3}", "event_type": "t",
        "data": {"x": value}, "timestamp": 1_700_000_000 + value % 50,
    }  # fmt: skip


class Producer(threading.Thread):
    """Sends until it is acknowledged, over restarts: single events, and uploads by key."""

    def __init__(self, server: Any, seed: int) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.chance = random.Random(seed)
        self.ending = threading.Event()
        self.sent: dict[str, int] = {}  # id -> value of everything acknowledged
        self.measurements = 0  # sum of what /webhook acknowledged
        self.resent = 0

    def run(self) -> None:
        with httpx2.Client(timeout=10) as self.client:
            self.send_until_told_to_end()

    def send_until_told_to_end(self) -> None:
        while not self.ending.is_set():
            kind = self.chance.random()
            if kind < 0.7:
                values = [self.chance.randrange(1000)]
            elif kind < 0.9:
                values = [self.chance.randrange(1000) for _ in range(50)]
            else:
                values = [self.chance.randrange(1000) for _ in range(4000)]
            if self.chance.random() < 0.2:
                self.send_measurements(values)
            else:
                self.send_events(values)

    def send_events(self, values: list[int]) -> None:
        events = {uuid.UUID(int=self.chance.getrandbits(128)).hex: value for value in values}
        body = "\n".join(json.dumps(event(name, value)) for name, value in events.items())
        self.until_acknowledged("/webhook/batch", body, {})
        self.sent.update(events)

    def send_measurements(self, values: list[int]) -> None:
        body = "\n".join(
            json.dumps({"data": {"category": "c", "value": v, "quantity": 1, "ts": 1_700_000_000}})
            for v in values
        )
        key = uuid.UUID(int=self.chance.getrandbits(128)).hex
        self.until_acknowledged("/webhook", body, {"idempotency-key": key})
        self.measurements += sum(values)

    def until_acknowledged(self, path: str, body: str, headers: dict[str, str]) -> None:
        while True:
            with contextlib.suppress(httpx2.TransportError):
                answer = self.client.post(
                    self.server.url + path,
                    content=body,
                    headers={"content-type": "application/x-ndjson", **headers},
                )
                if answer.status_code == 202:
                    return
                assert answer.status_code in (429, 503), answer.text
            self.resent += 1
            time.sleep(0.05)


def totals(server: Any, pipeline: str, member: str) -> tuple[int, float]:
    count, total, cursor = 0, 0.0, None
    while True:
        page = server.get(
            "/aggregates", pipeline=pipeline, limit=1000, **({"cursor": cursor} if cursor else {})
        )
        for row in page["items"]:
            count += row["values"]["count"]
            total += row["values"][f"sum_{member}"]
        if (cursor := page["next"]) is None:
            overlap = 6 if pipeline == "events" else 1  # windows that an event counts in
            return count // overlap, total / overlap


@pytest.mark.kill
@pytest.mark.load
def test_killed_at_random_moments_nothing_acknowledged_is_lost_and_nothing_counts_twice(
    make_server: Callable[[], Any],
) -> None:
    server = make_server().start()
    chance = random.Random(11)
    producers = [Producer(server, seed) for seed in range(PRODUCERS)]
    for producer in producers:
        producer.start()
    back = []
    for _ in range(ROUNDS):
        time.sleep(chance.uniform(0.05, 0.8))
        server.kill()
        started = time.monotonic()
        server.start()
        back.append(time.monotonic() - started)
    for producer in producers:
        producer.ending.set()
    for producer in producers:
        producer.join(30)
        assert not producer.is_alive()

    server.post(
        "/webhook?wait=applied",
        b'{"data":{"category":"end","value":0,"quantity":0,"ts":1700000000}}',
    )
    count, total = totals(server, "events", "x")
    sent = {name: value for producer in producers for name, value in producer.sent.items()}
    assert sum(producer.resent for producer in producers) > 0
    assert (count, total) == (len(sent), sum(sent.values()))
    _, measured = totals(server, "webhook", "value")
    assert measured == sum(producer.measurements for producer in producers)
    stats = server.get("/stats")
    assert stats["received"] == stats["accepted"] + stats["rejected"] + stats["duplicates"]
    assert stats["backlog_events"] == 0
    assert statistics.median(back) < BACK_SECONDS, back
    server.stop()


@pytest.mark.kill
def test_killed_while_it_recovers_it_recovers_the_next_time(
    make_server: Callable[[], Any],
) -> None:
    server = make_server().start()
    body = "\n".join(json.dumps(event(f"e{n}", n)) for n in range(30_000)).encode()
    answer = server.post("/webhook/batch", body, content_type="application/x-ndjson")
    assert answer.json()["accepted"] == 30_000
    server.kill()
    chance = random.Random(5)
    for _ in range(8):
        command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER)]
        with subprocess.Popen(
            [*command, "--port", "0"], cwd=server.data,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            time.sleep(chance.uniform(0.4, 1.5))
            process.kill()

    server.start()
    again = server.post("/webhook/batch?wait=applied", body, content_type="application/x-ndjson")

    assert again.json()["duplicates"] == 30_000
    assert totals(server, "events", "x") == (30_000, sum(range(30_000)))


def fill(server: Any, status: int) -> int:
    """Send until the disk refuses; return how many were acknowledged."""
    document = {"category": "c", "value": 1, "quantity": 1, "ts": 1.7e9, "pad": "x" * 2000}
    body = json.dumps({"data": document}).encode()
    for acknowledged in range(20_000):
        answer = server.post("/webhook", body)
        if answer.status_code != 202:
            assert answer.status_code == status, answer.text
            assert answer.headers["retry-after"]
            assert "Traceback" not in answer.text
            return acknowledged
    raise AssertionError("the disk never refused")


def drained(server: Any, acknowledged: int) -> None:
    """After the disk has room again: everything acknowledged is there, and nothing else."""
    deadline = time.monotonic() + 20
    while (answer := server.post("/webhook?wait=applied", GOOD)).status_code != 202:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    assert totals(server, "webhook", "value")[0] == acknowledged + 1
    assert server.get("/health")["status"] == "healthy"


GOOD = b'{"data":{"category":"c","value":1,"quantity":1,"ts":1700000000}}'


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_at_the_limit_of_a_files_size_it_refuses_and_resumes_by_itself(
    make_server: Callable[[], Any],
) -> None:
    server = make_server().start()
    pid = server.process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))

    acknowledged = fill(server, 507)
    health = server.get("/healthz")
    stats = server.get("/stats")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    assert acknowledged > 50
    assert health == {"status": "alive"}
    assert stats["accepted"] == acknowledged
    drained(server, acknowledged)
    server.kill()
    server.start()
    assert totals(server, "webhook", "value")[0] == acknowledged + 1


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.call(
        [str(unshare), "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small file system")
def test_on_a_full_disk_it_refuses_and_resumes_by_itself(make_server: Callable[[], Any]) -> None:
    server = make_server()
    disk = server.data / "disk"
    disk.mkdir()
    uvicorn = f"exec {sys.executable} -m uvicorn app:app --app-dir {FOLDER}"
    script = f'mount -t tmpfs -o size=6m tmpfs {disk} && cd {disk} && {uvicorn} "$@"'
    server.start(command=["unshare", "-m", "sh", "-c", script, "sh"])
    inside = Path(f"/proc/{server.process.pid}/root{disk}")
    (inside / "filler").write_bytes(bytes(3_000_000))

    acknowledged = fill(server, 507)
    upload = b"\n".join([GOOD] * 40_000)
    refused = server.post("/webhook", upload, content_type="application/x-ndjson")
    assert refused.status_code == 507
    assert list((inside / "message_queue" / "uploads").iterdir()) == []
    (inside / "filler").unlink()

    drained(server, acknowledged)


@pytest.mark.load
def test_hundreds_of_half_sent_bodies_do_not_keep_others_from_being_served(
    make_server: Callable[[], Any],
) -> None:
    impatient = (
        "import sys, runpy, functools; sys.path.insert(0, sys.argv.pop(1)); import web;"
        "web.Limits = functools.partial(web.Limits, grace_seconds=6);"  # 20 by default
        "sys.argv = ['uvicorn', 'app:app', *sys.argv[1:]];"
        "runpy.run_module('uvicorn', run_name='__main__')"
    )
    server = make_server().start(command=[sys.executable, "-c", impatient, str(FOLDER)])
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = b"POST /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(300):
            each = stack.enter_context(socket.create_connection(address))
            each.sendall(head + b"Content-Length: 100\r\n\r\n{")
            sockets.append(each)
        for _ in range(50):
            started = time.monotonic()
            assert server.post("/webhook", GOOD).status_code == 202
            assert server.get("/healthz")
            assert time.monotonic() - started < 2
        assert server.get("/stats")["resources"]["queue_size"] == 300
        started = time.monotonic()
        for each in sockets:
            each.settimeout(30)
            assert each.recv(4096)[9:12] == b"408"
        assert time.monotonic() - started < 16
    assert server.get("/stats")["received"] == 50
    assert "Traceback" not in server.log.read_text()


@pytest.mark.load
def test_under_load_open_windows_are_visible_within_a_second(server: Any) -> None:
    load = subprocess.Popen(
        [sys.executable, str(FOLDER / "benchmarks" / "load.py"), f"{server.url}/webhook/ingest",
         "--requests", "60000"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    waits = []
    number = 0
    while load.poll() is None:
        number += 1
        body = GOOD.replace(b'"c"', b'"k%d"' % number)
        assert server.post("/webhook", body).status_code == 202
        started = time.monotonic()
        while not server.get("/aggregates", group=f"category:k{number}")["items"]:
            assert time.monotonic() - started < 10
        waits.append(time.monotonic() - started)
    assert load.stdout is not None
    assert json.loads(load.stdout.read())["statuses"] == {"202": 60_000}
    load.stdout.close()

    assert len(waits) > 10
    assert sorted(waits)[int(len(waits) * 0.99)] < 1


def test_a_client_gone_in_the_middle_leaves_nothing(server: Any) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    line = GOOD + b"\n"
    with socket.create_connection(address) as gone:
        gone.sendall(
            b"POST /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
            b"Content-Length: 99999999\r\n\r\n" + line * 20_000
        )
        uploads = server.data / "message_queue" / "uploads"
        deadline = time.monotonic() + 10
        while not list(uploads.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset it
    while list(uploads.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert server.get("/stats")["received"] == 0
    assert (
        server.post("/webhook?wait=applied", line * 3, content_type="text/plain").json()["accepted"]
        == 3
    )


def test_overload_is_429_with_a_wait_and_nothing_accepted_is_lost(
    make_server: Callable[[], Any],
) -> None:
    server = make_server().start(BACKLOG_MAX_BYTES="65536", QUEUE_MAXSIZE="4")
    accepted, refused = [], []
    body = b"\n".join([GOOD] * 400)

    def flood() -> None:
        with server.client() as client:
            for _ in range(40):
                answer = client.post(
                    "/webhook", content=body, headers={"content-type": "text/plain"}
                )
                if answer.status_code == 202:
                    accepted.append(answer.json()["accepted"])
                else:
                    assert answer.status_code == 429
                    assert 1 <= int(answer.headers["retry-after"]) <= 60
                    refused.append(answer)

    threads = [threading.Thread(target=flood) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 20
    while server.get("/stats")["backlog_bytes"]:
        assert time.monotonic() < deadline

    assert refused
    assert totals(server, "webhook", "value")[0] == sum(accepted)


def test_it_ends_at_once_although_somebody_waits_for_a_store_that_refuses(
    server: Any,
) -> None:
    pid = server.process.pid
    database = server.data / "webhook_results.db-wal"
    size = database.stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(size, 200_000), resource.RLIM_INFINITY))
    many = b"\n".join(GOOD.replace(b'"c"', b'"k%d"' % n) for n in range(1500))
    assert server.post("/webhook", many, content_type="text/plain").status_code == 202
    waiting = threading.Thread(
        target=lambda: server.post("/webhook?wait=applied", GOOD), daemon=True
    )
    deadline = time.monotonic() + 20
    while server.get("/health")["status"] == "healthy":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    waiting.start()
    while server.get("/stats")["accepted"] < 1501:
        assert time.monotonic() < deadline

    started = time.monotonic()
    server.stop()

    assert time.monotonic() - started < 3
    server.start()
    server.post("/webhook?wait=applied", GOOD)
    assert totals(server, "webhook", "value")[0] == 1502


def test_frozen_and_thawed_it_goes_on(server: Any) -> None:
    os.kill(server.process.pid, signal.SIGSTOP)
    with pytest.raises(httpx2.TimeoutException):
        httpx2.get(f"{server.url}/healthz", timeout=0.3)
    os.kill(server.process.pid, signal.SIGCONT)

    assert server.post("/webhook", GOOD).status_code == 202


def test_a_database_that_cannot_be_written_is_named_at_the_start(
    make_server: Callable[[], Any],
) -> None:
    server = make_server()
    (server.data / "webhook_results.db").write_text("not a database" * 100)

    with pytest.raises(AssertionError, match="DB_PATH") as ended:
        server.start()

    assert "Traceback" not in str(ended.value)
