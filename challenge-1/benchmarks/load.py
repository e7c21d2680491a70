"""A small closed-loop HTTP load generator: prepared requests over keep-alive connections.

It parses nothing but the status line and the length, so that one core drives a server on another.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit


class Connection(asyncio.Protocol):
    """One connection with one request in flight."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.received = b""
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.fire()

    def fire(self) -> None:
        request = self.load.next_request()
        if request is None:
            self.transport.close()
            return
        self.sent_at = time.perf_counter()
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        received = self.received + data if self.received else data
        head = received.find(b"\r\n\r\n")
        if head < 0:
            self.received = received
            return
        at = received.lower().find(b"content-length:", 0, head)
        length = int(received[at + 15 : received.index(b"\r", at)])
        if len(received) < head + 4 + length:
            self.received = received
            return
        self.received = b""
        self.load.done(received[9:12], time.perf_counter() - self.sent_at)
        self.fire()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.load.lost()


class Load:
    """Counts and times the answers of one run."""

    def __init__(self, make: Callable[[int], bytes], requests: int, seconds: float) -> None:
        self.make = make
        self.left = requests
        self.number = 0
        self.deadline = time.perf_counter() + seconds
        self.latencies: list[float] = []
        self.statuses: dict[str, int] = {}
        self.open = 0
        self.finished = asyncio.Event()

    def next_request(self) -> bytes | None:
        if self.left <= 0 or time.perf_counter() >= self.deadline:
            return None
        self.left -= 1
        self.number += 1
        return self.make(self.number)

    def done(self, status: bytes, seconds: float) -> None:
        self.latencies.append(seconds)
        self.statuses[status.decode()] = self.statuses.get(status.decode(), 0) + 1

    def lost(self) -> None:
        self.open -= 1
        if self.open == 0:
            self.finished.set()


def post(url: str, make_body: Callable[[int], bytes], content_type: str) -> Callable[[int], bytes]:
    """A maker of whole requests out of a maker of bodies."""
    parts = urlsplit(url)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: "
    ).encode()

    def make(number: int) -> bytes:
        body = make_body(number)
        return b"%s%d\r\n\r\n%s" % (head, len(body), body)

    return make


async def run(
    url: str,
    make_body: Callable[[int], bytes],
    *,
    connections: int,
    requests: int,
    seconds: float = 60.0,
    content_type: str = "application/json",
) -> dict[str, Any]:
    """Send the requests; return rate, statuses, and latencies in milliseconds."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    load = Load(post(url, make_body, content_type), requests, seconds)
    load.open = connections
    started = time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(
            lambda: Connection(load), str(parts.hostname), parts.port or 80
        )
    await load.finished.wait()
    took = time.perf_counter() - started
    ordered = sorted(load.latencies)
    return {
        "per_second": len(ordered) / took,
        "statuses": load.statuses,
        "latencies": ordered,
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
    }


def webhook_body(number: int) -> bytes:
    return b'{"data":{"category":"c%d","value":%d.5,"quantity":%d,"ts":%d}}' % (
        number % 20,
        number % 1000,
        number % 7,
        1_768_471_200 + number // 1000,
    )


def event_body(number: int, run: str = "") -> bytes:
    return (
        b'{"event_id":"%s-%d","source":"s%d","event_type":"order","data":{"amount":%d.5,"items":2},'
        b'"timestamp":%d}'
        % (run.encode(), number, number % 10, number % 1000, 1_768_471_200 + number // 1000)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50_000)
    arguments = parser.parse_args()
    import uvloop

    stamp = f"{time.time():.6f}"
    body = (
        webhook_body
        if arguments.url.endswith("/webhook")
        else lambda number: event_body(number, stamp)
    )
    found = uvloop.run(
        run(arguments.url, body, connections=arguments.connections, requests=arguments.requests)
    )
    del found["latencies"]
    print(json.dumps(found))
