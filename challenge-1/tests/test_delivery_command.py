"""`python delivery.py --topic aggregates --to URL`, as a process, against a real server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog

FOLDER = Path(__file__).resolve().parent.parent
START = 1_700_000_000
RATE = "60"


@pytest.fixture
def downstream() -> Iterator[Callable[..., "Downstream"]]:
    """Servers that take deliveries and remember them."""
    made: list[Downstream] = []

    def make(*options: str) -> Downstream:
        made.append(Downstream(*options))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Downstream:
    """`POST /downstream/records` of the simulators, as a process; `accepted` is what it took."""

    def __init__(self, *options: str) -> None:
        from fetch import mock_servers

        self._context = mock_servers(*options)
        self.url = self._context.__enter__()
        self.to = f"{self.url}/downstream/records"

    def accepted(self) -> dict[str, int]:
        found: dict[str, int] = httpx2.get(f"{self.url}/downstream/accepted").json()
        return found

    def close(self) -> None:
        self._context.__exit__(None, None, None)


def fill(windows: int, *, first: int = 0) -> None:
    """Close so many windows: that many messages in the topic `aggregates`."""
    from utils import Pipeline

    async def put() -> None:
        async with Pipeline(db_path="webhook_results.db", queue_dir="message_queue") as pipeline:
            await pipeline.start_workers()
            await asyncio.gather(*(
                pipeline.ingest_q.put({
                    "data": {"category": "a", "value": n, "quantity": 1, "ts": START + 10 * n}
                })
                for n in range(first, first + windows + 1)
            ))  # fmt: skip

    asyncio.run(put())


def deliver(to: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "delivery.py"), "--topic", "aggregates", "--to", to,
         *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_until(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def values() -> list[Any]:
    from topics import Topics

    with Topics.open("webhook_results.db", "message_queue") as topics:
        return [item.decoded() for item in topics.read("aggregates", 0, limit=1000).items]


@pytest.mark.webhook
def test_with_the_server_stopped_every_window_is_posted_once_under_a_stable_key(
    downstream: Callable[..., Downstream],
) -> None:
    fill(30)
    server = downstream("--downstream-rps", "1000")
    code, out, err = ended(deliver(server.to, "--until-empty", "--rate-limit", RATE))

    assert code == 0, err
    accepted = server.accepted()
    assert len(accepted) == len(values()) == 30
    assert "30 delivered, 0 waiting, 0 given up" in out.splitlines()[-1]
    assert ended(deliver(server.to, "--until-empty"))[0] == 0
    assert server.accepted() == accepted  # the consumer stands at the end

    code, _, err = ended(deliver(server.to, "--until-empty", "--consumer", "x", "--quiet"))
    assert (code, err) == (0, "")
    assert set(server.accepted()) == set(accepted)  # another consumer, the same keys


@pytest.mark.kill
def test_killed_and_ended_by_sigterm_it_goes_on_where_it_stopped(
    downstream: Callable[..., Downstream],
) -> None:
    fill(60)
    server = downstream("--downstream-rps", RATE, "--downstream-failure-rate", "0.02")
    process = deliver(server.to, "--rate-limit", RATE)
    wait_until(lambda: len(server.accepted()) >= 12, process)
    process.kill()
    process.communicate()

    process = deliver(server.to, "--rate-limit", RATE)
    wait_until(lambda: len(server.accepted()) >= 35, process)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 0, err
    assert time.monotonic() - started < 2.5
    assert "Traceback" not in err

    code, _, err = ended(deliver(server.to, "--until-empty", "--rate-limit", RATE))
    assert code == 0, err
    assert len(server.accepted()) == 60
    assert not Path("message_queue/undelivered/aggregates-delivery.ndjson").exists()


@pytest.mark.webhook
def test_beside_a_running_server_windows_are_delivered_as_they_close(
    make_server: Callable[[], Any], downstream: Callable[..., Downstream]
) -> None:
    service = make_server()
    os.chdir(service.data)
    service.start()
    target = downstream("--downstream-rps", "1000", "--downstream-failure-rate", "0")
    process = deliver(target.to, "--header", "X-Team: books")
    try:
        for batch in range(3):
            lines = [
                json.dumps({"data": {"category": "a", "value": 1, "quantity": 1,
                                     "ts": START + 10 * (5 * batch + n)}})
                for n in range(5)
            ]  # fmt: skip
            answer = service.post("/webhook?wait=applied", "\n".join(lines),
                                  content_type="text/plain")  # fmt: skip
            assert answer.status_code == 202
            expected = 5 * batch + 4
            wait_until(lambda expected=expected: len(target.accepted()) == expected, process)  # type: ignore[misc]
        consumers = service.get("/queue")
        assert "delivery" in json.dumps(consumers)
        second = deliver(target.to)
        code, _, err = ended(second)
        assert (code, "at work already" in err) == (2, True)
    finally:
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


@pytest.mark.integration
def test_what_cannot_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    from delivery import main

    to = "http://127.0.0.1:9/"
    for arguments, said in (
        ((to,), "no database"), (("file:///x",), "http or https"),
        ((to, "--rate-limit", "-1"), "--rate-limit"), ((to, "--header", "x"), "--header"),
        ((to, "--header", "X: \r\nY: z"), "--header"), ((to, "--header", "é: a"), "--header"),
        ((to, "--header", "idempotency-key: a"), "every message has its own"),
        (("http://127.0.0.1:99999/",), "http or https"), (("http://[::1/",), "http or https"),
        ((to, "--consumer", "../x"), ""),
    ):  # fmt: skip
        try:
            code = main(["--topic", "aggregates", "--to", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        err = capsys.readouterr().err
        assert code == 2, err
        assert said in err
    structlog.reset_defaults()


@pytest.mark.webhook
def test_a_consumer_beyond_the_end_of_the_topic_is_refused() -> None:
    fill(3)
    Path("message_queue/consumers/aggregates").mkdir(parents=True)
    Path("message_queue/consumers/aggregates/delivery").write_text("99\n")
    code, _, err = ended(deliver("http://127.0.0.1:9/"))

    assert (code, "do not belong together" in err) == (2, True)
