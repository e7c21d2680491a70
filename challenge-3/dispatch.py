"""Calls of plugins from outside: in time, isolated, in a thread where they are not async.

Whatever a plugin raises becomes an outcome here; nothing of it reaches the client.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, cast

from pydantic_core import PydanticSerializationError, to_json

from chains import Chain, ChainError, ChainInvalid, ChainTypeError, Finding, InvalidInput, Stage
from endpoints import Endpoint, InputError, OutputError, endpoint_of, refused
from logs import get_logger
from registry import Plugin, Registry
from workers import CallTimeout, Overloaded, Workers

log = get_logger("plugins")

MOST_STUCK = 8  # calls of one plugin that were given up and still run
_INSTANCE = "instance"
Outcome = tuple[BaseException | None, Any]


class CallRefused(Exception):
    """Base: the call gives no result."""

    status = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class PluginRaised(CallRefused):
    """The plugin raised something."""


class PluginOutputInvalid(CallRefused):
    """What it gave back breaks its own model."""


class PluginTimedOut(CallRefused):
    """It took longer than it may."""

    status = 504


class PluginStuck(CallRefused):
    """Too many calls of it never came back, or too many wait."""

    status = 503


class NotOverHTTP(CallRefused):
    """It has no such method, or one that JSON cannot express."""

    status = 404


class Dispatcher:
    """Runs calls against a registry."""

    def __init__(
        self, registry: Registry, timeout_seconds: float, workers: Workers | None = None
    ) -> None:
        self.registry = registry
        self.timeout_seconds = timeout_seconds
        self.workers = workers or Workers()
        self._running: set[asyncio.Task[Any]] = set()

    def endpoint(self, plugin: Plugin, method: str) -> Endpoint:
        """The endpoint of a method."""
        found = endpoint_of(plugin, method)
        if found is None:
            known = ", ".join(sorted(plugin.capabilities)) or "none that can be called here"
            raise NotOverHTTP(f"{plugin.name} {plugin.version} has no {method}; it has: {known}.")
        if isinstance(found, str):
            raise NotOverHTTP(found)
        return found

    async def call(self, plugin: Plugin, method: str, body: bytes, request_id: str = "") -> bytes:
        """JSON in, JSON out; InputError when the input does not fit, else a CallRefused."""
        endpoint = self.endpoint(plugin, method)
        who = f"{plugin.name} {plugin.version}"

        def work() -> bytes:  # one hop to a thread and back for all of it
            value = endpoint.read(body)
            with self.registry.serving(plugin):
                return endpoint.write(getattr(self._instance(plugin), method)(value))

        async def work_async() -> bytes:
            return endpoint.write(await getattr(plugin.extras[_INSTANCE], method)(value))

        if not endpoint.is_async:
            answered = await self._in_thread([plugin], work)
            return cast("bytes", self._outcome(who, method, request_id, answered))
        value = self._outcome(who, method, request_id, _caught(endpoint.read, body))
        made = await self._in_thread([plugin], lambda: self._instance(plugin))
        self._outcome(who, method, request_id, made)
        done = await self._awaited([plugin], work_async)
        return cast("bytes", self._outcome(who, method, request_id, done))

    def _outcome(self, who: str, method: str, request_id: str, outcome: Outcome) -> Any:
        """The result, or what the caller may know of why there is none."""
        error, result = outcome
        if error is None:
            return result
        if isinstance(error, (InputError, ChainTypeError, ChainInvalid)):
            raise error
        if isinstance(error, InvalidInput):
            raise InputError(f"{who} cannot take this input.", refused(error.report.errors))
        if isinstance(error, ChainError) and isinstance(error.__cause__, InvalidInput):
            found = (Finding("", f"{error} {e.message}") for e in error.__cause__.report.errors)
            raise InputError("", refused(found))
        self._log(who, method, request_id, error)
        if isinstance(error, OutputError):
            raise PluginOutputInvalid(
                f"{who} gave back what breaks its own model; nothing of it is passed on. The log "
                "names this request id."
            )
        if isinstance(error, ChainError):
            raise PluginRaised(f"{error} The log names this request id.")
        raise PluginRaised(f"{who} failed in {method}; the log names this request id.")

    async def run_chain(self, plugins: list[Plugin], data: Any, request_id: str = "") -> bytes:
        """The data through all plugins; ChainTypeError, ChainInvalid and InputError are raised."""
        body = to_json(data)

        def compose() -> tuple[Chain, Any]:
            chain = Chain(*map(self._instance, plugins))
            first = self.endpoint(plugins[0], chain.stages[0].method)
            return chain, first.read(body)

        def fit(stage: Stage, value: Any) -> Any:
            try:
                return self.endpoint(plugins[stage.step - 1], stage.method).read(to_json(value))
            except (InputError, PydanticSerializationError):
                raise ChainTypeError(
                    f"What came to step {stage.step}, {stage.name}, is not what it takes.",
                    stage.step - 1,
                ) from None

        def work() -> bytes:
            chain, value = compose()
            if chain.is_async:
                raise _HasAsync(chain, value)
            with ExitStack() as stack:
                for plugin in plugins:
                    stack.enter_context(self.registry.serving(plugin))
                return self._write(chain, plugins, chain.run(value, fit))

        outcome = await self._in_thread(plugins, work)
        if isinstance(outcome[0], _HasAsync):
            chain, value = outcome[0].args

            async def in_thread(method: Any, value: Any) -> Any:
                error, result = await self._in_thread(plugins, lambda: method(value))
                if error is not None:
                    raise error
                return result

            async def work_async() -> bytes:
                return self._write(chain, plugins, await chain.run_async(value, in_thread, fit))

            outcome = await self._awaited(plugins, work_async)
        return cast("bytes", self._outcome("the chain", "run", request_id, outcome))

    def _write(self, chain: Chain, plugins: list[Plugin], value: Any) -> bytes:
        moving = [stage for stage in chain.stages if stage.method != "validate"]
        if not moving:
            return to_json(value)
        return self.endpoint(plugins[moving[-1].step - 1], moving[-1].method).write(value)

    def _log(self, who: str, method: str, request_id: str, error: BaseException) -> None:
        log.error(
            "plugin_call_failed", plugin=who, method=method, request_id=request_id,
            error=type(error).__name__, exc_info=(type(error), error, error.__traceback__),
        )  # fmt: skip

    def _instance(self, plugin: Plugin) -> Any:
        """The one instance that serves all calls; made by the first one."""
        made = plugin.extras.get(_INSTANCE)
        if made is None:
            made = plugin.extras.setdefault(_INSTANCE, plugin.cls())
        return made

    def _late(self, plugins: list[Plugin]) -> Callable[[bool], None]:
        def late(is_late: bool) -> None:
            for plugin in plugins:
                plugin.stuck += 1 if is_late else -1

        return late

    async def _in_thread(self, plugins: list[Plugin], work: Callable[[], Any]) -> Outcome:
        self._refuse_stuck(plugins)
        try:
            return await self.workers.run(self.timeout_seconds, work, late=self._late(plugins))
        except CallTimeout:
            raise self._timed_out(plugins) from None
        except Overloaded:
            raise PluginStuck("Too many calls wait for a thread.") from None

    def _refuse_stuck(self, plugins: list[Plugin]) -> None:
        for plugin in plugins:
            if plugin.stuck >= MOST_STUCK:
                raise PluginStuck(
                    f"{plugin.stuck} calls of {plugin.name} {plugin.version} have not come back; "
                    "no more are made until they do."
                )

    def _timed_out(self, plugins: list[Plugin]) -> PluginTimedOut:
        who = ", ".join(f"{plugin.name} {plugin.version}" for plugin in plugins)
        return PluginTimedOut(
            f"{who} did not answer within {self.timeout_seconds:g} s; the call was given up."
        )

    async def _awaited(self, plugins: list[Plugin], work: Callable[[], Awaitable[Any]]) -> Outcome:
        """Run it as a task of its own, so that one that ignores its cancellation can be left."""
        self._refuse_stuck(plugins)

        async def guarded() -> Outcome:
            task = asyncio.current_task()
            try:
                with ExitStack() as stack:
                    for plugin in plugins:
                        stack.enter_context(self.registry.serving(plugin))
                    return None, await work()
            except asyncio.CancelledError as error:
                if task is None or task.cancelling():
                    raise
                return error, None
            except BaseException as error:  # noqa: BLE001  (SystemExit of a plugin ends nothing)
                return error, None

        task = asyncio.create_task(guarded())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_seconds)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            late = self._late(plugins)
            late(True)
            task.add_done_callback(lambda _: late(False))
            raise self._timed_out(plugins)
        return task.result()


class _HasAsync(Exception):
    """The chain has to be awaited."""


def _caught(function: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return None, function(*arguments)
    except Exception as error:  # noqa: BLE001  (models of a plugin may run its code)
        return error, None
