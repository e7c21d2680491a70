"""Is a value of one annotation a value of another? Yes, no, or not known."""

import collections
import collections.abc as abc
import enum
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    LiteralString,
    NamedTuple,
    Never,
    NewType,
    Protocol,
    TypedDict,
    TypeVar,
)

import pytest

from annotations import EMPTY, resolve, text_of
from generics import substitute, type_arguments
from subtyping import assignable, awaited

pytestmark = pytest.mark.unit

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
UserId = NewType("UserId", int)


class Animal: ...


class Cat(Animal): ...


class Color(enum.Enum):
    RED = 1


class Shade(enum.StrEnum):
    DARK = "dark"


class Point(NamedTuple):
    x: int
    label: str


class Movie(TypedDict):
    title: str


class Box(Generic[T]): ...


class Source(Generic[T_co]): ...


class Sink(Generic[T_contra]): ...


class Rows(list[Cat]): ...


class Speaks(Protocol):
    def speak(self) -> str: ...


class Dog:
    def speak(self) -> str:
        return "woof"


YES, NO, UNKNOWN = True, False, None
CASES: list[tuple[Any, Any, bool | None]] = [
    (int, int, YES), (bool, int, YES), (int, bool, NO), (int, float, YES), (int, complex, YES),
    (float, int, NO), (str, object, YES), (None, type(None), YES), (None, int, NO),
    (Any, int, UNKNOWN), (int, Any, UNKNOWN), (EMPTY, int, UNKNOWN), (Never, int, YES),
    (int, Never, NO), (Cat, Animal, YES), (Animal, Cat, NO), (Color, Color, YES),
    (int, int | str, YES), (int | str, int, NO), (int | None, int, NO), (int, float | None, YES),
    (int | str, str | int | None, YES), (int | Any, int, UNKNOWN), (str, int | Any, UNKNOWN),
    (Literal["a"], str, YES), (Literal["a"], Literal["a", "b"], YES),
    (Literal["a", "c"], Literal["a", "b"], NO), (str, Literal["a"], NO), (Literal[1], bool, NO),
    (Literal[True], Literal[1], NO), (bool, Literal[True, False], YES),
    (Literal["a", 1], str | int, YES), (Literal[1], float, YES),
    (Annotated[int, "x"], int, YES), (int, Annotated[float, "x"], YES), (Final[int], int, YES),
    (UserId, int, YES), (int, UserId, NO), (UserId, UserId, YES),
    (list[int], list[int], YES), (list[bool], list[int], NO), (list[int], list[Any], UNKNOWN),
    (list[int], Sequence[int], YES), (list[bool], Sequence[int], YES), (list, list[int], UNKNOWN),
    (list[int], list, YES), (list[str], Sequence[int], NO), (set[int], abc.Set[float], YES),
    (dict[str, int], Mapping[str, float], YES), (dict[str, int], dict[str, float], NO),
    (dict[str, int], Mapping[object, int], NO), (dict[str, int], Iterable[str], YES),
    (dict[str, int], Iterable[int], NO), (collections.OrderedDict[str, int], dict[str, int], YES),
    (dict[str, int], collections.OrderedDict[str, int], NO),
    (collections.Counter[str], Mapping[str, int], YES),
    (collections.Counter[str], Mapping[str, str], NO),
    (str, Sequence[str], YES), (str, Sequence[int], NO), (bytes, Iterable[int], YES),
    (range, Sequence[int], YES), (str, list[str], NO),
    (tuple[int, str], tuple[int, str], YES), (tuple[int, str], tuple[int, ...], NO),
    (tuple[int, bool], tuple[int, ...], YES), (tuple[int, ...], tuple[int, int], NO),
    (tuple[int, ...], tuple[float, ...], YES), (tuple[int], tuple[int, int], NO),
    (tuple[int, str], Sequence[int | str], YES), (tuple, tuple[int], UNKNOWN),
    (type[Cat], type[Animal], YES), (type[Animal], type[Cat], NO),
    (Callable[[Animal], Cat], Callable[[Cat], Animal], YES),
    (Callable[[Cat], Cat], Callable[[Animal], Cat], NO),
    (Callable[[int], int], Callable[[int, int], int], NO),
    (Callable[..., int], Callable[[int], int], UNKNOWN), (Callable[..., int], int, NO),
    (int, Callable[[], int], NO), (Dog, Callable[[], int], NO),
    (abc.Generator[int, None, None], abc.Iterator[int], YES),
    (abc.AsyncGenerator[int, None], AsyncIterator[float], YES),
    (Coroutine[Any, Any, int], Awaitable[int], YES), (Coroutine[Any, Any, int], Awaitable[str], NO),
    (Box[int], Box[int], YES), (Box[bool], Box[int], NO), (Source[bool], Source[int], YES),
    (Sink[int], Sink[bool], YES), (Sink[bool], Sink[int], NO),
    (Rows, list[Cat], YES), (Rows, list[Animal], NO), (Rows, Iterable[Animal], YES),
    (Movie, dict, UNKNOWN), (Movie, list, NO), (dict[str, Any], Movie, NO), (Movie, Movie, YES),
    (Dog, Speaks, UNKNOWN), (Cat, Speaks, NO), (T, int, UNKNOWN), (int, T, UNKNOWN),
    (Literal[1], int | T, YES), ("Later", int, UNKNOWN),
    (list[int], Literal[1], NO), (UserId, Literal[1], NO), (Callable[[int], int], Literal[1], NO),
    (Callable[..., int], Sequence[int], NO), (Callable[..., int], abc.Hashable, YES),
    (Callable[..., int], Speaks, NO), (LiteralString, str, YES), (LiteralString, int, NO),
    (LiteralString, list[str] | None, NO), (Shade, Sequence[str], YES), (Shade, Sequence[int], NO),
    (memoryview, Sequence[int], YES), (memoryview, Sequence[str], NO),
    (abc.ItemsView[str, int], Iterable[tuple[str, int]], YES),
    (abc.ItemsView[str, int], Iterable[str], NO), (abc.KeysView[str], Iterable[str], YES),
    (Point, tuple[int, str], YES), (Point, tuple[int, int], NO), (Point, tuple[int], NO),
    (Point, Sequence[int | str], YES), (Point, Iterable[int], NO), (Point, tuple, YES),
    (tuple[int, ...], tuple[int, *tuple[int, ...]], NO),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "expected"), CASES)
def test_a_value_of_one_is_a_value_of_the_other(
    source: Any, target: Any, expected: bool | None
) -> None:
    assert assignable(source, target) is expected


def test_what_cannot_be_hashed_is_not_known() -> None:
    assert assignable(Annotated[int, []], int) in (None, True)


def test_each_annotation_is_resolved_apart() -> None:
    def names() -> tuple[dict[str, Any], dict[str, Any]]:
        return {"Cat": Cat}, {}

    assert resolve("Cat", names) is Cat
    assert resolve(list["Cat"], names) == list[Cat]
    assert repr(resolve("Dogs", names)) == "<not resolvable yet>"
    assert resolve(Literal["Dogs"], names) == Literal["Dogs"]
    assert resolve("1 / 0", names) is not None
    assert resolve(Callable[["Cat"], int], names) == Callable[[Cat], int]


def test_type_variables_are_followed_through_bases() -> None:
    class Pair(Box[list[T]], Generic[T]): ...

    class Cats(Pair[Cat]): ...

    assert type_arguments(Cats)[Box] == {T: list[Cat]}
    generic: Any = dict[str, T]  # type: ignore[valid-type]
    assert substitute(generic, {T: int}) == dict[str, int]
    assert substitute(T, {}) is T


def test_what_is_awaited() -> None:
    assert awaited(Coroutine[Any, Any, int]) is int
    assert awaited(Awaitable[str]) is str
    assert awaited(int) is EMPTY
    assert awaited(Coroutine) is EMPTY


@pytest.mark.parametrize(
    ("annotation", "text"),
    [(int, "int"), (None, "None"), (dict[str, Cat], "dict[str, Cat]"), (int | None, "int | None"),
     (list["Cat"], "list['Cat']"), (UserId, "UserId"),
     (collections.OrderedDict[str, Any], "OrderedDict[str, Any]"), (T, "T"), ("a.b", "a.b"),
     (EMPTY, "")],
)  # fmt: skip
def test_annotations_are_shown_without_modules(annotation: Any, text: str) -> None:
    assert text_of(annotation) == text
