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
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from measures import MEASURES, Measures
from openings import Deps, Resource, Retry, RetryingOpening, inferred_needs, is_sync, opening_of
from portal import Portal
from queues import Message, MessageQueue, QueueConnection
from scopes import CHECK_SECONDS, AsyncScope, SyncScope
from threads import loop_is_running
from timelines import Report, Timing, critical_path, timing_of

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
NAME = re.compile(r"[^\x00-\x1f]{1,128}")


@dataclass(frozen=True)
class Health:
    """Whether one resource works: `healthy`, `degraded` (a stand-in serves) or `down`."""

    status: str
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class HealthReport:
    """The worst of all resources, and each of them."""

    status: str
    resources: dict[str, Health]


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
        self.run_id = ""
        self._options = (acquire_timeout, release_timeout, release_grace)
        self._events = events
        self._measures = (measures or MEASURES) if enable_metrics else None
        self._clock = clock
        self._owners: list[Owner] = []
        self._by_name: dict[str, Owner] = {}
        self._declared: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._need_names: dict[str, tuple[str, ...]] = {}
        self._awaited: dict[str, list[Owner]] = {}
        self._in_order = True  # needs were always declared before those that need them
        self._run: Run | None = None
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
        name = self._free_name(resource, name)
        owner = self._owner(name, resource, options)
        names = self._needs_of(resource, needs)
        self._link(owner, names)
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

    def _free_name(self, resource: Any, name: str | None) -> str:
        if name is not None:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError("A resource name is a string of 1 to 128 printable characters.")
            if name in self._by_name:
                raise ValueError(f"A resource named {name!r} exists already: choose another name.")
            return name
        given = getattr(resource, "name", None)
        if not isinstance(given, str) or not NAME.fullmatch(given):
            given = getattr(resource, "__name__", None) or type(resource).__name__.lstrip("_")
            given = "resource" if given == "<lambda>" else given
        candidate, number = given, 2
        while candidate in self._by_name:
            number = max(number, len(self._by_name))
            candidate, number = f"{given}-{number}", number + 1
        return candidate

    def _needs_of(self, resource: Any, needs: Any) -> tuple[str, ...]:
        if isinstance(needs, str):
            needs = (needs,)
        if needs:
            return tuple(need.name if isinstance(need, Handle) else need for need in needs)
        if isinstance(resource, Resource):
            return tuple(resource.needs)
        if callable(resource) and not is_sync(resource) and not hasattr(resource, "__aenter__"):
            return inferred_needs(resource)
        return ()

    def _link(self, owner: Owner, names: tuple[str, ...]) -> None:
        """Join the graph; refuse what closes a circle."""
        waiting = self._awaited.get(owner.name, ())
        if owner.name in names or (waiting and names):
            self._refuse_cycle(owner.name, names)
        self._by_name[owner.name] = owner
        self._need_names[owner.name] = names
        for name in names:
            need = self._by_name.get(name)
            if need is None:
                self._awaited.setdefault(name, []).append(owner)
                self._in_order = False
            else:
                owner.needs.append(need)
                need.dependents.append(owner)
        if waiting:
            del self._awaited[owner.name]
            for dependent in waiting:
                dependent.needs.append(owner)
                owner.dependents.append(dependent)

    def _refuse_cycle(self, start: str, names: tuple[str, ...]) -> None:
        came_from: dict[str, str] = dict.fromkeys(reversed(names), start)
        stack = list(names)
        while stack:
            name = stack.pop()
            if name == start:
                path = [start]
                step = came_from[start]
                while step != start:
                    path.append(step)
                    step = came_from[step]
                cycle = [start, *reversed(path[1:]), start]
                raise DependencyCycle(
                    "Resources need each other in a circle: " + " -> ".join(cycle), cycle=cycle
                )
            for need in self._need_names.get(name, ()):
                if need not in came_from:
                    came_from[need] = name
                    stack.append(need)

    def _deps(self, name: str) -> Deps:
        return Deps({need: self.value_of(need) for need in self._need_names[name]})

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
        if self._awaited:
            self._refuse_unknown()
        owners = self._owners
        if self.sequential and not self._in_order:
            owners[:] = topological(owners)
        self.run_id = uuid.uuid4().hex[:16]
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
        except BaseException as error:
            self._finish(run)
            if isinstance(error, (AcquireError, AcquireErrorGroup)):
                report = self.report
                error.report = report
                if isinstance(error, AcquireErrorGroup):
                    for each in error.exceptions:
                        if isinstance(each, AcquireError):
                            each.report = report
            raise

    def _refuse_unknown(self) -> None:
        missing = {
            name: [owner.name for owner in owners]
            for name, owners in self._awaited.items()
            if self._parent is None or not self._parent.knows(name)
        }
        if missing:
            name, users = next(iter(missing.items()))
            raise UnknownResource(
                f"{users[0]!r} needs {name!r}, which is not declared. Declared are: "
                + (", ".join(self._by_name) or "none")
            )

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
        if self._closing is not None:  # somebody stops it already, or has
            while not self._closing.done():
                await asyncio.shield(self._closing)
            return error
        if run.caller.stack and asyncio.current_task() is not run.caller.task:
            raise RuntimeError("A resource of this manager has affinity='caller': only the task "
                               "that entered it can close it.")  # fmt: skip
        self._closing = closing = loop.create_future()
        try:
            for child in reversed(self._children.copy()):
                error = await child.close_with(error)
            return await run.stop(error)
        finally:
            self._finish(run)
            closing.set_result(None)

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
        except BaseException:
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
        return name in self._by_name or (self._parent is not None and self._parent.knows(name))

    def value_of(self, name: str) -> Any:
        """The value of a resource that is in use."""
        owner = self._by_name.get(name)
        if owner is None:
            if self._parent is not None and self._parent.knows(name):
                return self._parent.value_of(name)
            raise UnknownResource(
                f"There is no resource {name!r}; there are: {', '.join(self._by_name) or 'none'}"
            )
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
        owner = self._declare(resource, name, needs, **options)
        try:
            for need in self._need_names[owner.name]:
                self.value_of(need)
            return await run.acquire_late(owner)
        except AcquireError as error:
            error.report = self.report
            raise
        finally:
            if owner.state is not READY:
                self._forget(owner)

    def _forget(self, owner: Owner) -> None:
        """A late one that failed is no part of the graph; its name can be used again."""
        if self._by_name.get(owner.name) is owner and owner.optional is False:
            for need in owner.needs:
                need.dependents.remove(owner)
            del self._by_name[owner.name]
            self._awaited.clear()

    def _in_use(self) -> Run:
        run = self._run
        if run is None or not run.started_at or run.stopping or self._closing is not None:
            raise ResourceClosed("The manager is not in use: acquire inside its `with` block.")
        return run

    def lost(self, name: str, error: BaseException) -> None:
        """Report from outside that a resource has died; from the thread of its loop."""
        owner = self._by_name.get(name)
        if owner is not None and self._run is not None:
            self._run.lose(owner, error)

    async def nest(self, manager: ResourceManager) -> AsyncScope:
        """Enter another manager inside this one; it closes before the resources of this one."""
        self._in_use()
        self.adopt(manager)
        try:
            return await manager.__aenter__()
        except BaseException:
            self._children.remove(manager) if manager in self._children else None
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
        run = self._run
        if run is None:
            declared = {o.name: timing_of(o, 0.0, 0.0) for o in self._owners}
            return Report(run_id="", name=self.name, resources=declared)
        now = self._clock()
        timings = {owner.name: timing_of(owner, run.began_at, now) for owner in run.owners}
        start = (run.started_at or now) - run.began_at
        stop = (run.stopped_at or now) - run.stopping_at if run.stopping_at else 0.0
        total = sum((t.acquire_s or 0.0) + (t.release_s or 0.0) for t in timings.values())
        return Report(
            run_id=self.run_id,
            name=self.name,
            resources=timings,
            wall_s=start + stop,
            sum_s=total,
            saved_s=total - start - stop,
            start_s=start,
            stop_s=stop,
            critical_path=critical_path(owner for owner in run.owners if not owner.late),
            abandoned=run.abandoned,
            lost=len(run.outcome.losses),
            suppressed=run.suppressed,
            degraded=tuple(name for name, timing in timings.items() if timing.degraded),
            children=(*self._past_children, *(child.report for child in self._children)),
        )

    def get_metrics(self) -> dict[str, Any]:
        """Counts and timings of this manager and those nested in it, as plain data."""
        report = self.report
        states = [timing.state for timing in report.resources.values()]
        figures: dict[str, Any] = {
            "manager": self.name,
            "run_id": self.run_id,
            "enabled": self.enable_metrics,
            "resources_total": len(states),
            "in_use": states.count("ready"),
            "released": states.count("released"),
            "failed": states.count("failed"),
            "abandoned": report.abandoned,
            "lost": report.lost,
            "nested": [child.get_metrics() for child in self._children],
        }
        if self.enable_metrics:
            full = report.as_dict()
            figures["resources"] = full["resources"]
            for name in ("wall_s", "sum_s", "saved_s", "critical_path"):
                figures[name] = full[name]
        return figures

    async def health(self, timeout: float = CHECK_SECONDS) -> HealthReport:
        """Ask every resource that can be asked, all at once, each within the timeout."""
        owners = [owner for owner in self._by_name.values() if owner.acquiring_at]
        answers = await asyncio.gather(*(self._ask(owner, timeout) for owner in owners))
        found = dict(zip((owner.name for owner in owners), answers, strict=True))
        statuses = {health.status for health in found.values()}
        worst = next((s for s in ("down", "degraded") if s in statuses), "healthy")
        return HealthReport(worst, found)

    async def probe(self, name: str, timeout: float = CHECK_SECONDS) -> Health:
        """Ask one resource."""
        return await self._ask(self._by_name[name], timeout)

    async def _ask(self, owner: Owner, timeout: float) -> Health:
        began = self._clock()
        if owner.state is not READY or owner.loss is not None:
            error = described(owner.error or owner.loss) if owner.error or owner.loss else None  # type: ignore[arg-type]  # fmt: skip
            return Health("degraded" if owner.optional else "down", 0.0, error or owner.status)
        resource = getattr(owner.opening, "resource", None)
        try:
            if resource is not None:
                async with asyncio.timeout(timeout):
                    answer = resource.check(owner.value)
                    if asyncio.iscoroutine(answer):
                        await answer
        except TimeoutError:
            return Health("down", self._clock() - began, f"no answer within {timeout:g} s")
        except Exception as error:  # noqa: BLE001  (whatever it is: the resource does not work)
            return Health("down", self._clock() - began, described(error))
        return Health("degraded" if owner.degraded else "healthy", self._clock() - began)

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
            if not isinstance(resource, Resource) and not callable(resource):
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
