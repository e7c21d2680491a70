"""Annotations as they are written: strings evaluated, names found, and shown again to people."""

import re
import types
import typing
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NewType, TypeVar

EMPTY: Any = type("EMPTY", (), {"__repr__": lambda _: "<no annotation>"})()
UNRESOLVED: Any = type("UNRESOLVED", (), {"__repr__": lambda _: "<not resolvable yet>"})()
UNIONS = (typing.Union, types.UnionType)


# --- annotations as written -------------------------------------------------------------------


def resolve(annotation: Any, names: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> Any:
    """The annotation without strings in it, or UNRESOLVED while one of its names is unknown.

    Each is evaluated apart: `get_type_hints` loses all when one name exists for type checkers only.
    """
    if type(annotation) is type or not holds_text(annotation):
        return annotation
    holder = SimpleNamespace(__annotations__={"it": annotation})
    try:
        spaces = names()
        found = typing.get_type_hints(holder, *spaces, include_extras=True)["it"]
        _evaluate_aliases(found, set())
    except (Exception, SystemExit):  # noqa: BLE001  (any expression, which may fail in any way)
        return UNRESOLVED
    return found


def _evaluate_aliases(annotation: Any, seen: set[int]) -> None:
    """Raise while `type Pair = …` cannot be evaluated: that happens as late as for strings."""
    if id(annotation) in seen:
        return
    seen.add(id(annotation))
    if is_alias(annotation):
        _evaluate_aliases(annotation.__value__, seen)
    for part in typing.get_args(annotation):
        for each in part if isinstance(part, list) else (part,):
            _evaluate_aliases(each, seen)


def is_alias(annotation: Any) -> bool:
    """Whether it was made by a `type` statement; with arguments, too."""
    kinds = (type(annotation).__name__, type(typing.get_origin(annotation)).__name__)
    return "TypeAliasType" in kinds


def holds_text(annotation: Any) -> bool:
    """Whether there is something in it that still has to be evaluated."""
    try:
        return _cached_holds_text(annotation)
    except Exception:  # noqa: BLE001  (it cannot be hashed)
        return _holds_text(annotation)


def _holds_text(annotation: Any) -> bool:
    if isinstance(annotation, (str, typing.ForwardRef)) or is_alias(annotation):
        return True
    if typing.get_origin(annotation) is Literal:
        return False
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        arguments = arguments[:1]
    return any(
        _holds_text(each) for part in arguments
        for each in (part if isinstance(part, list) else (part,))
    )  # fmt: skip


_cached_holds_text = lru_cache(maxsize=8192)(_holds_text)
_QUALIFIED = re.compile(r"(?:\w+\.)+(?=\w)")
_LOCAL = re.compile(r"[\w.<>]+<locals>\.")


def text_of(annotation: Any) -> str:
    """The annotation as one would write it, without module names: the same on every host."""
    if annotation is EMPTY:
        return ""
    if annotation is None or annotation is type(None):
        return "None"
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, (TypeVar, NewType)):
        return annotation.__name__
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__qualname__.rpartition("<locals>.")[2]
    if typing.get_origin(annotation) in UNIONS:
        return " | ".join(map(text_of, typing.get_args(annotation)))
    text = repr(annotation).replace("ForwardRef(", "(").replace("NoneType", "None")
    return _QUALIFIED.sub("", _LOCAL.sub("", text))


def forget() -> None:
    """Drop what the caches hold: a class that was unloaded must be able to die."""
    _cached_holds_text.cache_clear()
    for clear in getattr(typing, "_cleanups", ()):  # List[X] and Generic[X] are remembered there
        clear()
