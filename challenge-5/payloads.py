"""Calls, results and errors as bytes.

A function that workers can import travels as its name, anything else (lambdas, closures, what was
written in `__main__`) by value through cloudpickle. Plain data takes the C pickler, which is five
times as fast; only when it fails, or met something of `__main__`, cloudpickle has a turn.
"""

import inspect
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import cloudpickle

from errors import (
    NotSerializable,
    RemoteError,
    RemoteTraceback,
    ResultNotSerializable,
    ResultTooLarge,
)
from tasks import Result

PROTOCOL = 5
NONE = pickle.dumps(None, PROTOCOL)
NO_ARGUMENTS = b""
TRACEBACK_CHARACTERS = 8_000
MESSAGE_CHARACTERS = 2_000
INPUT_BYTES = 256 * 1024 * 1024  # of arguments, and of parents' results together

_by_name: dict[Callable[..., Any], bytes] = {}  # functions of modules: they live anyway


def printable(text: str) -> str:
    """The text with lone surrogates shown as escapes: neither SQLite nor JSON can keep them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def dump(value: Any) -> bytes:
    """The bytes of any value; raises whatever its pickling raises."""
    if value is None:
        return NONE
    try:
        data = pickle.dumps(value, PROTOCOL)
    except Exception:  # noqa: BLE001  (pickling runs code of others; the second way decides)
        data = b"__main__"
    if b"__main__" in data:
        dumped: bytes = cloudpickle.dumps(value, PROTOCOL)
        return dumped
    return data


def dump_function(func: Callable[..., Any]) -> bytes:
    """The bytes of a callable; NotSerializable says which and why."""
    try:
        known = _by_name.get(func)
    except TypeError:  # unhashable callable
        known = None
    if known is not None:
        return known
    try:
        data: bytes = cloudpickle.dumps(func, PROTOCOL)
    except Exception as error:
        raise NotSerializable(
            f"The function {name_of(func)} cannot be sent to a process: {error}. Give it what it "
            'needs as arguments, or declare kind="io" to run it in this process.'
        ) from error
    module = sys.modules.get(getattr(func, "__module__", None) or "")
    if module is not None and module.__name__ != "__main__":
        found: Any = module
        for part in getattr(func, "__qualname__", "?").split("."):
            found = getattr(found, part, None)
        if found is func:
            _by_name[func] = data
    return data


def dump_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> bytes:
    """The bytes of the arguments; NotSerializable names the one that cannot be pickled."""
    if not args and not kwargs:
        return NO_ARGUMENTS
    try:
        data = dump((tuple(args), kwargs))
        if len(data) <= INPUT_BYTES:
            return data
    except Exception as error:
        for place, value in [*enumerate(args), *kwargs.items()]:
            try:
                dump(value)
            except Exception as cause:
                shown = f"{place + 1}" if isinstance(place, int) else repr(place)
                raise NotSerializable(
                    f"Argument {shown} ({type(value).__name__}) cannot be sent to a process: "
                    f"{cause}. Nothing was submitted."
                ) from cause
        raise NotSerializable(f"The arguments cannot be sent to a process: {error}.") from error
    raise NotSerializable(
        f"The arguments have {len(data):,} bytes; {INPUT_BYTES:,} are allowed. Write large input "
        "to a file and pass its path."
    )


def load_call(
    arguments: bytes, parents: "Parents | None"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The args and kwargs of a call, with the results of its parents in their places."""
    if arguments:
        args, kwargs = pickle.loads(arguments)  # noqa: S301  (packed by `dump_arguments`)
    else:
        args, kwargs = (), {}
    if parents:
        args, kwargs = fill_in(args, kwargs, parents)
    return args, kwargs


Parents = tuple[bool, list[tuple[str, bytes]]]  # pass them positionally?, (id, result) of each


def fill_in(
    args: Sequence[Any], kwargs: dict[str, Any], parents: Parents
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Parents' results positionally, or where `Result(id)` stands."""
    positionally, results = parents
    if positionally:
        return tuple(pickle.loads(data) for _, data in results), {}  # noqa: S301  (of our own workers)
    values = {parent: pickle.loads(data) for parent, data in results}  # noqa: S301  (of our own workers)
    return tuple(_replace(each, values) for each in args), {
        name: _replace(each, values) for name, each in kwargs.items()
    }


def _replace(value: Any, results: dict[str, Any]) -> Any:
    kind = type(value)
    if kind is Result:
        return results[value.parent_id]
    if kind in (list, tuple, set):
        return kind(_replace(each, results) for each in value)
    if kind is dict:
        return {key: _replace(each, results) for key, each in value.items()}
    return value


_CONTAINERS = frozenset({list, tuple, set, dict})


def placeholders(value: Any) -> list[str]:
    """Ids of the `Result`s in args or kwargs, in plain containers too."""
    found: list[str] = []
    seen: set[int] = set()  # a container may hold itself
    stack = [value]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind is Result:
            found.append(value.parent_id)
        elif kind in _CONTAINERS and value and id(value) not in seen:
            seen.add(id(value))
            stack += reversed(list(value.values() if kind is dict else value))
    return found


def takes_positionals(func: Callable[..., Any]) -> bool:
    """Can it be given arguments by position?"""
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # some builtins do not tell
        return True
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return any(parameter.kind in kinds for parameter in parameters)


def name_of(func: Callable[..., Any]) -> str:
    """The name under which a callable is listed and its duration learnt."""
    inner = getattr(func, "func", func)  # a partial
    return printable(str(getattr(inner, "__qualname__", type(inner).__qualname__)))[:200]


def digest(*parts: Any) -> bytes:
    """What tells one request from another."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        hashed.update(b"%d:" % len(data))
        hashed.update(data)
    return hashed.digest()


# --- results and errors -----------------------------------------------------------------------


def dump_result(value: Any, limit: int) -> bytes:
    """The bytes of a result; ResultNotSerializable or ResultTooLarge say what to do."""
    if value is None:
        return NONE
    try:
        data = dump(value)
    except Exception as error:
        raise ResultNotSerializable(
            f"The task returned {type(value).__name__}, which cannot be pickled: {error}. Return "
            "plain data."
        ) from error
    if len(data) > limit:
        raise ResultTooLarge(
            f"The task returned {len(data):,} bytes; {limit:,} are allowed (result_limit). Write "
            "large output to a file and return its path."
        )
    return data


def dump_error(error: BaseException, limit: int) -> bytes:
    """Type, message, traceback text, and the exception itself if it survives the journey."""
    text = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
    try:
        message = str(error)[:MESSAGE_CHARACTERS]
    except Exception:  # noqa: BLE001  (somebody else's __str__)
        message = "(its message cannot be shown)"
    try:
        travelling: bytes | None = dump(error)
        # An __init__ with other arguments shows only here.
        pickle.loads(travelling or b"")  # noqa: S301  (dumped by the line above)
        if travelling is not None and len(travelling) > limit:
            travelling = None
    except Exception:  # noqa: BLE001  (somebody else's __reduce__ or __init__)
        travelling = None
    parts = (type(error).__name__, printable(message), printable(text), travelling)
    return pickle.dumps(parts, PROTOCOL)


def load_error(description: dict[str, Any], travelled: bytes | None) -> BaseException:
    """The exception as it was raised, its remote traceback as the cause."""
    text = description.get("traceback", "")
    error: BaseException | None = None
    if travelled is not None:
        try:
            error = pickle.loads(travelled)  # noqa: S301  (of our own worker)
        except Exception:  # noqa: BLE001  (a class that is not importable here)
            error = None
    if error is None:
        error = RemoteError(description["type"], description["message"], text)
    if text and error.__cause__ is None:
        error.__cause__ = RemoteTraceback(text)
    return error
