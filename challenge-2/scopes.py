"""What `with` and `async with` give: the resources by name, and more of them on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from apis import API, APIConnection
from caches import Cache, CacheConnection
from databases import Database, DatabaseConnection
from failures import ResourceClosed, UnknownResource
from health import CHECK_SECONDS, HealthReport
from outcomes import inherit
from portal import Blocking, CtrlC, Host, Portal
from queues import MessageQueue, QueueConnection
from timelines import Report

if TYPE_CHECKING:
    from utils import Handle, ResourceManager

T = TypeVar("T")


class _Scope:
    """Access by name, and the figures."""

    def __init__(self, manager: ResourceManager) -> None:
        self.manager = manager

    def __getitem__(self, name: str) -> Any:
        return self.manager.value_of(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except UnknownResource as error:
            raise AttributeError(str(error)) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.manager.knows(name)

    def get(self, name: str, kind: type[T]) -> T:
        """The value of a resource, which has to be of this class."""
        value = self[name]
        if not isinstance(value, kind):
            raise TypeError(f"{name!r} is a {type(value).__name__}, not a {kind.__name__}.")
        return value

    def get_metrics(self) -> dict[str, Any]:
        """Counts and timings so far."""
        return self.manager.get_metrics()

    @property
    def report(self) -> Report:
        """The timings so far."""
        return self.manager.report

    @property
    def run_id(self) -> str:
        """The id of this run in the connection log."""
        return self.manager.run_id

    def lost(self, name: str, error: BaseException) -> None:
        """Report that a resource has died."""
        self.manager.lost(name, error)


class AsyncScope(_Scope):
    """What `async with` gives: the resources by name, and more of them on demand."""

    async def acquire(
        self,
        resource: Any,
        name: str | None = None,
        needs: Iterable[str | Handle[Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Acquire one more; it is released with the others, before what it needs."""
        return await self.manager.acquire(resource, name, needs, **options)

    async def acquire_database(
        self, url: str | None = None, *, host: str | None = None, name: str = "database",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Database:  # fmt: skip
        """A database: the URL's, else the host's, else the environment's, else embedded SQLite."""
        resource = DatabaseConnection(url, host=host, fallback=fallback, **options)
        database: Database = await self.acquire(resource, name)
        return database

    async def acquire_redis(
        self, url: str | None = None, *, host: str | None = None, name: str = "redis",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Cache:  # fmt: skip
        """Redis: the URL's, else the host's, else the environment's, else an embedded cache."""
        resource = CacheConnection(url, host=host, fallback=fallback, **options)
        cache: Cache = await self.acquire(resource, name)
        return cache

    async def acquire_cache(
        self, url: str | None = None, *, host: str | None = None, name: str = "cache",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Cache:  # fmt: skip
        """A cache, chosen like `acquire_redis`."""
        return await self.acquire_redis(url, host=host, name=name, fallback=fallback, **options)

    async def acquire_rabbitmq(
        self, url: str | None = None, *, host: str | None = None, name: str = "rabbitmq",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> MessageQueue:  # fmt: skip
        """RabbitMQ: the URL's, else the host's, else the environment's, else an embedded queue."""
        resource = QueueConnection(url, host=host, fallback=fallback, **options)
        queue: MessageQueue = await self.acquire(resource, name)
        return queue

    async def acquire_api(
        self, base_url: str | None = None, *, name: str = "api", **options: Any
    ) -> API:
        """An HTTP API; without a URL the embedded echo."""
        api: API = await self.acquire(APIConnection(base_url, **options), name)
        return api

    async def nest(self, manager: ResourceManager) -> AsyncScope:
        """Enter another manager inside; its scope closes before the resources of this one."""
        return await self.manager.nest(manager)

    async def health(self, timeout: float = CHECK_SECONDS) -> HealthReport:
        """Ask every resource whether it works."""
        return await self.manager.health(timeout)

    async def aclose(self) -> None:
        """Stop now; repeated and concurrent calls wait for the same end."""
        await self.manager.aclose()


class SyncScope(_Scope):
    """What a plain `with` gives: the same without await."""

    def __init__(
        self, manager: ResourceManager, portal: Portal, host: Host, *, own_portal: bool
    ) -> None:
        super().__init__(manager)
        self.portal = portal
        self.host = host
        self._own_portal = own_portal
        self._stopped = False

    def __getitem__(self, name: str) -> Any:
        return self._shown(super().__getitem__(name))

    def _shown(self, value: Any) -> Any:
        return Blocking(value, self.portal) if hasattr(type(value), "blocking") else value

    def acquire(
        self,
        resource: Any,
        name: str | None = None,
        needs: Iterable[str | Handle[Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Acquire one more; it is released with the others, before what it needs."""
        if self._stopped:
            raise ResourceClosed("The manager is not in use: acquire inside its `with` block.")
        manager = self.manager
        return self._shown(
            self.portal.drive(self.host, lambda: manager.acquire(resource, name, needs, **options))
        )

    def acquire_database(
        self, url: str | None = None, *, host: str | None = None, name: str = "database",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """A database: the URL's, else the host's, else the environment's, else embedded SQLite."""
        return self.acquire(DatabaseConnection(url, host=host, fallback=fallback, **options), name)

    def acquire_redis(
        self, url: str | None = None, *, host: str | None = None, name: str = "redis",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Redis: the URL's, else the host's, else the environment's, else an embedded cache."""
        return self.acquire(CacheConnection(url, host=host, fallback=fallback, **options), name)

    def acquire_cache(
        self, url: str | None = None, *, host: str | None = None, name: str = "cache",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """A cache, chosen like `acquire_redis`."""
        return self.acquire_redis(url, host=host, name=name, fallback=fallback, **options)

    def acquire_rabbitmq(
        self, url: str | None = None, *, host: str | None = None, name: str = "rabbitmq",
        fallback: Literal["embedded"] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """RabbitMQ: the URL's, else the host's, else the environment's, else an embedded queue."""
        return self.acquire(QueueConnection(url, host=host, fallback=fallback, **options), name)

    def acquire_api(self, base_url: str | None = None, *, name: str = "api", **options: Any) -> Any:
        """An HTTP API; without a URL the embedded echo."""
        return self.acquire(APIConnection(base_url, **options), name)

    @contextmanager
    def nest(self, manager: ResourceManager) -> Iterator[SyncScope]:
        """Enter another manager inside: `with scope.nest(manager) as inner`."""
        if self._stopped:
            raise ResourceClosed("The manager is not in use: nest inside its `with` block.")
        self.manager.adopt(manager)
        try:
            scope = manager.enter_sync(self.portal)
        except BaseException:
            self.manager.left_by(manager)
            raise
        try:
            yield scope
        except BaseException as error:
            if not manager.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            manager.__exit__(None, None, None)

    def health(self, timeout: float = CHECK_SECONDS) -> HealthReport:
        """Ask every resource whether it works."""
        report: HealthReport = self.portal.call(self.manager.health(timeout))
        return report

    def close(self) -> None:
        """Stop now; idempotent."""
        self.manager.close()

    def stop(self, error: BaseException | None) -> BaseException | None:
        """Stop because of this error, or for no reason; return what has to surface."""
        if self._stopped or not self.portal.alive:  # closed by a parent, or not of this process
            return error
        with CtrlC() as ctrl_c:  # nothing here is skipped because of it
            self._stopped = True
            try:
                surfaced: BaseException | None = self.portal.drive(
                    self.host, lambda: self.manager.close_with(error)
                )
            finally:
                self.host.end()
                if self._own_portal:
                    self.portal.close()
        if not ctrl_c.pressed or isinstance(surfaced, KeyboardInterrupt):
            return surfaced
        pressed = KeyboardInterrupt()
        if surfaced is not None:
            inherit(pressed, surfaced)
        return pressed
