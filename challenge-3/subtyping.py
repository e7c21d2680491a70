"""Is every value of one annotation a value of another? Yes, no, or not known (`None`).

What is not known is never held against a class: `Any`, a missing annotation, and whatever this
file has no rule for pass.
"""

import collections
import collections.abc as abc
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NewType, TypeVar

EMPTY: Any = type("EMPTY", (), {"__repr__": lambda _: "<no annotation>"})()
UNRESOLVED: Any = type("UNRESOLVED", (), {"__repr__": lambda _: "<not resolvable yet>"})()

_UNIONS = (typing.Union, types.UnionType)
_WRAPPERS = (typing.ClassVar, typing.Final, typing.Required, typing.NotRequired)
_PROMOTIONS = {(int, float), (int, complex), (float, complex)}
_MAPPINGS = (abc.Mapping,)
# How the parameters of the generic types of the standard library vary: i(nvariant), c(ovariant).
_VARIANCE: dict[type, str] = {
    list: "i", set: "i", collections.deque: "i", abc.MutableSequence: "i", abc.MutableSet: "i",
    dict: "ii", collections.defaultdict: "ii", collections.OrderedDict: "ii",
    collections.ChainMap: "ii", abc.MutableMapping: "ii", collections.Counter: "i",
    abc.Mapping: "ic",
}  # fmt: skip


def assignable(source: Any, target: Any) -> bool | None:
    """Whether a value annotated `source` may stand where `target` is expected."""
    try:
        return _cached(source, target)
    except TypeError:  # an annotation that cannot be hashed, such as Literal[[1]]
        return None
    except RecursionError:
        return None


@lru_cache(maxsize=8192)
def _cached(source: Any, target: Any) -> bool | None:
    return _assignable(_plain(source), _plain(target))


def _plain(annotation: Any) -> Any:
    """The annotation without what says nothing about values (Annotated, Final, aliases)."""
    while True:
        if annotation is None:
            return type(None)
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated or origin in _WRAPPERS:
            annotation = typing.get_args(annotation)[0]
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def _assignable(source: Any, target: Any) -> bool | None:
    if source is target or source == target:
        return True
    if target is object:
        return True
    if _says_nothing(source) or _says_nothing(target):
        return None
    if source in (typing.Never, typing.NoReturn):
        return True
    if target in (typing.Never, typing.NoReturn):
        return False
    if typing.get_origin(source) in _UNIONS:
        return _all(assignable(arm, target) for arm in typing.get_args(source))
    if typing.get_origin(source) is Literal:
        return _all(_literal(value, target) for value in typing.get_args(source))
    if typing.get_origin(target) in _UNIONS:
        return _any(assignable(source, arm) for arm in typing.get_args(target))
    if typing.get_origin(target) is Literal:
        if source is bool:
            return _all(_literal(value, target) for value in (True, False))
        return False if isinstance(source, type) else None
    if isinstance(source, NewType):
        return assignable(source.__supertype__, target)
    if isinstance(target, NewType):
        return False
    return _nominal(source, target)


def _says_nothing(annotation: Any) -> bool:
    if annotation is Any or annotation is EMPTY or annotation is UNRESOLVED:
        return True
    return isinstance(annotation, (TypeVar, str, typing.ForwardRef, typing.ParamSpec))


def _all(answers: Any) -> bool | None:
    """No if one says no, else not known if one does not know."""
    known = list(answers)
    return False if False in known else None if None in known else True


def _any(answers: Any) -> bool | None:
    known = list(answers)
    return True if True in known else None if None in known else False


def _literal(value: Any, target: Any) -> bool | None:
    if typing.get_origin(target) in _UNIONS:
        return _any(_literal(value, arm) for arm in typing.get_args(target))
    if typing.get_origin(target) is Literal:
        return any(type(v) is type(value) and v == value for v in typing.get_args(target))
    return assignable(type(value), target)


def _nominal(source: Any, target: Any) -> bool | None:
    source_class: Any = typing.get_origin(source) or source
    target_class: Any = typing.get_origin(target) or target
    if not (_is_class(source_class) and _is_class(target_class)):
        return None
    if target_class is abc.Callable:
        return _callable(source, target, source_class)
    if source_class is abc.Callable:
        return False if target_class in (int, str, float, bool, bytes, list, dict) else None
    if (source_class, target_class) in _PROMOTIONS:
        return True
    if typing.is_typeddict(source_class) and not typing.is_typeddict(target_class):
        return None if issubclass(dict, target_class) else False
    if typing.is_typeddict(target_class):
        return None if typing.is_typeddict(source_class) else False
    if getattr(target_class, "_is_protocol", False):
        return _protocol(source_class, target_class)
    if not _is_subclass(source_class, target_class):
        return False
    wanted = typing.get_args(target)
    if not wanted:
        return True
    if target_class is tuple:
        return _tuple(source, wanted)
    given = _arguments_as(source, source_class, target_class)
    if given is None or len(given) != len(wanted):
        return None
    return _all(
        _same(have, want) if how == "i" else _contra(have, want) if how == "-"
        else assignable(have, want)
        for have, want, how in zip(given, wanted, _variance(target_class, wanted), strict=True)
    )  # fmt: skip


def _is_class(value: Any) -> bool:
    return isinstance(value, type)


def _is_subclass(source: type, target: type) -> bool:
    try:
        return issubclass(source, target)
    except TypeError:  # a metaclass with its own opinion
        return target in source.__mro__


def _same(one: Any, other: Any) -> bool | None:
    return _all((assignable(one, other), assignable(other, one)))


def _contra(have: Any, want: Any) -> bool | None:
    return assignable(want, have)


def _variance(target: type, arguments: tuple[Any, ...]) -> str:
    if target in _VARIANCE:
        return _VARIANCE[target]
    parameters = getattr(target, "__parameters__", ())
    if len(parameters) == len(arguments) and parameters:
        return "".join(
            "c" if getattr(p, "__covariant__", False)
            else "-" if getattr(p, "__contravariant__", False)
            else "c" if getattr(p, "__infer_variance__", False)
            else "i"
            for p in parameters
        )  # fmt: skip
    return "c" * len(arguments)


def _tuple(source: Any, wanted: tuple[Any, ...]) -> bool | None:
    given = typing.get_args(source)
    if not given and source is tuple:
        return None
    if not given and typing.get_origin(source) is not tuple:
        return None  # a named tuple: its fields would have to be read
    if len(wanted) == 2 and wanted[1] is Ellipsis:
        items = given[:1] if len(given) == 2 and given[1] is Ellipsis else given
        return _all(assignable(item, wanted[0]) for item in items)
    if len(given) == 2 and given[1] is Ellipsis:
        return False
    if len(given) != len(wanted):
        return False
    return _all(assignable(have, want) for have, want in zip(given, wanted, strict=True))


def _callable(source: Any, target: Any, source_class: Any) -> bool | None:
    if source_class is not abc.Callable:
        callable_ = any("__call__" in vars(base) for base in source_class.__mro__)
        return None if callable_ else False
    wanted, given = typing.get_args(target), typing.get_args(source)
    if not wanted or not given:
        return None
    result = assignable(given[-1], wanted[-1])
    if not isinstance(wanted[0], list) or not isinstance(given[0], list):
        return _all((result, None))
    if len(wanted[0]) != len(given[0]):
        return False
    pairs = zip(wanted[0], given[0], strict=True)
    return _all((result, *(assignable(want, have) for want, have in pairs)))


def _protocol(source: type, target: type) -> bool | None:
    """By name only: a protocol's signatures are beyond what an annotation promises."""
    if target in source.__mro__:
        return True
    names: set[str] = set()
    for base in target.__mro__:
        if getattr(base, "_is_protocol", False) and base is not typing.Protocol:
            names.update(n for n, v in vars(base).items() if callable(v) and n[:5] != "__ini")
            names.discard("__subclasshook__")
            names.discard("__class_getitem__")
    provided = {name for base in source.__mro__ for name in vars(base)}
    return None if names <= provided else False


def _arguments_as(source: Any, source_class: type, target: type) -> tuple[Any, ...] | None:
    """The arguments of `source` seen as its base `target`: dict[str, int] as Iterable is (str,)."""
    arguments = typing.get_args(source)
    if source_class is target:
        return arguments or None
    if (found := _declared(source_class, target, arguments)) is not None:
        return found
    if source_class is tuple:
        items = tuple(item for item in arguments if item is not Ellipsis)
        return (typing.Union[items],) if items else None  # noqa: UP007  (built from a tuple)
    if source_class is str:
        return (str,)
    if source_class in (bytes, bytearray, range):
        return (int,)
    if not arguments:
        return None
    if source_class is collections.Counter and issubclass(target, abc.Mapping):
        return (arguments[0], int)
    if source_class in (abc.Generator, abc.AsyncGenerator):
        return arguments[:1]
    if source_class is abc.Coroutine:
        return arguments[-1:]
    if issubclass(source_class, _MAPPINGS) and not issubclass(target, _MAPPINGS):
        return arguments[:1] if issubclass(abc.Collection, target) else None
    if source_class.__module__ in ("builtins", "collections", "collections.abc", "typing"):
        return arguments
    return None


def _declared(source: type, target: type, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Through what classes say about their bases (`class Rows(list[Row])`)."""
    values = dict(zip(getattr(source, "__parameters__", ()), arguments, strict=False))
    for base in vars(source).get("__orig_bases__", ()):
        origin = typing.get_origin(base)
        if origin in (typing.Generic, typing.Protocol) or not isinstance(origin, type):
            continue
        inner = substitute(base, values)
        if origin is target:
            return typing.get_args(inner)
        if _is_subclass(origin, target):
            return _arguments_as(inner, origin, target)
    for plain in source.__bases__:
        if plain is not object and "__orig_bases__" not in vars(source) and target in plain.__mro__:
            return _arguments_as(plain, plain, target)
    return None


# --- type variables ---------------------------------------------------------------------------


def substitute(annotation: Any, values: Mapping[Any, Any]) -> Any:
    """The annotation with type variables replaced."""
    if not values:
        return annotation
    if isinstance(annotation, TypeVar):
        return values.get(annotation, annotation)
    parameters = getattr(annotation, "__parameters__", ())
    if not parameters or isinstance(annotation, type):
        return annotation
    try:
        return annotation[tuple(values.get(p, p) for p in parameters)]
    except TypeError:  # a parameter specification, or a value that is no type
        return annotation


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
                given = (substitute(argument, values) for argument in typing.get_args(base))
                inner = dict(zip(getattr(origin, "__parameters__", ()), given, strict=False))
                found.setdefault(origin, {}).update(inner)
                walk(origin, inner)

    walk(cls, {})
    return found


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
        return typing.get_type_hints(holder, *spaces, include_extras=True)["it"]
    except Exception:  # noqa: BLE001  (an annotation may be any expression, and fail in any way)
        return UNRESOLVED


def holds_text(annotation: Any) -> bool:
    """Whether there are strings in it that still have to be evaluated."""
    try:
        return _cached_holds_text(annotation)
    except TypeError:  # it cannot be hashed
        return _holds_text(annotation)


def is_plain(annotation: Any) -> bool:
    """Whether it means the same wherever it stands: no strings, no type variables, no Self."""
    if type(annotation) is type:
        return True
    if annotation is typing.Self or isinstance(annotation, TypeVar):
        return False
    return not getattr(annotation, "__parameters__", ()) and not holds_text(annotation)


def _holds_text(annotation: Any) -> bool:
    if isinstance(annotation, (str, typing.ForwardRef)):
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
    if typing.get_origin(annotation) in _UNIONS:
        return " | ".join(map(text_of, typing.get_args(annotation)))
    text = repr(annotation).replace("ForwardRef(", "(").replace("NoneType", "None")
    return _QUALIFIED.sub("", _LOCAL.sub("", text))


def awaited(annotation: Any) -> Any:
    """What `await` gives for a value annotated so: EMPTY when not awaitable or not known."""
    annotation = _plain(annotation)
    origin = typing.get_origin(annotation) or annotation
    arguments = typing.get_args(annotation)
    if isinstance(origin, type) and _is_subclass(origin, abc.Awaitable):
        if origin is abc.Coroutine:
            return arguments[2] if len(arguments) == 3 else EMPTY
        return arguments[0] if len(arguments) == 1 else EMPTY
    return EMPTY


def is_awaitable(annotation: Any) -> bool:
    """Whether the annotation promises something to await."""
    annotation = _plain(annotation)
    origin = typing.get_origin(annotation) or annotation
    return isinstance(origin, type) and _is_subclass(origin, abc.Awaitable)


def has_awaitable_arm(annotation: Any) -> bool:
    """Whether a union leaves it to the implementation to be async (`int | Awaitable[int]`)."""
    annotation = _plain(annotation)
    if typing.get_origin(annotation) not in _UNIONS:
        return False
    return any(map(is_awaitable, typing.get_args(annotation)))


def is_iterator(annotation: Any) -> bool:
    """Whether a generator may be returned for it."""
    origin = typing.get_origin(_plain(annotation)) or _plain(annotation)
    if origin is Any or not isinstance(origin, type):
        return False
    bases = (abc.Generator, abc.AsyncGenerator)
    return origin is not object and any(_is_subclass(base, origin) for base in bases)


def forget() -> None:
    """Drop what the caches hold: a class that was unloaded must be able to die."""
    _cached.cache_clear()
    _cached_holds_text.cache_clear()
    for clear in getattr(typing, "_cleanups", ()):  # List[X] and Generic[X] are remembered there
        clear()
