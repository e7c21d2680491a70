"""Killed in the middle of everything that is done beside the batches: it goes on where it was."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.kill]

FOLDER = Path(__file__).resolve().parent.parent
T0 = 1_700_000_000
SPEC: dict[str, Any] = {
    "select": {"k": "k", "v": "v"},
    "event_time": "t",
    "event_id": "id",
    "group_by": ["k"],
    "aggregates": [{"op": "count"}, {"op": "sum", "field": "v"}, {"op": "p95", "field": "v"}],
    "window": {"kind": "sliding", "size_seconds": 20, "slide_seconds": 10,
               "allowed_lateness_seconds": 1000},
}  # fmt: skip


def events(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"id": n, "k": f"k{n % 7}", "v": n % 100, "t": T0 + (n % 400) / 2}
        for n in range(first, first + count)
    ]


def rows(server: Any, name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    cursor: dict[str, str] = {}
    while True:
        page = server.get("/aggregates", pipeline=name, limit=1000, **cursor)
        for row in page["items"]:
            found[row["window_start"], row["group"]["k"]] = (row["values"], row["revision"])
        if page["next"] is None:
            return found
        cursor = {"cursor": page["next"]}


def killed_at(server: Any, moment: float) -> None:
    time.sleep(moment)
    server.kill()
    server.start()


@pytest.mark.load
def test_a_replay_that_is_killed_goes_on_and_swaps_once(make_server: Callable[[], Any]) -> None:
    server = make_server().start()
    with server.client() as client:
        client.put("/pipelines/p", json=SPEC)
        for first in range(0, 40_000, 8_000):
            client.post("/pipelines/p/events?wait=applied", json=events(first, 8_000))
        for first in range(40_000, 40_200):
            client.post("/pipelines/p/events", json=events(first, 1))
        client.post("/pipelines/p/events?wait=applied", json=events(40_200, 1))
    before = rows(server, "p")
    chance = random.Random(4)
    interrupted = 0
    for _ in range(6):
        assert server.post("/pipelines/p/replay?from=0", b"").status_code in (202, 409)
        killed_at(server, chance.uniform(0, 0.5))
        interrupted += server.get("/pipelines/p/replay")["state"] == "running"
        assert rows(server, "p") == before
        deadline = time.monotonic() + 30
        while server.get("/pipelines/p/replay")["state"] == "running":
            assert time.monotonic() < deadline
            assert rows(server, "p") == before
        assert rows(server, "p") == before
    assert interrupted
    assert server.get("/pipelines/p/replay")["state"] == "done"


def test_killed_while_segments_rotate_and_checkpoints_drop_them(
    make_server: Callable[[], Any],
) -> None:
    """The server's own start, with small segments: every few requests rotate, trim, checkpoint."""
    server = make_server()
    small = (
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); import spool, applier;"
        "spool.FileQueue.__init__.__kwdefaults__['segment_bytes'] = 20_000;"
        "applier.TRIM_BYTES = 30_000; applier.RETAIN_SECONDS = 0.01;"
        "sys.argv = ['uvicorn', 'app:app', *sys.argv[1:]];"
        "runpy.run_module('uvicorn', run_name='__main__')"
    )
    command = [sys.executable, "-c", small, str(FOLDER)]
    environment = {"QUEUE_RETAIN_DAYS": "0.000001"}
    server.start(command=command, **environment)
    chance = random.Random(3)
    ending = threading.Event()
    sent = 0

    def produce() -> None:
        nonlocal sent
        answered = True
        while not (answered and ending.is_set()):  # what got no answer may be counted, or not
            body = "\n".join(
                json.dumps({"event_id": str(e["id"]), "source": e["k"], "event_type": "t",
                            "data": {"v": e["v"]}, "timestamp": e["t"]})
                for e in events(sent, 50)
            )  # fmt: skip
            try:
                answer = server.post("/webhook/batch", body, content_type="text/plain")
            except httpx2.TransportError:
                answered = False
                time.sleep(0.02)
                continue
            assert answer.status_code == 202
            answered = True
            sent += 50

    producer = threading.Thread(target=produce)
    producer.start()
    for _ in range(8):
        time.sleep(chance.uniform(0.1, 0.4))
        server.kill()
        server.start(command=command, **environment)
    ending.set()
    producer.join(120)
    assert not producer.is_alive()  # else `sent` may still grow
    server.post("/webhook?wait=applied", json.dumps(
        {"data": {"category": "end", "value": 0, "quantity": 0, "ts": T0}}).encode())  # fmt: skip
    segments = list((server.data / "message_queue" / "ingest").glob("*.seg"))

    counted = 0
    cursor: dict[str, str] = {}
    while True:
        page = server.get("/aggregates", pipeline="events", limit=1000, **cursor)
        counted += sum(row["values"]["count"] for row in page["items"])
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}
    assert counted == 6 * sent
    assert server.get("/stats")["queue"]["first"] > 0
    assert len(segments) < 10


def test_a_pipeline_is_put_and_deleted_durably(make_server: Callable[[], Any]) -> None:
    server = make_server().start()
    for n in range(6):
        name = f"p{n}"
        with server.client() as client:
            assert client.put(f"/pipelines/{name}", json=SPEC).status_code == 201
            if n % 2:
                assert client.delete(f"/pipelines/{name}").status_code == 204
        server.kill()
        server.start()
        status = httpx2.get(f"{server.url}/pipelines/{name}").status_code
        assert status == (404 if n % 2 else 200)


def test_a_consumer_killed_between_read_and_commit_sees_its_messages_again(
    make_server: Callable[[], Any],
) -> None:
    server = make_server().start()
    spec = {**SPEC, "window": {"kind": "tumbling", "size_seconds": 10}}
    with server.client() as client:
        client.put("/pipelines/p", json=spec)
        for n in range(12):
            document = {"id": n, "k": "k", "v": n, "t": T0 + 10 * n}
            client.post("/pipelines/p/events?wait=applied", json=document)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from topics import Topics\n"
        "with Topics.open('webhook_results.db', 'message_queue') as topics:\n"
        "    while page := topics.read('aggregates', consumer='c', limit=2):\n"
        "        if not page.items: break\n"
        "        for item in page.items: print(item.offset, flush=True)\n"
        "        time.sleep(0.05)\n"
        "        topics.commit('aggregates', 'c', page.next)\n"
    )
    chance = random.Random(2)
    offsets: list[int] = []
    for round_ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(FOLDER)], cwd=server.data, stdout=subprocess.PIPE
        )
        if round_ < 6:
            time.sleep(chance.uniform(0.3, 0.9))
            process.kill()
        output, _ = process.communicate(timeout=30)
        offsets += [int(line) for line in output.split()]
        if round_ >= 6:
            break

    assert set(offsets) == set(range(1, 12))
    assert server.get("/queue/aggregates", consumer="c")["items"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs Linux")
def test_a_disk_that_fills_up_while_a_segment_begins_refuses_and_resumes(tmp_path: Path) -> None:
    import asyncio
    import errno

    from spool import FileQueue, QueueRefused

    async def run() -> None:
        queue = FileQueue(tmp_path / "queue", segment_bytes=500)
        kept = []
        real, refusing = os.open, [False]

        def full(path: Any, flags: int, mode: int = 0o777) -> int:
            if refusing[0] and flags & os.O_CREAT:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, flags, mode)

        os.open = full  # type: ignore[assignment]
        try:
            for number in range(200):
                refusing[0] = number % 20 < 10
                payload = b"%d" % number * 20
                with contextlib.suppress(QueueRefused):
                    await queue.submit(1, payload)
                    kept.append(payload)
        finally:
            os.open = real
        assert queue.statistics().refusals > 5
        assert [message.payload for message in queue.read(0)] == kept
        queue.close()
        again = FileQueue(tmp_path / "queue")
        assert [message.payload for message in again.read(0)] == kept
        again.close()

    asyncio.run(run())
