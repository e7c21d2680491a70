"""The front door: `ResourceManager`, and the scopes it gives to `async with` and `with`.

    manager = ResourceManager(name="shop")
    manager.add(DatabaseConnection(), name="db")
    manager.add(lambda db: Repository(db), name="repository", needs=("db",))
    async with manager as scope:
        await scope.repository.load()

Everything starts in parallel along its needs, and stops in reverse. `engine.py` has the machine.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from apis import API, APIConnection
from caches import Cache, CacheConnection
from databases import Database, DatabaseConnection, PipelineDatabase, Row
from engine import ABANDONED, FAILED, READY, Owner, Run, State, topological
from failures import (
    AcquireError,
    AcquireErrorGroup,
    AcquireTimeout,
    ConnectionBroken,
    DependencyCycle,
    MissingDriver,
    OperationError,
    OperationTimeout,
    QueryTooLong,
    ReleaseError,
    ReleaseErrorGroup,
    ReleaseTimeout,
    ResourceClosed,
    ResourceError,
    ResourceLost,
    UnknownResource,
    described,
)
from graph import Graph, needs_of
from health import CHECK_SECONDS, Health, HealthReport, ask, health_of
from measures import MEASURES, Measures
from openings import ENTERED_ONCE, Deps, Resource, Retry, RetryingOpening, is_sync, opening_of
from portal import Portal
from queues import Message, MessageQueue, QueueConnection
from scopes import AsyncScope, SyncScope
from threads import loop_is_running
from timelines import Report, Timing, figures_of, report_of

if TYPE_CHECKING:
    from journal import EventLog

__all__ = [
    "API", "APIConnection", "AcquireError", "AcquireErrorGroup", "AcquireTimeout", "AsyncScope",
    "Cache", "CacheConnection", "ConnectionBroken", "Database", "DatabaseConnection",
    "DependencyCycle", "Deps", "Handle", "HealthReport", "Message", "MessageQueue", "MissingDriver",
    "OperationError", "OperationTimeout", "QueryTooLong", "QueueConnection", "ReleaseError",
    "ReleaseErrorGroup", "ReleaseTimeout", "Report", "Resource", "ResourceClosed", "ResourceError",
    "ResourceLost", "ResourceManager", "Retry", "Row", "State", "SyncScope", "Timing",
    "UnknownResource",
]  # fmt: skip

T = TypeVar("T")


class Handle(Generic[T]):
    """A declared resource; `value` is there while it is in use."""

    def __init__(self, manager: ResourceManager, name: str) -> None:
        self._manager = manager
        self.name = name

    @property
    def value(self) -> T:
        """What was acquired; ResourceClosed before it is ready and after its end."""
        found: T = self._manager.value_of(self.name)
        return found

    def __repr__(self) -> str:
        return f"<Handle {self.name!r}>"


class ResourceManager:
    """Acquires resources in parallel along their needs, and releases them in reverse.

    `acquire_timeout` bounds the whole start, `release_timeout` each release; a release that goes on
    for `release_grace` after it was cancelled is abandoned. With `on_lost="mark"` a resource that
    dies only refuses access, instead of cancelling the body. `sequential` enters one after the
    other in the caller's own task, like an exit stack. A manager is used once.
    """

    def __init__(
        self,
        *resources: Any,
        name: str = "app",
        enable_metrics: bool = True,
        sequential: bool = False,
        acquire_timeout: float = 10.0,
        release_timeout: float = 10.0,
        release_grace: float = 1.0,
        on_lost: Literal["cancel", "mark"] = "cancel",
        events: EventLog | None = None,
        measures: Measures | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if on_lost not in ("cancel", "mark"):
            raise ValueError(f'on_lost is "cancel" or "mark", not {on_lost!r}.')
        for label, seconds in (
            ("acquire_timeout", acquire_timeout), ("release_timeout", release_timeout),
            ("release_grace", release_grace),
        ):  # fmt: skip
            if not seconds >= 0:
                raise ValueError(f"{label} is {seconds!r}: seconds are zero or more.")
        self.name = name
        self.enable_metrics = enable_metrics
        self.sequential = sequential
        self.on_lost = on_lost
        self._options = (acquire_timeout, release_timeout, release_grace)
        self._events = events
        self._measures = (measures or MEASURES) if enable_metrics else None
        self._clock = clock
        self._owners: list[Owner] = []
        self._graph = Graph()
        self._declared: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._run: Run | None = None
        self._run_id = ""
        self._entered = False
        self._scope: AsyncScope | SyncScope | None = None
        self._parent: ResourceManager | None = None
        self._children: list[ResourceManager] = []
        self._past_children: list[Report] = []
        self._closing: asyncio.Future[None] | None = None
        self._portal: Portal | None = None
        self._serving: AsyncScope | None = None
        for resource in resources:
            self.add(resource)

    # --- declaring ---

    def add(
        self,
        resource: Any,
        name: str | None = None,
        needs: Iterable[str | Handle[Any]] | None = None,
        *,
        optional: bool = False,
        affinity: Literal["owner", "caller"] = "owner",
        retry: int | Retry | None = None,
        wait: float | None = None,
        acquire_timeout: float | None = None,
        release_timeout: float | None = None,
    ) -> Handle[Any]:
        """Declare a resource: a Resource, a context manager, an async generator, or a factory.

        `needs` are names, of resources declared earlier or later; a factory's parameters count as
        needs when none are given. `optional` lets the start succeed without it (its value is then
        None). `affinity="caller"` enters it in the task of the body. `retry` is a number of
        attempts, `wait` the seconds for which a server may take its time to come up.
        """
        if self._run is not None:
            raise RuntimeError("The manager has been entered: use its scope's `acquire`.")
        owner = self._declare(
            resource, name, needs, optional=optional, affinity=affinity, retry=retry, wait=wait,
            acquire_timeout=acquire_timeout, release_timeout=release_timeout,
        )  # fmt: skip
        self._owners.append(owner)
        return Handle(self, owner.name)

    def _declare(
        self,
        resource: Any,
        name: str | None,
        needs: Iterable[str | Handle[Any]] | None,
        **options: Any,
    ) -> Owner:
        affinity = options.get("affinity", "owner")
        if affinity not in ("owner", "caller"):
            raise ValueError(f'affinity is "owner" or "caller", not {affinity!r}.')
        if resource is self:
            raise ValueError("A manager cannot be its own resource.")
        name = self._graph.free_name(resource, name)
        owner = self._owner(name, resource, options)
        names = needs_of(resource, needs)
        self._graph.link(owner, names)
        self._declared[name] = (resource, {**options, "needs": names})
        return owner

    def _owner(self, name: str, resource: Any, options: dict[str, Any]) -> Owner:
        here = options.get("affinity") == "caller"
        opening: Any = opening_of(
            resource, lambda: self._deps(name), here=here or self.sequential, desk=self._portal
        )
        limit, wait = options.get("acquire_timeout"), options.get("wait")
        if wait is not None and limit is None:
            limit = max(self._options[0], float(wait))
        owner = Owner(
            name, opening, kind=getattr(resource, "kind", "resource"),
            optional=options.get("optional", False), here=here,
            acquire_timeout=limit, release_timeout=options.get("release_timeout"),
        )  # fmt: skip
        retry = options.get("retry")
        if retry is not None or wait is not None:
            if isinstance(resource, ENTERED_ONCE):
                raise ValueError(
                    f"Resource {name!r} can be entered only once, so that it cannot be tried again:"
                    " give the function that makes it."
                )
            policy = retry if isinstance(retry, Retry) else Retry(retry or 1, wait=wait or 0.0)

            def count(attempt: int) -> None:
                owner.attempts = attempt

            owner.opening = opening = RetryingOpening(opening, policy, count)
            owner.enter, owner.leave = opening.enter, opening.leave
        if isinstance(resource, Resource):
            resource._lose = lambda error: self.lost(name, error)
        if self._measures is not None:
            owner.series = self._measures.series(
                getattr(resource, "series_name", None) or name, owner.kind
            )
        return owner

    def _deps(self, name: str) -> Deps:
        return Deps({need: self.value_of(need) for need in self._graph.needs[name]})

    @classmethod
    def for_pipeline(
        cls,
        db_path: str | Path = "data.db",
        queue_maxsize: int = 1000,
        setup_schema: bool = True,
        queues: Iterable[str] = ("ingest_q",),
        **options: Any,
    ) -> ResourceManager:
        """A manager with `db`, an SQLite database, and `queues`, named asyncio queues.

        In a plain `with`, `db` is an ordinary sqlite3 connection of the caller's thread;
        `setup_schema` creates its table `aggregates`.
        """
        names = tuple(queues)
        manager = cls(name="pipeline", **options)
        manager.add(PipelineDatabase(Path(db_path), setup_schema=setup_schema), name="db")
        manager.add(lambda: {name: asyncio.Queue(queue_maxsize) for name in names}, name="queues")
        return manager

    # --- entering and leaving ---

    async def __aenter__(self) -> AsyncScope:
        self._scope = scope = AsyncScope(self)
        await self._open()
        return scope

    async def _open(self, *, interrupts: bool = True) -> None:
        if self._run is not None:
            raise RuntimeError("A manager is used once: make a new one.")
        parent = self._parent
        if parent is not None:
            parent._in_use()
        self._graph.refuse_unknown(lambda name: parent is not None and parent.knows(name))
        owners = self._owners
        if self.sequential and not self._graph.in_order:
            owners[:] = topological(owners)
        acquire, release, grace = self._options
        events = self._events
        self._run = run = Run(
            owners, sequential=self.sequential, acquire_timeout=acquire, release_timeout=release,
            release_grace=grace, cancel_when_lost=self.on_lost == "cancel", interrupts=interrupts,
            clock=self._clock,
        )  # fmt: skip
        if events is not None:
            run.observe = events.observer(self.run_id, self.name, run)
        if self._measures is not None:
            self._measures.began(run)
        try:
            await run.start()
            self._entered = True
        except BaseException as error:
            self._finish(run)
            self._closing = self._closing or run.loop.create_future()
            self._closing.set_result(None)
            if isinstance(error, (AcquireError, AcquireErrorGroup)):
                report = self.report
                error.report = report
                if isinstance(error, AcquireErrorGroup):
                    for each in error.exceptions:
                        if isinstance(each, AcquireError):
                            each.report = report
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        surfaced = await self.close_with(error)
        if surfaced is None:
            return error is not None
        if surfaced is error:
            return False
        try:
            raise surfaced
        finally:
            del surfaced, error  # or the frame would keep the exception in a circle

    async def close_with(self, error: BaseException | None) -> BaseException | None:
        """Stop because of this error, or for no reason; return what has to surface."""
        run = self._run
        if run is None:
            return error
        loop = asyncio.get_running_loop()
        if loop is not run.loop:
            raise RuntimeError("The manager was entered in another event loop: leave it there.")
        if self._closing is None:
            self._refuse_other_task()
        return await self._close(run, error)

    async def _close(self, run: Run, error: BaseException | None) -> BaseException | None:
        if self._closing is not None:  # somebody stops it already, or has
            while not self._closing.done():
                await asyncio.shield(self._closing)
            await run.caller.leave_orphans(error)
            return error
        self._closing = closing = run.loop.create_future()
        if not self._entered:  # the task that enters it gives up, and releases what was ready
            run.withdraw()
            await asyncio.shield(closing)
            return error
        try:
            for child in reversed(self._children.copy()):
                error = await _closed_with(child, error)
            return await run.stop(error)
        finally:
            self._finish(run)
            closing.set_result(None)

    def _refuse_other_task(self) -> None:
        """What lives in the task that entered can be left by no other."""
        run = self._run
        if run is None or not self._entered or run.caller.is_current:
            return
        if run.caller.stack:
            raise RuntimeError(
                f"A resource of manager {self.name!r} has affinity='caller': only the task that "
                "entered it can close it."
            )
        for child in self._children:
            child._refuse_other_task()

    def _finish(self, run: Run) -> None:
        if self._measures is not None:
            self._measures.ended(run)
        if self._events is not None:
            self._events.ended(self.run_id, self.name, run)
        if self._parent is not None:
            self._parent.left_by(self)

    async def aclose(self) -> None:
        """Stop now; repeated and concurrent calls wait for the same end."""
        surfaced = await self.close_with(None)
        if surfaced is not None:
            raise surfaced

    def __enter__(self) -> SyncScope:
        return self.enter_sync(None)

    def enter_sync(self, portal: Portal | None) -> SyncScope:
        """Enter in a plain `with`; a nested manager shares the private loop of its parent."""
        if self._run is not None:
            raise RuntimeError("A manager is used once: make a new one.")
        own = portal is None
        self._portal = portal = portal or Portal(outer_loop=loop_is_running())
        scope: SyncScope | None = None
        try:
            self._rebind()
            self._scope = scope = SyncScope(self, portal, portal.host(), own_portal=own)
            portal.drive(scope.host, lambda: self._open(interrupts=False))
        except BaseException as error:
            if scope is not None and self._entered:  # Ctrl-C in the moment in which all was ready
                scope.stop(error)
                raise
            if scope is not None:
                scope.host.end()
            if own:
                portal.close()
            raise
        return scope

    def _rebind(self) -> None:
        """Blocking resources are entered in the caller's thread now, async ones in the loop."""
        for owner in self._owners:
            resource, options = self._declared[owner.name]
            if options.get("affinity") == "caller" and not is_sync(resource):
                raise RuntimeError(
                    f"Resource {owner.name!r} has affinity='caller' and is async: it needs "
                    "`async with`."
                )
            fresh = self._owner(owner.name, resource, {**options, "affinity": "owner"})
            owner.opening, owner.enter, owner.leave = fresh.opening, fresh.enter, fresh.leave
            owner.here = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        scope = cast("SyncScope", self._scope)
        surfaced = scope.stop(error)
        if surfaced is None:
            return error is not None
        if surfaced is error:
            return False
        try:
            raise surfaced
        finally:
            del surfaced, error

    def close(self) -> None:
        """Stop a manager of a plain `with` now; idempotent."""
        if isinstance(self._scope, SyncScope):
            surfaced = self._scope.stop(None)
            if surfaced is not None:
                raise surfaced

    # --- in use ---

    def knows(self, name: str) -> bool:
        """Whether there is a resource of this name, here or around."""
        return name in self._graph.by_name or (
            self._parent is not None and self._parent.knows(name)
        )

    def value_of(self, name: str) -> Any:
        """The value of a resource that is in use."""
        owner = self._graph.by_name.get(name)
        if owner is None:
            if self._parent is not None and self._parent.knows(name):
                return self._parent.value_of(name)
            known = ", ".join(self._graph.by_name) or "none"
            raise UnknownResource(f"There is no resource {name!r}; there are: {known}")
        if owner.loss is not None:
            raise ResourceLost(
                f"Resource {name!r} was lost: {described(owner.loss)}", resource=name
            ) from owner.loss
        if owner.state is READY:
            return owner.value
        if owner.optional and owner.state in (FAILED, ABANDONED):
            return None
        when = "not ready yet" if owner.state.value in ("declared", "acquiring") else "closed"
        raise ResourceClosed(f"Resource {name!r} is {when}.", resource=name)

    async def acquire(self, resource: Any, name: str | None, needs: Any, **options: Any) -> Any:
        """Declare one more and wait until it is ready; the scopes call this."""
        run = self._in_use()
        here = self.sequential or options.get("affinity") == "caller"
        if here and not run.caller.is_current:
            raise RuntimeError(
                "With affinity='caller', or in a sequential manager, only the task that entered "
                "it can acquire."
            )
        owner = self._declare(resource, name, needs, **options)
        try:
            for need in self._graph.needs[owner.name]:
                self.value_of(need)
            return await run.acquire_late(owner)
        except AcquireError as error:
            error.report = self.report
            raise
        finally:
            if owner.state is not READY:
                self._graph.forget(owner)

    def _in_use(self) -> Run:
        run = self._run
        if run is None or not run.started_at or run.stopping or self._closing is not None:
            raise ResourceClosed("The manager is not in use: acquire inside its `with` block.")
        return run

    def lost(self, name: str, error: BaseException) -> None:
        """Report from outside that a resource has died; from the thread of its loop."""
        owner = self._graph.by_name.get(name)
        if owner is not None and self._run is not None:
            self._run.lose(owner, error)

    async def nest(self, manager: ResourceManager) -> AsyncScope:
        """Enter another manager inside this one; it closes before the resources of this one."""
        run = self._in_use()
        here = manager.sequential or any(owner.here for owner in manager._graph.by_name.values())
        if here and not run.caller.is_current:
            raise RuntimeError(
                f"A resource of manager {manager.name!r} has affinity='caller', or all have: only "
                "the task that entered the outer manager can nest it."
            )
        self.adopt(manager)
        try:
            return await manager.__aenter__()
        except BaseException:
            if manager in self._children:
                self._children.remove(manager)
            raise

    def adopt(self, manager: ResourceManager) -> None:
        """Be the parent of a manager that has not been entered."""
        if manager is self or manager._run is not None:
            raise RuntimeError("Only another manager that has not been entered can be nested.")
        manager._parent = self
        self._children.append(manager)

    def left_by(self, child: ResourceManager) -> None:
        """A child has ended; its report is kept, of the last hundred."""
        if child in self._children:
            self._children.remove(child)
            self._past_children.append(child.report)
            del self._past_children[:-100]

    @property
    def report(self) -> Report:
        """The timings so far, or of the whole run once it is over."""
        return report_of(
            self._run, self._owners, name=self.name, run_id=self.run_id, now=self._clock(),
            children=(*self._past_children, *(child.report for child in self._children)),
        )  # fmt: skip

    def get_metrics(self) -> dict[str, Any]:
        """Counts and timings of this manager and those nested in it, as plain data."""
        nested = [child.get_metrics() for child in self._children]
        return figures_of(self.report, full=self.enable_metrics, nested=nested)

    async def health(self, timeout: float = CHECK_SECONDS) -> HealthReport:
        """Ask every resource that can be asked, all at once, each within the timeout."""
        owners = [owner for owner in self._graph.by_name.values() if owner.acquiring_at]
        return await health_of(owners, timeout, self._clock)

    async def probe(self, name: str, timeout: float = CHECK_SECONDS) -> Health:
        """Ask one resource."""
        return await ask(self._graph.by_name[name], timeout, self._clock)

    @property
    def run_id(self) -> str:
        """The id of this run in the connection log; none before it is entered."""
        if not self._run_id and self._run is not None:
            self._run_id = uuid.uuid4().hex[:16]
        return self._run_id

    @property
    def running(self) -> Run | None:
        """The run of an entered manager."""
        return self._run

    # --- FastAPI ---

    @asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[dict[str, Any]]:
        """For `FastAPI(lifespan=manager.lifespan)`: `request.state.resources` is the scope.

        An app may be started again: then the same declarations are entered anew.
        """
        del app
        manager = self if self._run is None else self._copy()
        async with manager as scope:
            self._serving = scope
            try:
                yield {"resources": scope}
            finally:
                self._serving = None

    def _copy(self) -> ResourceManager:
        acquire, release, grace = self._options
        twin = ResourceManager(
            name=self.name, enable_metrics=self.enable_metrics, sequential=self.sequential,
            acquire_timeout=acquire, release_timeout=release, release_grace=grace,
            on_lost=self.on_lost, events=self._events, measures=self._measures, clock=self._clock,
        )  # fmt: skip
        for name, (resource, options) in self._declared.items():
            if isinstance(resource, ENTERED_ONCE) or not (
                isinstance(resource, Resource) or callable(resource)
            ):
                raise RuntimeError(  # noqa: TRY004  (not its type, but its second use is wrong)
                    f"Resource {name!r} is a context manager, which is used once; declare a "
                    "Resource or a factory to start the app again."
                )
            twin.add(resource, name, **options)
        return twin

    async def per_request(self) -> AsyncIterator[AsyncScope]:
        """For `Depends(manager.per_request)`: a scope of its own, closed after the request.

        It sees the resources of the lifespan by name; what it acquires is released with it.
        """
        if self._serving is None:
            raise ResourceClosed("The app has not been started with this manager's lifespan.")
        parent = self._serving.manager
        child = ResourceManager(
            name=f"{self.name}.request", measures=self._measures, events=self._events,
            enable_metrics=self.enable_metrics,
        )  # fmt: skip
        parent.adopt(child)
        async with child as scope:
            yield scope


async def _closed_with(child: ResourceManager, error: BaseException | None) -> BaseException | None:
    """Close a nested manager; a cancellation meanwhile is remembered."""
    while (run := child.running) is not None:
        try:
            return await child._close(run, error)
        except asyncio.CancelledError as cancelled:
            error = cancelled  # it was being closed by another task already
    return error  # it has not been entered yet, and will not be
