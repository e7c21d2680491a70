"""Counts and times what plugins do, exactly, for about the price of the two clock reads.

A measuring function has the same parameters as the method it stands before. It is made of code
that is compiled once per shape of signature; per method only the function object is new. Latencies
go into a histogram of eight buckets per power of two, so that a percentile is off by 12.5 % at
most. Lists are counted up in place: CPython does not switch threads between reading and storing an
item there. (It does so in builds with the interpreter lock; others are refused.)
"""

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter_ns
from types import FunctionType
from typing import Any

from signatures import (
    KEYWORD_ONLY,
    POSITIONAL,
    POSITIONAL_ONLY,
    RAW,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Color,
    Kind,
    Member,
    Param,
    Parameters,
    color_of,
    parameters_of,
    promises_await,
)
from violations import ContractRuntimeError, Violation, place_of_function

OFFSET_NS = 16  # added to every duration, so that four bits are always there to tell buckets apart
# What stands where in the list of a meter. No duration leads to a bucket below the first.
TOTAL, ERRORS, CANCELLATIONS, FIRST_BUCKET = 0, 1, 2, (5 << 3) + 8
LENGTH = 64 * 8 + 16
# Upper bounds of the histogram that Prometheus is given, in seconds.
BOUNDS_SECONDS = (1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)

if not getattr(sys, "_is_gil_enabled", lambda: True)():  # pragma: no cover
    raise RuntimeError(
        "Counts would not be exact on a Python without the interpreter lock. Run with PYTHON_GIL=1."
    )


@dataclass(frozen=True)
class Figures:
    """What one method did: calls include errors and cancellations; times are in seconds."""

    calls: int
    errors: int
    cancellations: int
    total_seconds: float
    p50: float | None
    p95: float | None
    p99: float | None


class Meter:
    """Counts of one method, in one list: the sum of all durations, two counts, and the buckets."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * LENGTH

    def add(self, nanoseconds: int) -> None:
        """Note a duration, as the measuring functions do it in place."""
        _add(self.counts, nanoseconds)

    def figures(self) -> Figures:
        """A snapshot; calls that end meanwhile are in the next."""
        counts = list(self.counts)
        calls = sum(counts[FIRST_BUCKET:])
        total = max(0, counts[TOTAL] - calls * OFFSET_NS) / 1e9
        p50, p95, p99 = (_percentile(counts, calls, share) for share in (0.5, 0.95, 0.99))
        return Figures(calls, counts[ERRORS], counts[CANCELLATIONS], total, p50, p95, p99)

    def cumulative(self) -> list[tuple[str, int]]:
        """Buckets for Prometheus, from the fine ones; a fine one counts by its middle."""
        counts = list(self.counts)
        found: list[tuple[str, int]] = []
        running, index = 0, FIRST_BUCKET
        for bound in BOUNDS_SECONDS:
            while index < LENGTH and _middle(index) <= bound * 1e9:
                running += counts[index]
                index += 1
            found.append((f"{bound:g}", running))
        found.append(("+Inf", running + sum(counts[index:])))
        return found


def _add(counts: list[int], nanoseconds: int) -> None:
    elapsed = nanoseconds + OFFSET_NS
    bits = elapsed.bit_length()
    counts[(bits << 3) + (elapsed >> bits - 4)] += 1
    counts[TOTAL] += elapsed


def _add_failed(counts: list[int], error: BaseException, nanoseconds: int) -> None:
    """Count how a call ended; a coroutine that is closed or cancelled has not failed."""
    _add(counts, nanoseconds)
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        counts[CANCELLATIONS] += 1
    else:
        counts[ERRORS] += 1


def _percentile(counts: list[int], calls: int, share: float) -> float | None:
    left = share * calls
    for index in range(FIRST_BUCKET, LENGTH):
        left -= counts[index]
        if counts[index] and left <= 0:
            return _middle(index) / 1e9
    return None


def _middle(index: int) -> float:
    """The middle of a bucket in nanoseconds."""
    bits, step = divmod(index - 8, 8)
    return ((step + 8.5) * (1 << (bits - 4))) - OFFSET_NS


# --- measuring functions ----------------------------------------------------------------------
# Names that end in two underscores keep out of the way of parameters.

_SYNC = """
def {name}({parameters}):
    {guard}
    {check}
    start__ = clock__()
    try:
        result__ = raw__({arguments})
    except BaseException as error__:
        failed__(counts__, error__, clock__() - start__)
        raise
    elapsed__ = clock__() - start__ + 16
    bits__ = elapsed__.bit_length()
    counts__[(bits__ << 3) + (elapsed__ >> bits__ - 4)] += 1
    counts__[0] += elapsed__
    return result__
"""
_ASYNC = _SYNC.replace("\ndef ", "\nasync def ").replace("= raw__(", "= await raw__(")
_AWAITABLE = """
def {name}({parameters}):
    {guard}
    {check}
    start__ = clock__()
    try:
        result__ = raw__({arguments})
    except BaseException as error__:
        failed__(counts__, error__, clock__() - start__)
        raise
    return outcome__(result__, start__)
"""
_FACTORY = """
def make(raw__, owner__, counts__, pending__, outcome__):
{body}
    return {name}
"""
_GLOBALS = {"clock__": perf_counter_ns, "failed__": _add_failed, "type__": type}


@lru_cache(maxsize=1024)
def _factory(
    template: str,
    name: str,
    kind: Kind,
    is_deferred: bool,
    shape: tuple[tuple[str, int, bool], ...],
) -> Callable[..., FunctionType]:
    """What makes measuring functions of one shape; compiling is far slower than calling it."""
    text = template.format(
        name=name,
        guard=_guard(kind, shape, template),
        check="for each__ in pending__[:]: each__()" if is_deferred else "pass",
        parameters=_parameter_list(shape),
        arguments=_argument_list(shape),
    )
    body = "\n".join(f"    {line}" for line in text.splitlines())
    space: dict[str, Any] = dict(_GLOBALS)
    exec(_FACTORY.format(body=body, name=name), space)  # noqa: S102  (of identifiers only)
    made: Callable[..., FunctionType] = space["make"]
    return made


def _parameter_list(parameters: tuple[tuple[str, int, bool], ...]) -> str:
    parts: list[str] = []
    previous = None
    for name, kind, optional in parameters:
        if previous == POSITIONAL_ONLY and kind != POSITIONAL_ONLY:
            parts.append("/")
        if kind == KEYWORD_ONLY and previous not in (KEYWORD_ONLY, VAR_POSITIONAL):
            parts.append("*")
        stars = {VAR_POSITIONAL: "*", VAR_KEYWORD: "**"}.get(kind, "")
        parts.append(f"{stars}{name}{'=None' if optional else ''}")
        previous = kind
    if previous == POSITIONAL_ONLY:
        parts.append("/")
    return ", ".join(parts)


def _argument_list(parameters: tuple[tuple[str, int, bool], ...]) -> str:
    stars = {VAR_POSITIONAL: "*{0}", VAR_KEYWORD: "**{0}", KEYWORD_ONLY: "{0}={0}"}
    return ", ".join(stars.get(kind, "{0}").format(name) for name, kind, _ in parameters)


Verify = Callable[[type], None]


def measured(
    member: Member, owner: type, meter: Meter, deferred: frozenset[str], verify: Verify
) -> Any:
    """What stands in the class in place of the member, or None when it is not measured.

    It counts only for instances of exactly `owner`: so a call through `super()`, or on a subclass
    that has its own, is counted once. What is `deferred`, `verify` looks at first.
    """
    if member.kind not in (Kind.INSTANCE, Kind.CLASS, Kind.STATIC):
        return None
    value = member.value
    binds = isinstance(value, (FunctionType, classmethod, staticmethod))
    function: Any = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if isinstance(function, FunctionType):
        parameters = member.with_self or parameters_of(function)
    else:
        parameters = _loose(member)
        function = _called_on_instance(value, member)
        binds = False
    made = _wrap(function, parameters, member, owner, meter, deferred, verify)
    made.__dict__[RAW] = value
    if isinstance(value, classmethod):
        return classmethod(made)
    if isinstance(value, staticmethod) or (not binds and member.kind is Kind.STATIC):
        return staticmethod(made)
    return made


def _loose(member: Member) -> Parameters:
    """Parameters for what is no plain function: pass everything on."""
    first = () if member.kind is Kind.STATIC else (Param("self", POSITIONAL, True),)
    return (*first, Param("args", VAR_POSITIONAL, False), Param("kwargs", VAR_KEYWORD, False))


def _called_on_instance(value: Any, member: Member) -> Any:
    """A function that reaches a descriptor such as `partialmethod` through the instance."""
    if member.kind is Kind.STATIC:
        return value

    def reach(self: Any, *args: Any, **kwargs: Any) -> Any:
        return value.__get__(self, type(self))(*args, **kwargs)

    return reach


def _wrap(
    function: Any,
    parameters: Parameters,
    member: Member,
    owner: type,
    meter: Meter,
    deferred: frozenset[str],
    verify: Verify,
) -> FunctionType:
    shape = tuple(
        [
            (name, kind, not required and kind != VAR_POSITIONAL and kind != VAR_KEYWORD)
            for name, kind, required, _ in parameters
        ]
    )
    name = member.name
    template = _template(function, member, deferred)
    make = _factory(template, name, member.kind, bool(deferred), shape)
    pending = outcome = None
    if deferred:
        pending = _once(verify, owner)
    if template is _AWAITABLE:
        outcome = functools.partial(_outcome, meter.counts, member, deferred)
    made = make(function, owner, meter.counts, pending, outcome)
    if isinstance(function, FunctionType) and function.__module__ != __name__:
        made.__defaults__ = function.__defaults__
        made.__kwdefaults__ = function.__kwdefaults__
        made.__module__, made.__doc__ = function.__module__, function.__doc__
        made.__qualname__ = function.__qualname__
        made.__name__ = function.__name__
        made.__annotations__ = function.__annotations__
        space = made.__dict__
        space.update(function.__dict__)
        space.pop("__isabstractmethod__", None)
        space["__wrapped__"] = function
    else:
        made.__module__, made.__qualname__ = owner.__module__, f"{owner.__qualname__}.{name}"
        made.__doc__ = getattr(member.function, "__doc__", None)
        _keep_signature(made, member)
        for helper in _HELPERS.get(type(member.value), ()):
            setattr(made, helper, getattr(member.value, helper))
    return made


def _once(verify: Verify, owner: type) -> list[Callable[[], None]]:
    """What is to be called before a call, as long as it raises."""
    pending: list[Callable[[], None]] = []

    def verify_once() -> None:
        verify(owner)
        pending.clear()

    pending.append(verify_once)
    return pending


# What else users of these decorators reach through the method.
_HELPERS: dict[type, tuple[str, ...]] = {
    type(functools.cache(id)): ("cache_clear", "cache_info", "cache_parameters"),
    functools.singledispatchmethod: ("register",),
}


def _template(function: Any, member: Member, deferred: frozenset[str]) -> str:
    color = Color.SYNC
    if isinstance(function, FunctionType):
        color = member.color if function is member.outer else color_of(function)
    if color is Color.ASYNC:
        return _ASYNC
    if "awaitable" in deferred or member.inner_color is Color.ASYNC or _returns_await(member):
        return _AWAITABLE
    return _SYNC


def _keep_signature(made: FunctionType, member: Member) -> None:
    try:
        bound = member.value
        if isinstance(bound, functools.singledispatchmethod):
            signature = inspect.signature(bound.func)
        elif isinstance(bound, functools.partialmethod):
            bound = functools.partial(bound.func, None, *bound.args, **bound.keywords)
            signature = inspect.signature(bound)
            first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            signature = signature.replace(parameters=[first, *signature.parameters.values()])
        else:
            signature = inspect.signature(bound)
        made.__signature__ = signature  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # a C function, or names that stand in each other's way
        return


def _returns_await(member: Member) -> bool:
    return member.color is Color.SYNC and promises_await(member)


def _guard(kind: Kind, shape: tuple[tuple[str, int, bool], ...], template: str) -> str:
    """Who else reaches this function has its own measure: pass the call on."""
    if kind is Kind.STATIC or not shape or shape[0][1] > VAR_POSITIONAL:
        return "pass"
    first = shape[0][0]
    call = f"raw__({_argument_list(shape)})"
    if template is _ASYNC:
        call = f"await {call}"
    subject = f"{first}[0]" if shape[0][1] == VAR_POSITIONAL else first
    seen = subject if kind is Kind.CLASS else f"type__({subject})"
    return f"if {seen} is not owner__: return {call}"


def _outcome(
    counts: list[int], member: Member, deferred: frozenset[str], result: Any, start: int
) -> Any:
    """What a plain function gave back that wraps an async one: measured until it was awaited."""
    if inspect.isawaitable(result):
        if "not awaitable" not in deferred:
            return _until_done(counts, result, start)
        if inspect.iscoroutine(result):
            result.close()
        wrong = _wrong_color(member, "a plain value", "something to await")
    elif "awaitable" in deferred or _returns_await(member):
        wrong = _wrong_color(member, "something to await", f"a {type(result).__name__}")
    else:
        _add(counts, perf_counter_ns() - start)
        return result
    _add_failed(counts, wrong, perf_counter_ns() - start)
    raise wrong


async def _until_done(counts: list[int], awaitable: Any, start: int) -> Any:
    try:
        result = await awaitable
    except BaseException as error:
        _add_failed(counts, error, perf_counter_ns() - start)
        raise
    _add(counts, perf_counter_ns() - start)
    return result


def _wrong_color(member: Member, expected: str, actual: str) -> ContractRuntimeError:
    file, line = place_of_function(member.function) if member.function else ("<unknown>", 1)
    return ContractRuntimeError(
        member.owner.__name__,
        [
            Violation(
                "C111", member.name, expected, actual, file, line,
                "Let the decorator's wrapper pass on what the function gives back.",
            )
        ],
    )  # fmt: skip
