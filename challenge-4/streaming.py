"""A running pipeline as NDJSON: pieces made in threads, the last line says how it ended.

However it ends (all rows sent, an error, a client that left or does not read, a service that
stops), the rows are closed and the place is given back. How long a client may read nothing is
decided in `web.py`, for every answer: sending then raises here.
"""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

import web
from budgets import Budget
from language import Pipeline
from runs import Service, encode, problem_of, watched

CHUNK_BYTES = 32 * 1024
CHUNK_SECONDS = 0.05  # a slow stream is sent in pieces of this age


class RowStream:
    """Lines of a running pipeline, a piece at a time; the last line is the end.

    Whoever leaves sets the budget's `left`: the piece being made ends soon, and closes the rows.
    """

    def __init__(self, service: Service, pipeline: Pipeline, budget: Budget) -> None:
        self.service, self.pipeline, self.budget = service, pipeline, budget
        self.rows: Iterator[Any] | None = iter(service.build(pipeline, budget))
        self.count = 0
        self.failure: web.Problem | None = None
        self._lock = threading.Lock()  # a piece may still be in the making when the client leaves

    def piece(self) -> tuple[str, bool]:
        """The next lines, and whether there are more."""
        with self._lock:
            if self.budget.left.is_set():
                self.close()
                return "", False
            made = self._make()
            if self.budget.left.is_set():
                self.close()
            return made

    def _make(self) -> tuple[str, bool]:
        lines: list[str] = []
        size, started = 0, time.monotonic()
        try:
            for row in self.rows or iter(()):
                lines.append(encode(row))
                size += len(lines[-1]) + 1
                self.count += 1
                if size >= CHUNK_BYTES or time.monotonic() - started > CHUNK_SECONDS:
                    return "".join(f"{line}\n" for line in lines), True
            lines.append(encode({"end": True, "count": self.count}))
        except Exception as error:  # noqa: BLE001
            # The boundary: the headers are sent, so the error is a line of its own.
            self.failure = problem_of(error, self.pipeline, self.budget)
            lines.append(encode({"error": {"status": self.failure.status_code,
                                           "detail": str(self.failure.detail)}}))  # fmt: skip
        self.close()
        return "".join(f"{line}\n" for line in lines), False

    def close(self) -> None:
        """Close the rows, and with them the cursor of the database."""
        rows, self.rows = self.rows, None
        if rows is not None:
            rows.close()  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Nobody reads any more; if a piece is being made, it closes the rows itself."""
        self.budget.left.set()
        if self._lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._lock.release()


class RowsResponse(StreamingResponse):
    """Sends a stream whose first piece is there, and ends it in every case."""

    def __init__(self, stream: RowStream, first: str, *, more: bool) -> None:
        super().__init__(self._lines(first, more), media_type="application/x-ndjson")
        self.stream = stream
        self._finished = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Here and not in the generator, which may never be started."""
        service, budget = self.stream.service, self.stream.budget
        try:
            async with watched(service, budget):
                await super().__call__(scope, receive, send)
        finally:
            self.stream.leave()
            service.rows += self.stream.count
            failed = self.stream.failure is not None
            service.give_back("failed" if failed else "finished" if self._finished else "left")

    async def _lines(self, text: str, more: bool) -> AsyncIterator[str]:
        yield text
        while more:
            text, more = await next_piece(self.stream)
            yield text
        self._finished = True


async def next_piece(stream: RowStream) -> tuple[str, bool]:
    """Make it in a thread; whoever does not wait for it leaves the stream."""
    try:
        return await stream.service.in_budget(stream.piece, stream.budget)
    except BaseException:
        stream.leave()
        raise
