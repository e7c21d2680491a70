"""What the real resources have in common: choosing a server, falling back, wrapping its errors."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from addresses import Address, chosen, embedded_of, scrub
from failures import (
    AcquireError,
    ConnectionBroken,
    MissingDriver,
    OperationError,
    OperationTimeout,
    ResourceClosed,
    ResourceError,
    described,
)
from openings import Deps, Resource

log = logging.getLogger("resources")

T = TypeVar("T")
OPERATION_SECONDS = 8.0  # a server that has not answered an operation by then has failed it
FALLBACK_SECONDS = 3.0  # for a configured server, when something else can serve instead


class Connection:
    """A value that talks to something: its errors are wrapped, and it refuses work once closed."""

    blocking = True  # in a plain `with` its methods are called without await
    degraded = False

    def __init__(self, address: Address, operation_timeout: float) -> None:
        self.address = address
        self.operation_timeout = operation_timeout
        self.closed = False
        self.in_use = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address.shown}>"

    @asynccontextmanager
    async def operation(self, what: str, *, limit: float | None = None) -> AsyncIterator[None]:
        """Around one operation: a deadline, one shape of errors, and a count."""
        if self.closed:
            raise ResourceClosed(f"{self.address.shown} is closed: {what} came too late.")
        seconds = self.operation_timeout if limit is None else limit
        self.in_use += 1
        try:
            async with asyncio.timeout(seconds) as timeout:
                yield
        except TimeoutError as error:
            if isinstance(error, ResourceError):
                raise
            if not timeout.expired():
                raise self.wrapped(what, error) from error
            raise OperationTimeout(
                f"{self.address.shown} did not answer {what} within {seconds:g} s"
            ) from error
        except ResourceError:
            raise
        except Exception as error:
            raise self.wrapped(what, error) from error
        finally:
            self.in_use -= 1

    def wrapped(self, what: str, error: Exception) -> OperationError:
        """The error of a driver as one of ours, without secrets."""
        scrub(error, self.address.secrets)
        kind = ConnectionBroken if self.is_connection_error(error) else OperationError
        return kind(f"{what} failed at {self.address.shown}: {described(error)}")

    def is_connection_error(self, error: Exception) -> bool:
        """Whether the server, and not the question, is the reason."""
        return isinstance(error, OSError)

    async def check(self) -> None:
        """Raise if it does not work."""
        raise NotImplementedError

    async def close(self) -> None:
        """Give it back."""
        raise NotImplementedError

    def stats(self) -> Mapping[str, float]:
        """Figures of its pool."""
        return {"in_use": float(self.in_use)}


class Connector(Resource[Any]):
    """Acquires a connection of one kind; subclasses say how to make it."""

    sync_native = True  # its connections live in a thread or loop of their own
    address_kind = ""

    def __init__(
        self,
        url: str | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
        user: str | None = None,
        password: str | None = None,
        db: str | int | None = None,
        fallback: Literal["embedded"] | None = None,
        operation_timeout: float = OPERATION_SECONDS,
        name: str | None = None,
    ) -> None:
        if fallback not in (None, "embedded"):
            raise ValueError('fallback is "embedded" or None.')
        parts = {"port": port, "user": user, "password": password, "db": db}
        self.address = chosen(self.address_kind, url, host, parts)
        self.fallback = fallback
        self.operation_timeout = operation_timeout
        self.name = name or self.kind

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address.shown}>"

    async def connect(self, address: Address) -> Connection:
        """Make a connection that has been tried."""
        raise NotImplementedError

    async def acquire(self, deps: Deps) -> Connection:
        """Connect, or fall back where that was asked for."""
        del deps
        if self.fallback is None or self.address.embedded:
            return await self._connected(self.address)
        try:
            async with asyncio.timeout(FALLBACK_SECONDS):
                return await self._connected(self.address)
        except (AcquireError, TimeoutError) as error:
            log.warning("%s is down, an embedded one serves: %s", self.address.shown, error)
            connection = await self._connected(embedded_of(self.address_kind))
            connection.degraded = True
            return connection

    async def _connected(self, address: Address) -> Connection:
        try:
            return await self.connect(address)
        except AcquireError:
            raise
        except ResourceError as error:
            raise AcquireError(f"{address.shown} cannot be used: {error}") from error
        except Exception as error:
            scrub(error, address.secrets)
            raise AcquireError(f"{address.shown} cannot be used: {described(error)}") from error

    async def release(self, value: Connection, exc: BaseException | None) -> None:
        """Close it."""
        del exc
        await value.close()

    async def check(self, value: Connection) -> None:
        """Ask it."""
        await value.check()

    def stats(self, value: Connection) -> Mapping[str, float]:
        """The figures of its pool."""
        return value.stats()

    def redact(self) -> dict[str, Any]:
        """The address without its secrets."""
        return {"address": self.address.shown, "fallback": self.fallback}


def driver(module: str, package: str) -> Any:
    """Import a client; MissingDriver says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDriver(
            f"This needs the package {package}: pip install -r requirements-services.txt"
        ) from error


async def ended_within(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of work that may ignore its cancellation: after the deadline it is left alone."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)
        raise
    if not task.done():
        task.cancel()
        task.add_done_callback(_look_away)
        raise TimeoutError(f"no answer within {seconds:g} s")
    return task.result()


def _look_away(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
