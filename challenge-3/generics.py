"""What type variables stand for: of classes in their bases, of functions, and of aliases."""

import collections.abc as abc
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar, TypeVarTuple

import typing_extensions

from annotations import EMPTY, UNIONS, holds_text

UNPACKS = (typing.Unpack, typing_extensions.Unpack)
_VARIABLES = (TypeVar, TypeVarTuple, typing.ParamSpec)


def substitute(annotation: Any, values: Mapping[Any, Any]) -> Any:
    """The annotation with type variables of all kinds, and Self, replaced."""
    if not values or type(annotation) is type or not holds_variables(annotation):
        return annotation
    if isinstance(annotation, (TypeVar, typing.ParamSpec)) or annotation is typing.Self:
        return values.get(annotation, annotation)
    try:
        return _rebuilt(annotation, values)
    except TypeError:  # it cannot be made of such arguments
        return annotation


def is_plain(annotation: Any) -> bool:
    """Whether it means the same wherever it stands: no strings, no type variables, no Self."""
    if type(annotation) is type or annotation is EMPTY:
        return True
    try:
        return _cached_is_plain(annotation)
    except Exception:  # noqa: BLE001  (it cannot be hashed)
        return False


@lru_cache(maxsize=8192)
def _cached_is_plain(annotation: Any) -> bool:
    return not holds_text(annotation) and not holds_variables(annotation)


def holds_variables(annotation: Any) -> bool:
    """Whether there is anything in it that may be replaced."""
    try:
        return _cached_holds_variables(annotation)
    except Exception:  # noqa: BLE001  (it cannot be hashed)
        return True


@lru_cache(maxsize=8192)
def _cached_holds_variables(annotation: Any) -> bool:
    if annotation is typing.Self or isinstance(annotation, _VARIABLES):
        return True
    if typing.get_origin(annotation) is Literal:
        return False
    return any(
        holds_variables(each)
        for part in typing.get_args(annotation)
        for each in (part if isinstance(part, list) else (part,))
    )


def _rebuilt(annotation: Any, values: Mapping[Any, Any]) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None or origin is Literal or not arguments:
        return annotation
    if origin is typing.Annotated:
        return typing.Annotated[(substitute(arguments[0], values), *arguments[1:])]
    if origin is abc.Callable:
        takes = arguments[0]
        if isinstance(takes, list):
            takes = _spread(takes, values)
        elif takes is not Ellipsis:
            takes = substitute(takes, values)
        return Callable[list(takes) if isinstance(takes, tuple) else takes,
                        substitute(arguments[-1], values)]  # fmt: skip
    if origin in UNPACKS and isinstance(given := values.get(arguments[0]), tuple):
        return typing.Unpack[tuple.__class_getitem__(given)]
    new = tuple(_spread(arguments, values))
    if new == arguments:
        return annotation
    return typing.Union[new] if origin in UNIONS else origin[new]  # noqa: UP007


def _spread(arguments: Iterable[Any], values: Mapping[Any, Any]) -> list[Any]:
    """Each replaced; a starred type variable tuple by all that it stands for."""
    found: list[Any] = []
    for each in arguments:
        inner = typing.get_args(each)[0] if typing.get_origin(each) in UNPACKS else None
        if isinstance(inner, TypeVarTuple) and isinstance(values.get(inner), tuple):
            found.extend(values[inner])
        else:
            found.append(substitute(each, values))
    return found


def bound_to(parameters: Sequence[Any], arguments: Sequence[Any]) -> dict[Any, Any]:
    """Which argument stands for which parameter; for a type variable tuple it is a tuple."""
    places = [i for i, each in enumerate(parameters) if isinstance(each, TypeVarTuple)]
    if places and arguments:
        first, behind = places[0], len(parameters) - places[0] - 1
        last = max(first, len(arguments) - behind)
        arguments = (*arguments[:first], tuple(arguments[first:last]), *arguments[last:])
    return dict(zip(parameters, arguments, strict=False))


def upper_bound(variable: TypeVar) -> Any:
    """The type of everything that a type variable may stand for; EMPTY when it is not known."""
    try:
        if variable.__constraints__:
            return typing.Union[variable.__constraints__]  # noqa: UP007
        bound = variable.__bound__
    except Exception:  # noqa: BLE001  (a bound of `class P[T: …]` is evaluated only now)
        return EMPTY
    return object if bound is None else EMPTY if holds_text(bound) else bound


def type_arguments(cls: type) -> dict[type, dict[Any, Any]]:
    """What the type variables of each generic base stand for, as seen from `cls`."""
    found: dict[type, dict[Any, Any]] = {}

    def walk(owner: type, values: Mapping[Any, Any]) -> None:
        for base in vars(owner).get("__orig_bases__", owner.__bases__):
            origin = typing.get_origin(base)
            if origin is None:
                if isinstance(base, type) and base is not object:
                    walk(base, {})
            elif isinstance(origin, type) and origin not in (typing.Generic, typing.Protocol):
                given = _spread(typing.get_args(base), values)
                inner = bound_to(getattr(origin, "__parameters__", ()), given)
                found.setdefault(origin, {}).update(inner)
                walk(origin, inner)

    walk(cls, {})
    return found


def forget() -> None:
    """Drop what the caches hold: a class that was unloaded must be able to die."""
    _cached_holds_variables.cache_clear()
    _cached_is_plain.cache_clear()
