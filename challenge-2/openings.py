"""What may be given as a resource, and how each kind of it is entered and left.

`opening_of` looks once, when a resource is declared. An async context manager is entered as it is;
everything else gets a small adapter with the same two methods. Blocking context managers run in a
thread of their own, in which they are entered and left.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import (
    _AsyncGeneratorContextManager,
    _GeneratorContextManager,
    asynccontextmanager,
    contextmanager,
)
from types import AsyncGeneratorType, GeneratorType, MethodType, TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

from failures import MissingDriver
from threads import OwnThread

T = TypeVar("T")
NOTHING = (None, None, None)  # what an exit is told when nothing went wrong
ENTERED_ONCE = (  # they are used up by the first attempt
    AsyncGeneratorType, GeneratorType, _AsyncGeneratorContextManager, _GeneratorContextManager,
)  # fmt: skip
WHOLE = frozenset({"deps", "needs", "dependencies", "resources"})  # a parameter that takes them all


class Deps(dict[str, Any]):
    """The values of what a resource needs, as `deps["db"]` or `deps.db`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name!r} is none of its needs: {', '.join(self)}") from None


class Resource(Generic[T]):
    """The base of resources with a life of their own: override `acquire`, mostly `release` too.

    All methods may be plain or async; plain ones must not block. `check` raises when the value
    does not work; `stats` gives figures of a pool. `lost(error)` tells the manager that what was
    acquired has died, from the thread of the loop.
    """

    kind = "resource"
    name: str | None = None
    needs: Sequence[str] = ()
    series_name: str | None = None  # the name it is counted under, if not its own
    sync_native = False  # True: it depends on no event loop of the caller's
    _lose: Callable[[BaseException], None] | None = None

    def acquire(self, deps: Deps) -> Any:
        """Make the value; `deps` has the values of its needs."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is acquired.")

    def release(self, value: T, exc: BaseException | None) -> Any:
        """Give the value back; `exc` is what ended the body."""

    def check(self, value: T) -> Any:
        """Raise if the value does not work."""

    def stats(self, value: T) -> Mapping[str, float] | None:
        """Figures of its pool."""
        del value
        return None

    def redact(self) -> dict[str, Any]:
        """What may be shown of its configuration."""
        return {}

    def lost(self, error: BaseException) -> None:
        """The value has died: with `on_lost="cancel"` the body is cut short."""
        if self._lose is not None:
            self._lose(error)


class CallerDesk:
    """Where jobs for the caller's own thread are handed in, in a sync `with`."""

    outer_loop = False  # the caller's thread runs an event loop, which has to stand still

    async def at_the_caller(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have the caller's thread call this."""
        raise NotImplementedError


class Opening(Protocol):
    """How a resource is entered and left."""

    async def enter(self) -> Any:
        """Acquire; return the value."""
        ...

    async def leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Release; a true answer asks to suppress the error."""
        ...


class AsyncOpening:
    """An async context manager, as it is: its own two methods, found on its class."""

    def __init__(self, manager: Any) -> None:
        cls = type(manager)
        self.enter = MethodType(cls.__aenter__, manager)
        self.leave = MethodType(cls.__aexit__, manager)


class SyncOpening:
    """A blocking context manager, in a thread of its own."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._thread: OwnThread | None = None

    async def enter(self) -> Any:  # noqa: D102  (the protocol says it)
        cls = type(self._manager)
        self._thread = thread = OwnThread(f"resource {cls.__name__}")
        entering = asyncio.ensure_future(thread.run(cls.__enter__, self._manager))
        if await _ended(entering):
            if entering.exception() is not None:
                thread.stop()
            return entering.result()
        # A thread cannot be interrupted: what it acquired all the same is given back.
        if entering.exception() is None:
            await _ended(asyncio.ensure_future(thread.run(cls.__exit__, self._manager, *NOTHING)))
        thread.stop()
        raise asyncio.CancelledError

    async def leave(self, *details: Any) -> bool | None:  # noqa: D102
        thread, cls = cast("OwnThread", self._thread), type(self._manager)
        leaving = asyncio.ensure_future(thread.run(cls.__exit__, self._manager, *details))
        await _ended(leaving)
        thread.stop()
        thread.join(1.0)
        return bool(leaving.result())


async def _ended(future: asyncio.Future[Any]) -> bool:
    """Wait for its end, whatever comes; False if this was cancelled meanwhile."""
    undisturbed = True
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            undisturbed = False
    return undisturbed


class HereOpening:
    """A blocking context manager, entered and left in the caller's own task."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    async def enter(self) -> Any:  # noqa: D102  (the protocol says it)
        return type(self._manager).__enter__(self._manager)

    async def leave(self, *details: Any) -> bool | None:  # noqa: D102
        return bool(type(self._manager).__exit__(self._manager, *details))


class CallerOpening:
    """A blocking context manager, entered and left in the caller's own thread."""

    def __init__(self, manager: Any, desk: CallerDesk) -> None:
        self._manager = manager
        self._desk = desk

    async def enter(self) -> Any:  # noqa: D102  (the protocol says it)
        job = self._desk.at_the_caller(type(self._manager).__enter__, self._manager)
        entering = asyncio.ensure_future(job)
        if await _ended(entering):
            return entering.result()
        if entering.exception() is None:
            await self.leave(*NOTHING)
        raise asyncio.CancelledError

    async def leave(self, *details: Any) -> bool | None:  # noqa: D102
        job = self._desk.at_the_caller(type(self._manager).__exit__, self._manager, *details)
        leaving = asyncio.ensure_future(job)
        await _ended(leaving)
        return bool(leaving.result())


class ResourceOpening:
    """A `Resource`, whose methods may be plain or async."""

    def __init__(self, resource: Resource[Any], deps: Callable[[], Deps]) -> None:
        self.resource = resource
        self._deps = deps
        self._value: Any = None

    async def enter(self) -> Any:  # noqa: D102  (the protocol says it)
        value = self.resource.acquire(self._deps())
        self._value = await value if inspect.isawaitable(value) else value
        return self._value

    async def leave(  # noqa: D102
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        del kind, traceback
        result = self.resource.release(self._value, error)
        if inspect.isawaitable(result):
            await result
        return None


class FactoryOpening:
    """A callable that makes something enterable out of its needs, or simply a value."""

    def __init__(
        self,
        factory: Callable[..., Any],
        deps: Callable[[], Deps],
        *,
        here: bool,
        desk: CallerDesk | None,
        wrap: Callable[..., Any],
    ) -> None:
        self._factory = wrap(factory)
        self._pass = passing_of(factory)
        self._deps = deps
        self._here = here
        self._desk = desk
        self._inner: Opening | None = None

    async def enter(self) -> Any:  # noqa: D102  (the protocol says it)
        made = self._pass(self._factory, self._deps())
        if inspect.isawaitable(made) and not hasattr(type(made), "__aenter__"):
            made = await made
        self._inner = enterable(made, self._deps, here=self._here, desk=self._desk)
        return made if self._inner is None else await self._inner.enter()

    async def leave(self, *details: Any) -> bool | None:  # noqa: D102
        return None if self._inner is None else await self._inner.leave(*details)


class RetryingOpening:
    """Tries again while the server is not there yet."""

    def __init__(self, inner: Opening, retry: Retry, counted: Callable[[int], None]) -> None:
        self._inner = inner
        self._retry = retry
        self._counted = counted
        self.leave = inner.leave
        self.resource = getattr(inner, "resource", None)

    async def enter(self) -> Any:  # noqa: D102  (the protocol says it)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._retry.wait
        delay = self._retry.delay
        attempt = 1
        while True:
            self._counted(attempt)
            try:
                return await self._inner.enter()
            except MissingDriver:
                raise
            except Exception:
                if attempt >= self._retry.attempts and loop.time() + delay >= give_up_at:
                    raise
            await asyncio.sleep(delay)
            attempt += 1
            delay = min(delay * 2, self._retry.longest_delay)


class Retry:
    """How often, and for how long, acquiring is tried: whichever allows one more attempt."""

    def __init__(
        self,
        attempts: int = 1,
        *,
        wait: float = 0.0,
        delay: float = 0.05,
        longest_delay: float = 1.0,
    ) -> None:
        if attempts < 1 or wait < 0 or delay < 0:
            raise ValueError("A retry has at least one attempt, and no negative seconds.")
        self.attempts = attempts
        self.wait = wait
        self.delay = delay
        self.longest_delay = longest_delay


def opening_of(
    resource: Any,
    deps: Callable[[], Deps],
    *,
    here: bool = False,
    desk: CallerDesk | None = None,
) -> Opening:
    """How to enter and leave this; TypeError if it is nothing of the kind.

    `here` puts blocking ones into the caller's task, a `desk` into the caller's thread.
    """
    found = enterable(resource, deps, here=here, desk=desk)
    if found is not None:
        return found
    if callable(resource):
        wrap: Callable[..., Any] = _as_it_is
        if inspect.isasyncgenfunction(resource):
            wrap = asynccontextmanager
        elif inspect.isgeneratorfunction(resource):
            wrap = contextmanager
        return FactoryOpening(resource, deps, here=here, desk=desk, wrap=wrap)
    raise TypeError(
        f"A {type(resource).__name__} is no resource. Give a Resource, a context manager, an async "
        "generator, or a function that makes one out of its needs."
    )


def _as_it_is(factory: Callable[..., Any]) -> Callable[..., Any]:
    return factory


def enterable(
    thing: Any, deps: Callable[[], Deps], *, here: bool, desk: CallerDesk | None
) -> Opening | None:
    """How to enter this, or None if it is not made to be entered."""
    if isinstance(thing, Resource):
        if desk is not None and desk.outer_loop and not thing.sync_native:
            raise _needs_async_with(thing)
        return ResourceOpening(thing, deps)
    if isinstance(thing, type):
        return None
    if inspect.isasyncgen(thing):
        thing = asynccontextmanager(lambda generator=thing: generator)()
    elif inspect.isgenerator(thing):
        thing = contextmanager(lambda generator=thing: generator)()
    if desk is not None and is_sync(thing):
        return CallerOpening(thing, desk)
    if hasattr(type(thing), "__aenter__") and hasattr(type(thing), "__aexit__"):
        if desk is not None and desk.outer_loop:
            raise _needs_async_with(thing)
        return AsyncOpening(thing)
    if is_sync(thing):
        return HereOpening(thing) if here else SyncOpening(thing)
    return None


def _needs_async_with(thing: Any) -> RuntimeError:
    return RuntimeError(
        f"A {type(thing).__name__} needs an event loop, and the one that runs here stands still "
        "during a plain `with`: write `async with` instead."
    )


def is_sync(thing: Any) -> bool:
    """Whether it is a blocking context manager."""
    return (
        not isinstance(thing, type)
        and hasattr(type(thing), "__enter__")
        and hasattr(type(thing), "__exit__")
    )


def parameters_of(factory: Any) -> list[str]:
    """The names of what a factory has to be given."""
    try:
        found = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in callables do not tell
        return []
    return [
        each.name
        for each in found
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]


def inferred_needs(factory: Any) -> tuple[str, ...]:
    """The needs that the parameters of a factory name."""
    names = parameters_of(factory)
    return () if set(names) & WHOLE else tuple(names)


def passing_of(factory: Any) -> Callable[[Callable[..., Any], Deps], Any]:
    """How the values of its needs are handed to a factory: by name, all at once, or in order."""
    names = parameters_of(factory)

    def hand_over(call: Callable[..., Any], deps: Deps) -> Any:
        if not names:
            return call()
        if set(names) <= set(deps):
            return call(**{name: deps[name] for name in names})
        if len(names) == 1 and (names[0] in WHOLE or len(deps) != 1):
            return call(deps)
        return call(*deps.values())

    return hand_over
