"""HTTP APIs: rate limit, connection limit, retries and a circuit breaker around httpx2."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import stamina
from aiolimiter import AsyncLimiter

from addresses import Address
from breaker import Breaker
from connections import OPERATION_SECONDS, Connection, Connector
from failures import AcquireError, ConnectionBroken, OperationError

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
WORTH_A_RETRY = frozenset({429, 502, 503, 504})
LARGEST_ANSWER = 10 * 1024 * 1024  # bytes, decoded


class API(Connection):
    """`await get(path)`, `await request(method, path)`: answers are httpx2 responses, read whole.

    An idempotent request is tried again after a broken connection and after 429, 502, 503 and 504,
    within the deadline of the operation; the last answer counts. Redirects are not followed.
    """

    def __init__(
        self,
        address: Address,
        operation_timeout: float,
        *,
        rate: float | None,
        retries: int,
        breaker: Breaker,
        max_connections: int,
        transport: Any,
        headers: Mapping[str, str] | None,
    ) -> None:
        super().__init__(address, operation_timeout)
        self._limiter = None if rate is None else AsyncLimiter(1, 1 / rate)
        self._attempts = retries + 1
        self.breaker = breaker
        self._max_connections = max_connections
        self._seats = asyncio.Semaphore(max_connections)
        self.requests = self.retried = 0
        self._client = httpx2.AsyncClient(
            base_url="http://embedded" if address.embedded else address.url,
            transport=transport or (httpx2.ASGITransport(app=echo) if address.embedded else None),
            timeout=operation_timeout,
            limits=httpx2.Limits(max_connections=max_connections),
            headers=dict(headers or {}),
            follow_redirects=False,
        )

    def is_connection_error(self, error: Exception) -> bool:
        """What httpx2 raises when the server is gone."""
        return isinstance(error, (OSError, httpx2.TransportError))

    async def get(self, path: str = "", **options: Any) -> httpx2.Response:
        """GET a path of the API."""
        return await self.request("GET", path, **options)

    async def request(self, method: str, path: str = "", **options: Any) -> httpx2.Response:
        """Send a request; options are those of httpx2 (`json`, `params`, `headers`, …)."""
        if "://" in path or path.startswith("//"):
            raise ValueError("Give a path of this API, not a URL of another place.")
        method = method.upper()
        attempts = self._attempts if method in IDEMPOTENT else 1
        async with self.operation(f"{method} {path[:80]!r}"):
            async for attempt in stamina.retry_context(
                on=_Again, attempts=attempts, timeout=self.operation_timeout,
                wait_initial=0.05, wait_max=1.0, wait_jitter=0.05,
            ):  # fmt: skip
                with attempt:
                    self.retried += attempt.num > 1
                    try:
                        return await self._once(method, path, options, attempt.num < attempts)
                    except httpx2.TransportError as error:
                        if attempt.num < attempts:
                            raise _Again(error) from error
                        raise
        raise AssertionError("a retry always returns or raises")

    async def _once(
        self, method: str, path: str, options: Mapping[str, Any], again: bool
    ) -> httpx2.Response:
        if not self.breaker.admit():
            raise ConnectionBroken(
                f"{self.address.shown} failed too often: it is left alone for another "
                f"{self.breaker.seconds_left():.1f} s."
            )
        try:
            if self._limiter is not None:
                await self._limiter.acquire()
            async with self._seats:
                self.requests += 1
                response = await self._read(self._client.build_request(method, path, **options))
        except asyncio.CancelledError:
            self.breaker.failed()  # at the deadline of the operation, or from outside
            raise
        except httpx2.TransportError:
            self.breaker.failed()
            raise
        except BaseException:
            self.breaker.withdrawn()
            raise
        if response.status_code >= 500:
            self.breaker.failed()
        else:
            self.breaker.succeeded()
        if again and response.status_code in WORTH_A_RETRY:
            raise _Again(response)
        return response

    async def _read(self, request: httpx2.Request) -> httpx2.Response:
        """The whole answer, as long as it has a size that can be kept."""
        answer = await self._client.send(request, stream=True)
        try:
            body = bytearray()
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > LARGEST_ANSWER:
                    raise OperationError(
                        f"{self.address.shown} answered with more than {LARGEST_ANSWER:,} bytes."
                    )
        finally:
            await answer.aclose()
        headers = [
            (name, value)
            for name, value in answer.headers.multi_items()
            if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
        ]
        return httpx2.Response(
            answer.status_code, headers=headers, content=bytes(body), request=request
        )

    async def probe(self, path: str, *, must_be_fine: bool) -> None:
        """Ask once, past breaker and limits; any answer will do unless it must be a good one."""
        answer = await self._read(
            self._client.build_request("GET" if must_be_fine else "HEAD", path)
        )
        if must_be_fine and answer.status_code >= 400:
            raise AcquireError(f"{self.address.shown} answers its health check with {answer.status_code}.")  # noqa: E501  # fmt: skip

    async def check(self) -> None:
        """Ask for anything, or for its health where a path of it is known."""
        async with self.operation("the check"):
            await self.probe(self.health or "", must_be_fine=self.health is not None)

    health: str | None = None

    async def close(self) -> None:
        """Close its connections."""
        self.closed = True
        await self._client.aclose()

    def stats(self) -> Mapping[str, float]:
        """Requests, retries, and what the breaker refused."""
        return {
            "in_use": float(self.in_use),
            "max": float(self._max_connections),
            "requests": float(self.requests),
            "retried": float(self.retried),
            "rejected": float(self.breaker.rejected),
            "breaker_open": float(self.breaker.seconds_left() > 0),
        }


class _Again(Exception):
    """Worth another attempt."""


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The embedded API: says what it was asked."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode("latin-1"),
        "body": body.decode("utf-8", "replace"),
    }
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


class APIConnection(Connector):
    """An HTTP API at a base URL; without one an embedded echo answers.

    `rate` is requests per second, `retries` how often an idempotent request is repeated, `health` a
    path that has to answer well. Connecting is lazy in HTTP, so acquiring asks once.
    """

    kind = "api"
    address_kind = "api"

    def __init__(
        self,
        base_url: str | None = None,
        *,
        health: str | None = None,
        rate: float | None = None,
        retries: int = 2,
        breaker: Breaker | None = None,
        max_connections: int = 20,
        headers: Mapping[str, str] | None = None,
        transport: Any = None,
        operation_timeout: float = OPERATION_SECONDS,
        **options: Any,
    ) -> None:
        super().__init__(base_url, operation_timeout=operation_timeout, **options)
        if rate is not None and not rate > 0:
            raise ValueError("A rate is more than zero requests per second.")
        self._health = health
        self._make: Callable[[Address], API] = lambda address: API(
            address, operation_timeout, rate=rate, retries=retries,
            breaker=breaker or Breaker(), max_connections=max_connections,
            transport=transport, headers=headers,
        )  # fmt: skip

    async def connect(self, address: Address) -> API:
        """Make the client, and ask once."""
        api = self._make(address)
        api.health = None if address.embedded else self._health
        try:
            await api.probe(api.health or "", must_be_fine=api.health is not None)
        except BaseException:
            await api.close()
            raise
        return api
