"""Is every value of one annotation a value of another? Yes, no, or not known (`None`).

What is not known is never held against a class: `Any`, a missing annotation, and whatever this
file has no rule for pass.
"""

import collections
import collections.abc as abc
import enum
import typing
from functools import lru_cache
from typing import Any, Literal, NewType, TypeVar, TypeVarTuple

from typing_extensions import is_typeddict

import annotations
import generics
from annotations import EMPTY, UNIONS, UNRESOLVED, is_alias
from generics import UNPACKS, bound_to, substitute

_WRAPPERS = (typing.ClassVar, typing.Final, typing.Required, typing.NotRequired)
_PROMOTIONS: dict[Any, tuple[type, ...]] = {float: (int,), complex: (int, float)}
_MAPPINGS = (abc.Mapping,)
_ANY_TUPLE = (tuple, typing.Tuple)  # noqa: UP006  (its arguments are those of `tuple[()]`)
# How the parameters of generic types of the standard library vary: i(nvariant), c(ovariant), or
# contravariant (-).
_VARIANCE: dict[type, str] = {
    list: "i", set: "i", collections.deque: "i", abc.MutableSequence: "i", abc.MutableSet: "i",
    dict: "ii", collections.defaultdict: "ii", collections.OrderedDict: "ii",
    collections.ChainMap: "ii", abc.MutableMapping: "ii", collections.Counter: "i",
    abc.Mapping: "ic", abc.Generator: "c-c", abc.AsyncGenerator: "c-", abc.Coroutine: "c-c",
}  # fmt: skip


def assignable(source: Any, target: Any) -> bool | None:
    """Whether a value annotated `source` may stand where `target` is expected."""
    try:
        return _cached(source, target)
    except Exception:  # noqa: BLE001  (it cannot be hashed, has no end, or fails in its own way)
        return None


@lru_cache(maxsize=8192)
def _cached(source: Any, target: Any) -> bool | None:
    return _assignable(_plain(source), _plain(target))


def _plain(annotation: Any) -> Any:
    """The annotation without what says nothing about values (Annotated, Final, aliases)."""
    while True:
        if type(annotation) is type:
            return annotation
        if annotation is None:
            return type(None)
        if annotation is typing.LiteralString:
            return str
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated or origin in _WRAPPERS:
            annotation = typing.get_args(annotation)[0]
        elif is_alias(annotation):
            annotation = _behind_alias(annotation)
        else:
            return annotation


def _behind_alias(annotation: Any) -> Any:
    """What `type Pair[T] = …` stands for; its names are looked up only now, and may be missing."""
    alias = typing.get_origin(annotation) or annotation
    try:
        value = alias.__value__
    except Exception:  # noqa: BLE001  (any expression)
        return UNRESOLVED
    return substitute(value, bound_to(alias.__type_params__, typing.get_args(annotation)))


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
    if typing.get_origin(source) in UNIONS:
        return _all(assignable(arm, target) for arm in typing.get_args(source))
    if typing.get_origin(source) is Literal:
        return _all(_literal(value, target) for value in typing.get_args(source))
    if typing.get_origin(target) in UNIONS:
        return _any(assignable(source, arm) for arm in typing.get_args(target))
    if isinstance(source, NewType):
        return assignable(source.__supertype__, target)
    if typing.get_origin(target) is Literal:
        values = _all_values(source)
        if values is not None:
            return _all(_literal(value, target) for value in values)
        return False if _is_class(typing.get_origin(source) or source) else None
    if isinstance(target, NewType):
        return False
    return _nominal(source, target)


def _says_nothing(annotation: Any) -> bool:
    if annotation is Any or annotation is EMPTY or annotation is UNRESOLVED:
        return True
    if isinstance(annotation, type) and Any in annotation.__mro__:
        return True
    return isinstance(annotation, (TypeVar, str, typing.ForwardRef, typing.ParamSpec))


def _all_values(source: Any) -> Any:
    """All values of a type that has few, read without running anything of it."""
    if source is bool:
        return (True, False)
    if source is type(None):
        return (None,)
    if isinstance(source, enum.EnumMeta) and not issubclass(source, enum.Flag):
        return tuple(vars(source)["_member_map_"].values())
    return None


def _all(answers: Any) -> bool | None:
    """No if one says no, else not known if one does not know."""
    known = list(answers)
    return False if False in known else None if None in known else True


def _any(answers: Any) -> bool | None:
    known = list(answers)
    return True if True in known else None if None in known else False


def _literal(value: Any, target: Any) -> bool | None:
    if typing.get_origin(target) in UNIONS:
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
    if source_class is abc.Callable and not getattr(target_class, "_is_protocol", False):
        return _is_subclass(abc.Callable, target_class)
    if _is_subclass(source_class, _PROMOTIONS.get(target_class, ())):
        return True
    if is_typeddict(target_class):
        return _typed_dict(source_class, target_class) if is_typeddict(source_class) else False
    if is_typeddict(source_class):
        return None if issubclass(dict, target_class) else False
    if getattr(target_class, "_is_protocol", False):
        return _protocol(source_class, target_class)
    if not _is_subclass(source_class, target_class):
        return False
    wanted = typing.get_args(target)
    if target_class is tuple and target not in _ANY_TUPLE:
        return _tuple(source, wanted)
    if not wanted:
        return True
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


def _is_subclass(source: type, target: Any) -> bool:
    try:
        return issubclass(source, target)
    except TypeError:  # a metaclass with its own opinion
        return target in source.__mro__


def _typed_dict(source: Any, target: Any) -> bool | None:
    """By its keys, as for type checkers: all that are wanted, of the same types."""
    given, wanted = source.__annotations__, target.__annotations__
    if not (given.keys() >= wanted.keys() and source.__required_keys__ >= target.__required_keys__):
        return False
    return _all(_same(given[key], each) for key, each in wanted.items())


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
    if (fields := _fields_of(source)) is not None:
        source = tuple.__class_getitem__(fields)
    given = typing.get_args(source)
    if typing.get_origin(source) is not tuple or source in _ANY_TUPLE:
        return None
    have, want = _parts(given), _parts(wanted)
    if have is None or want is None:
        return None
    (first, many, last), (wanted_first, wanted_many, wanted_last) = have, want
    if many is EMPTY:
        items, fixed = [*first, *last], len(wanted_first) + len(wanted_last)
        if len(items) < fixed or (wanted_many is EMPTY and len(items) > fixed):
            return False
        between = [wanted_many] * (len(items) - fixed)
        pairs = zip(items, [*wanted_first, *between, *wanted_last], strict=True)
        return _all(assignable(each, other) for each, other in pairs)
    if wanted_many is EMPTY:
        return False
    if len(first) + len(last) < len(wanted_first) + len(wanted_last):
        return False
    if wanted_first or wanted_last:
        return True if have == want else None
    return _all(assignable(each, wanted_many) for each in (*first, many, *last))


def _fields_of(source: Any) -> tuple[Any, ...] | None:
    """The types of what is in a named tuple; of the fields that its own class declares."""
    names = vars(source).get("_fields") if _is_class(source) else None
    if not isinstance(names, tuple):
        return None
    return tuple(vars(source).get("__annotations__", {}).get(name, EMPTY) for name in names)


def _parts(arguments: tuple[Any, ...]) -> tuple[list[Any], Any, list[Any]] | None:
    """What stands before, in and behind the part of any length (EMPTY: there is none)."""
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [], arguments[0], []
    first: list[Any] = []
    last: list[Any] = []
    many: Any = EMPTY
    for each in arguments:
        parts = (
            _parts(typing.get_args(inner)) if (inner := _unpacked(each)) else ([each], EMPTY, [])
        )
        if parts is None or (many is not EMPTY and parts[1] is not EMPTY):
            return None
        if many is EMPTY:
            first += parts[0]
            many, last = parts[1], parts[2]
        else:
            last += [*parts[0], *parts[2]]
    if any(isinstance(each, TypeVarTuple) for each in (*first, *last)):
        return None
    return first, many, last


def _unpacked(annotation: Any) -> Any:
    """The tuple behind a star, or None."""
    if getattr(annotation, "__unpacked__", False):  # *tuple[int, ...]
        return tuple.__class_getitem__(typing.get_args(annotation))
    if typing.get_origin(annotation) in UNPACKS:
        inner = typing.get_args(annotation)[0]
        return tuple.__class_getitem__(inner) if isinstance(inner, TypeVarTuple) else inner
    return None


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
    if (fields := _fields_of(source_class)) is not None:
        source_class, arguments = tuple, fields
    if source_class is tuple:
        if (parts := _parts(arguments)) is None:
            return None
        items = tuple(each for each in (*parts[0], parts[1], *parts[2]) if each is not EMPTY)
        return (typing.Union[items],) if items else None  # noqa: UP007  (built from a tuple)
    if source_class is str:
        return (str,)
    if source_class in (bytes, bytearray, memoryview, range):
        return (int,)
    if not arguments:
        return None
    if source_class is abc.ItemsView:
        return (tuple.__class_getitem__(arguments),)
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
    values = bound_to(getattr(source, "__parameters__", ()), arguments)
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
        if plain is object or "__orig_bases__" in vars(source):
            continue
        if target in plain.__mro__ or (str in plain.__mro__ and _is_subclass(plain, target)):
            return _arguments_as(plain, plain, target)
    return None


# --- what is awaited and iterated --------------------------------------------------------------


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
    if type(annotation) is type:
        return False
    annotation = _plain(annotation)
    if typing.get_origin(annotation) not in UNIONS:
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
    """Drop what the cache holds: a class that was unloaded must be able to die."""
    _cached.cache_clear()
    annotations.forget()
    generics.forget()
