"""One run over all sources: what is there is fetched, what is missing is said, a cut run goes on.

    source -> its workers -> Guard (resilience) -> SourceClient -> worker pool (decode, normalise)
                                                                        |
    out/summary.json <- products, errors <- journal (one line per item) +-> pipeline, if asked

An item is one page, or one product. It counts as done once its line is in the journal; `--resume`
reads the journal and goes on with what is not. The summary is written whatever ends the run.
"""

import asyncio
import datetime as dt
import hashlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2
import psutil
import structlog

from fetch_settings import FetchSettings, Source
from fetch_state import SourceState
from journal import Journal, NothingToResume, write_atomically
from limiter import Clock, RateLimiter, Slot
from records import Product, product_event
from resilience import Breaker, CallError, Guard, State, StillDown
from sources import Page, SourceClient, item_url, read_ids, read_page

T = TypeVar("T")

SCHEMA_VERSION: Final = 1
INDEX: Final = "index"
MOST_WORKERS: Final = 200  # of one source


class Door(Protocol):
    """Where products go besides the summary."""

    async def send(self, key: str, events: list[dict[str, Any]]) -> None:
        """Make the events durable, once for this key however often it is called; or CallError."""
        ...

    def statistics(self) -> dict[str, Any]:
        """What became of them."""
        ...


class WorkerPool:
    """So many threads, and a bounded queue before them: `run` waits for its turn."""

    def __init__(self, size: int) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="normalise")
        self._room = asyncio.Semaphore(2 * size)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of `work(*arguments)`, done in a thread."""
        async with self._room:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work, *arguments)

    def close(self) -> None:
        """Take no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class FetchRun:
    """Fetches every source of the settings; `await run()` gives the summary that was written.

    `limiters` is kept by who starts several runs in one process, so that the rate holds across
    them. `door_key` makes what goes through the door unique to this run.
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        resume: bool = False,
        door: Door | None = None,
        limiters: dict[str, RateLimiter] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.settings = settings
        self.id = uuid.uuid4().hex[:12]
        self.ended: str | None = None
        self.summary: dict[str, Any] | None = None
        self.states: dict[str, SourceState] = {}
        self.resumed = resume
        self._door = door
        self._limiters = {} if limiters is None else limiters
        self._transport = transport
        self._clock = clock
        self._cut = asyncio.Event()
        self._cut_by = "stopped"
        self._unsent: list[tuple[str, list[Product]]] = []
        self.started_at = dt.datetime.now(dt.UTC)
        self._started = clock()
        self._ended_at: float | None = None
        self._journal = Journal(settings.output_dir / "fetch.journal")
        self._log = structlog.stdlib.get_logger("fetch").bind(run_id=self.id)

    # --- telling ---

    def cut(self, by: str) -> None:
        """End the run now; what is there is written."""
        self._cut_by = by
        self._cut.set()

    def progress(self) -> list[dict[str, Any]]:
        """One entry per source, now."""
        return [state.progress() for state in self.states.values()]

    @property
    def seconds(self) -> float:
        """From its beginning to its end, or to now."""
        return (self._clock() if self._ended_at is None else self._ended_at) - self._started

    # --- doing ---

    def prepare(self) -> None:
        """Open the journal, and read what is done; raise NothingToResume. `run` does it, too."""
        if not self.states:
            self.states = {source.name: self._state(source) for source in self.settings.sources}
            self._open_journal()

    async def run(self) -> dict[str, Any]:
        """Fetch, write the summary, and return it; raise NothingToResume."""
        self._started = self._clock()
        self.prepare()
        settings = self.settings
        self._log.info("run_started", sources=list(self.states), resumed=self.resumed)
        pool = WorkerPool(settings.worker_pool_size)
        client = SourceClient(
            max_body_bytes=settings.max_body_bytes,
            request_seconds=settings.request_timeout,
            connections=sum(map(self._workers, self.states.values())),
            transport=self._transport,
        )
        ended = "failed"
        try:
            async with client:
                ended = await self._until_cut(self._fetch_all(client, pool))
        except asyncio.CancelledError:
            ended = "stopped"
            raise
        finally:
            pool.close()
            self.summary = self._finish(ended)
        return self.summary

    async def _until_cut(self, work: Awaitable[None]) -> str:
        """Do the work until it is done, the time is over, or `cut` is called; say which."""
        task = asyncio.ensure_future(work)
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            left = self.settings.timeout - self.seconds
            await asyncio.wait({task, cut}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return "finished"
            return self._cut_by if cut.done() else "timeout"
        finally:
            cut.cancel()
            task.cancel()
            await asyncio.wait({task})

    async def _fetch_all(self, client: SourceClient, pool: WorkerPool) -> None:
        for key, products in self._unsent:
            await self._send(key, products)
        async with asyncio.TaskGroup() as group:
            for state in self.states.values():
                group.create_task(self._fetch_source(state, client, pool))

    async def _fetch_source(
        self, state: SourceState, client: SourceClient, pool: WorkerPool
    ) -> None:
        """Every item of one source; whatever goes wrong here leaves the others alone."""
        log = self._log.bind(source=state.source.name)
        try:
            if state.source.paging == "cursor":
                await self._follow_cursor(state, client, pool)
            else:
                await self._fetch_items(state, client, pool)
            state.is_finished = True
            state.expected = len(state.done) + len(state.failed)
        except StillDown as error:
            state.faults[error.kind] += 1
            state.list_error("*", error.kind, str(error))
            log.warning("source_given_up", not_tried=state.not_tried, reason=str(error))
        except CallError as error:
            log.warning("source_ended", kind=error.kind, reason=str(error))
        except OSError as error:  # the journal: nothing can be promised any more
            log.exception("journal_failed", error=str(error))
            raise
        except Exception as error:
            # The boundary between sources: a fault of ours in one of them must not cost the others.
            state.faults["internal"] += 1
            state.list_error("*", "internal", f"{type(error).__name__}.")
            log.exception("source_failed", error=type(error).__name__)
        else:
            log.info("source_done", items=len(state.products), failed=len(state.failed))

    async def _follow_cursor(
        self, state: SourceState, client: SourceClient, pool: WorkerPool
    ) -> None:
        cursor, seen = state.next_cursor, {state.next_cursor}
        if state.done and cursor is None:
            return  # resumed behind the last page
        while True:
            item = cursor or "first"
            params = {state.source.cursor_param: cursor} if cursor else {}
            page = await self._item(state, item, state.source.url, params, client, pool)
            cursor = page.next
            if cursor is None:
                return
            if cursor in seen:
                raise self._note(state, cursor, CallError("loop", "Its cursors go in a circle."))
            seen.add(cursor)

    async def _fetch_items(
        self, state: SourceState, client: SourceClient, pool: WorkerPool
    ) -> None:
        """Items that do not depend on each other, as many at once as the rate has use for."""
        items = self._items(state, client, pool)
        pulling = asyncio.Lock()
        ended: list[CallError] = []

        async def worker() -> None:
            while not ended:
                try:
                    async with pulling:
                        item = await anext(items, None)
                except CallError as error:  # without the index, or the first page, there is no more
                    ended.append(error)
                    return
                if item is None:
                    return
                try:
                    await self._item(state, *item, client, pool)
                except StillDown as error:
                    ended.append(error)
                except CallError:
                    continue  # it is noted; the next item may be better

        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers(state)):
                group.create_task(worker())
        if ended:
            raise ended[0]

    def _workers(self, state: SourceState) -> int:
        """So many that the rate is used even where every answer takes as long as it may."""
        each = math.ceil(1 + self.settings.request_timeout)
        return min(state.guard.limiter.burst * each, MOST_WORKERS)

    async def _items(
        self, state: SourceState, client: SourceClient, pool: WorkerPool
    ) -> AsyncIterator[tuple[str, str, dict[str, str]]]:
        """Name, URL and parameters of every item that is not done."""
        source = state.source
        if source.paging == "single":
            if state.ids is None:
                state.ids = await self._index(state, client, pool)
            state.expected = len(state.ids)
            for item_id in state.ids:
                if item_id not in state.done:
                    yield item_id, item_url(source, item_id), {}
            return
        number = 1
        while True:
            if (item := str(number)) not in state.done:
                before = len(state.products)
                params = {source.page_param: item}
                if state.pages is None:  # only this page tells whether there is another
                    page = await self._item(state, item, source.url, params, client, pool)
                    state.pages = page.pages
                    if page.pages is None and (not page.records or len(state.products) == before):
                        return
                else:
                    yield item, source.url, params
            state.expected = state.pages
            if state.pages is not None and number >= state.pages:
                return
            number += 1

    async def _index(self, state: SourceState, client: SourceClient, pool: WorkerPool) -> list[str]:
        source = state.source

        async def send(slot: Slot) -> list[str]:
            body = await self._get(state, client, slot, source.url, {})
            return await pool.run(read_ids, source, body)

        try:
            ids = await state.guard.call(send)
        except CallError as error:
            raise self._note(state, INDEX, error) from None
        self._journal.add({"source": source.name, "ids": ids})
        return ids

    async def _item(
        self,
        state: SourceState,
        item: str,
        url: str,
        params: dict[str, str],
        client: SourceClient,
        pool: WorkerPool,
    ) -> Page:
        """Fetch one item, keep it, and pass it on; a CallError is noted, then raised."""
        source = state.source
        if len(state.products) >= self.settings.max_products:
            raise self._note(state, item, CallError("too_many", "It has more than max_products."))

        async def send(slot: Slot) -> Page:
            body = await self._get(state, client, slot, url, params)
            return await pool.run(read_page, source, body, dt.datetime.now(dt.UTC))

        try:
            page = await state.guard.call(send)
        except StillDown:
            raise
        except CallError as error:
            raise self._note(state, item, error) from None
        line = {
            "source": source.name,
            "item": item,
            "products": [json.loads(product.model_dump_json()) for product in page.products],
            "faults": page.faults,
            "next": page.next,
            "pages": page.pages,
        }
        self._journal.add(line, sync=self._door is not None)
        fresh = state.keep(line, page.products, self.settings.max_products)
        try:
            await self._send(f"{source.name} {item}", fresh)
        except CallError as error:
            raise self._note(state, item, error) from None
        return page

    async def _get(
        self,
        state: SourceState,
        client: SourceClient,
        slot: Slot,
        url: str,
        params: dict[str, str],
    ) -> bytes:
        state.sending(slot.granted)
        return await client.get(url, params, state.source.headers, slot, state.guard.limiter)

    # --- keeping ---

    def _note(self, state: SourceState, item: str, error: CallError) -> CallError:
        """Remember and tell that an item is missing."""
        state.note(item, error)
        self._log.warning(
            "item_failed", source=state.source.name, item=item, kind=error.kind, reason=str(error)
        )
        return error

    async def _send(self, key: str, products: list[Product]) -> None:
        if self._door is None:
            return
        if products:
            events = [product_event(product, self.id) for product in products]
            await self._door.send(f"{self.id} {key}", events)
        self._journal.add({"sent": key})

    # --- beginning and ending ---

    def _state(self, source: Source) -> SourceState:
        settings = self.settings
        limiter = self._limiters.get(source.name)
        if limiter is None:
            limiter = self._limiters[source.name] = RateLimiter(
                settings.rate_limit_rps, idle_since=_process_start(self._clock), clock=self._clock
            )
        elif limiter.rate != settings.rate_limit_rps:
            limiter.set_rate(settings.rate_limit_rps)
        log = self._log.bind(source=source.name)

        def changed(state: State) -> None:
            log.info("breaker", state=str(state), openings=breaker.openings)

        breaker = Breaker(
            settings.breaker_failures,
            settings.breaker_recovery_seconds,
            patience=settings.breaker_patience,
            clock=self._clock,
            on_change=changed,
        )
        guard = Guard(
            limiter,
            breaker,
            call_seconds=None,  # the client has a deadline for each answer
            longest_pause_seconds=settings.retry_after_max,
            log=log,
        )
        return SourceState(source, guard)

    def _open_journal(self) -> None:
        digest = _digest_of(self.settings.sources)
        if not self.resumed:
            self._journal.begin({"run": self.id, "sources": digest,
                                 "pipeline": self.settings.pipeline})  # fmt: skip
            return
        head, *lines = self._journal.resume()
        if (head["sources"], head["pipeline"]) != (digest, self.settings.pipeline):
            self._journal.close(keep=True)
            raise NothingToResume(
                "The cut run was one over other sources, or into another pipeline; resume it with "
                "the same configuration, or start a new one without --resume."
            )
        self.id = head["run"]
        self._log = self._log.bind(run_id=self.id)
        unsent: dict[str, list[Product]] = {}
        for line in lines:
            if "sent" in line:
                unsent.pop(line["sent"], None)
            elif (state := self.states[line["source"]]) and "ids" in line:
                state.ids = line["ids"]
                state.expected = len(line["ids"])
            else:
                products = [Product(**each) for each in line["products"]]
                fresh = state.keep(line, products, self.settings.max_products)
                unsent[f"{line['source']} {line['item']}"] = fresh
        if self._door is not None:
            self._unsent = list(unsent.items())

    def _finish(self, ended: str) -> dict[str, Any]:
        self.ended = ended
        self._ended_at = self._clock()
        states = self.states.values()
        complete = ended == "finished" and all(state.is_complete for state in states)
        done = sum(len(state.done) for state in states)
        missing = sum(len(state.failed) + state.not_tried for state in states)
        products = [product for state in states for product in state.products.values()]
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.id,
            "ended": ended,
            "partial": not complete,
            "started_at": self.started_at.isoformat(),
            "summary": {
                "total": len(products),
                "duration_seconds": round(self.seconds, 3),
                "success_rate": round(done / (done + missing), 4) if done + missing else 0.0,
                "requests_done": done,
                "requests_missing": missing,
                "resumed": self.resumed,
            },
            "sources": {name: state.report() for name, state in self.states.items()},
            "products": [json.loads(product.model_dump_json()) for product in products],
            "errors": [error for state in states for error in state.errors],
        }
        if self._door is not None:
            summary["pipeline"] = self._door.statistics()
        path = self.settings.output_dir / "summary.json"
        write_atomically(path, json.dumps(summary, indent=1, ensure_ascii=False).encode())
        self._journal.close(keep=not complete)
        self._log.info("run_ended", ended=ended, total=len(products), partial=not complete,
                       seconds=round(self.seconds, 3))  # fmt: skip
        return summary


def _process_start(clock: Clock) -> float:
    """When this process began, on the clock: one before it may have sent requests until then."""
    return clock() - max(0.0, time.time() - psutil.Process().create_time())


def _digest_of(sources: Iterable[Source]) -> str:
    """What makes a cut run the same run: everything but host, port and secrets."""
    parts = []
    for source in sources:
        kept = source.model_dump(exclude={"headers"})
        kept["url"] = urlsplit(source.url).path
        kept["item_url"] = urlsplit(source.item_url or "").path
        parts.append(kept)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
