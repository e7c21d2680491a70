"""`LazyCollection`: a source and a tuple of operations, and nothing that runs before it is asked.

    LazyCollection(range(10**9)).filter(lambda n: n % 2 == 0).map(str).take(3).collect()

Every operation returns a new collection; the chains that grow from one base never disturb each
other. What runs is ONE generator function per chain, generated for its shape (`compiler.py`).
"""

import builtins
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from inspect import CO_COROUTINE
from os import PathLike
from types import FunctionType
from typing import Any, Generic, Self, TypeGuard, TypeVar, overload

from caching import CachedSource
from compiler import MAX_REPLACED_LOOPS, MISSING, gather, iterate, replaced_loops
from explaining import Explanation, describe_plan, explain
from expressions import Expr, col, record
from files import CsvFile, NdjsonFile, write_csv, write_ndjson
from notes import shorten
from pages import Page
from sources import Op, Source, depth_of

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")
K = TypeVar("K")

MAX_DEPTH = 100  # caches and `through` in one another: some 600 of Python's 1000 frames

# What changes neither number nor order of the elements.
_LENGTH_KEEPING = frozenset({"map", "tap", "enumerate", "scan", "keyed", "row"})


class EmptyCollectionError(IndexError, ValueError):
    """The first or last element of a collection without elements was asked for."""


class LazyCollection(Generic[T]):
    """Elements to come: from an iterable, or from a function without arguments that returns one.

    An iterator can be read once; a second reading raises `SourceExhaustedError`. With `cache=True`
    the elements are kept as they come. Sources are closed as soon as reading ends, also early.
    """

    __slots__ = ("_ops", "_source")
    _ops: tuple[Op, ...]
    _source: Source

    def __init__(
        self, source: Iterable[T] | Callable[[], Iterable[T]], cache: bool = False
    ) -> None:
        self._source = Source(source)
        self._ops = ()
        if cache:
            self._source = self.cache()._source

    @classmethod
    def of(cls, *elements: U) -> "LazyCollection[U]":
        """A collection of these elements."""
        return LazyCollection(elements)

    @staticmethod
    def from_ndjson(
        path: str | PathLike[str], *, bad_lines: str = "raise"
    ) -> "LazyCollection[Any]":
        """One JSON value per line, read as it is needed; `.gz` files are unpacked on the way.

        A bad line raises an error that names it, or is skipped with `bad_lines="skip"`.
        """
        return LazyCollection(NdjsonFile(path, bad_lines))

    @staticmethod
    def from_csv(
        path: str | PathLike[str], *, bad_lines: str = "raise", delimiter: str = ","
    ) -> "LazyCollection[dict[str, str]]":
        """One dict of texts per record, named by the header line; otherwise like `from_ndjson`."""
        return LazyCollection(CsvFile(path, bad_lines, delimiter))

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations, each a tuple of its name and arguments."""
        return self._ops

    def _then(self, *op: Any) -> Any:
        new = _new(self.__class__)
        new._source = self._source
        new._ops = self._ops + (op,)  # noqa: RUF005
        return new

    # --- element by element -------------------------------------------------------------------

    @overload
    def map(self, function: Expr) -> "LazyCollection[Any]": ...
    @overload
    def map(self, function: Callable[[T], U]) -> "LazyCollection[U]": ...
    def map(self, function: Any) -> Any:
        """What the function makes of each element."""
        if not callable(function):
            _function("map", function)
        new = _new(self.__class__)  # as in _then, without the calls
        new._source = self._source
        new._ops = self._ops + (("map", function),)  # noqa: RUF005  (a third faster)
        return new

    @overload
    def filter(self, predicate: Callable[[T], TypeGuard[U]]) -> "LazyCollection[U]": ...
    @overload
    def filter(self, predicate: Expr) -> Self: ...
    @overload
    def filter(self, predicate: Callable[[T], Any]) -> Self: ...
    def filter(self, predicate: Any) -> Any:
        """The elements for which the predicate holds."""
        if not callable(predicate):
            _function("filter", predicate)
        if type(predicate) is FunctionType and predicate.__code__.co_flags & CO_COROUTINE:
            raise TypeError("filter() cannot wait for an async function: all would pass.")
        new = _new(self.__class__)
        new._source = self._source
        new._ops = self._ops + (("filter", predicate),)  # noqa: RUF005
        return new

    def select(self, *columns: str | Expr, **named: Any) -> "LazyCollection[dict[str, Any]]":
        """A dict of these fields for each record: `select("id", total=col("price") * 2)`."""
        fields: dict[str, Expr] = {}
        for column in columns:
            expr = col(column) if isinstance(column, str) else column
            if not isinstance(expr, Expr):
                raise TypeError(f"select() takes names and expressions, not {type(expr).__name__}.")
            if expr.op not in ("col", "get", "alias"):
                raise ValueError(f"select({expr}): give it a name, as in select(total={expr}).")
            fields[expr.args[1] if expr.op == "alias" else expr.args[0]] = expr
        for name, expr in named.items():
            fields[name] = expr if isinstance(expr, Expr) else Expr("lit", expr)
        if not fields:
            raise ValueError("select() needs at least one field.")
        return self._then("map", record(fields))  # type: ignore[no-any-return]

    def flat_map(self, function: Callable[[T], Iterable[U]]) -> "LazyCollection[U]":
        """The elements of what the function makes of each element, one after the other."""
        return self._then("flat_map", _function("flat_map", function))  # type: ignore[no-any-return]

    def tap(self, function: Callable[[T], Any]) -> Self:
        """The same elements; the function sees each as it passes."""
        return self._then("tap", _function("tap", function))  # type: ignore[no-any-return]

    def distinct(
        self, key: Callable[[T], Any] | Expr | None = None, *, max_keys: int | None = None
    ) -> Self:
        """The first element of each kind.

        The kinds seen are kept in memory: over `max_keys` of them raise `TooManyKeysError`.
        """
        if key is not None:
            _function("distinct", key)
        if max_keys is not None:
            check_number("distinct", "max_keys", max_keys, 1)
        return self._then("distinct", key, max_keys)  # type: ignore[no-any-return]

    def enumerate(self, start: int = 0) -> "LazyCollection[tuple[int, T]]":
        """Pairs of a running number and the element."""
        if not isinstance(start, int) or isinstance(start, bool):
            raise TypeError(f"enumerate(start): a whole number is needed, not {start!r}.")
        return self._then("enumerate", start)  # type: ignore[no-any-return]

    def scan(self, function: Callable[[U, T], U], init: U = MISSING) -> "LazyCollection[U]":
        """Running results, one per element: `scan(add, 0)` of 1, 2, 3 is 1, 3, 6.

        Without `init` the first element is the first result.
        """
        return self._then("scan", _function("scan", function), init)  # type: ignore[no-any-return]

    def catch(self, *errors: type[Exception], replace: Any = MISSING) -> Self:
        """Leave out the elements for which an operation before it raises one of the errors.

        `replace` takes their place: a value, or a function of the error. It covers the operations
        on single elements since the `catch` before, or since a cache; never the source. What fails
        before a batch, window, zip, concat or sort is left out or replaced in front of it.
        """
        for error in errors:
            if not (isinstance(error, type) and issubclass(error, Exception)):
                raise TypeError(f"catch() takes kinds of Exception, not {shorten(error)}.")
        if replace is not MISSING and (loops := replaced_loops(self._ops)) > MAX_REPLACED_LOOPS:
            raise ValueError(
                f"catch(replace=…) covers {loops:,} flat_map operations in a row, and can cover "
                f"{MAX_REPLACED_LOOPS}. Put another catch between them."
            )
        return self._then("catch", errors or (Exception,), replace)  # type: ignore[no-any-return]

    # --- how many, and which ------------------------------------------------------------------

    def take(self, n: int) -> Self:
        """The first n elements; not one more is read."""
        if type(n) is not int or n < 0:
            n = check_number("take", "n", n, 0)
        new = _new(self.__class__)
        new._source = self._source
        new._ops = self._ops + (("take", n),)  # noqa: RUF005
        return new

    def skip(self, n: int) -> Self:
        """The elements after the first n."""
        return self._then("skip", check_number("skip", "n", n, 0))  # type: ignore[no-any-return]

    def slice(self, *bounds: int | None) -> Self:
        """`slice(stop)` or `slice(start, stop[, step])`, with Python's meaning.

        Counting from the end works on a sequence, while operations keep its length.
        """
        if not 1 <= len(bounds) <= 3:
            raise TypeError(f"slice() takes 1 to 3 numbers, not {len(bounds)}.")
        chosen = builtins.slice(*bounds)
        step = check_number("slice", "step", 1 if chosen.step is None else chosen.step, 1)
        least = 0
        if self._source.is_sequence() and self._keeps_length():
            least = -(2**63)
        start = 0 if chosen.start is None else check_number("slice", "start", chosen.start, least)
        stop = None if chosen.stop is None else check_number("slice", "stop", chosen.stop, least)
        return self._then("slice", start, stop, step)  # type: ignore[no-any-return]

    def _keeps_length(self) -> bool:
        return all(
            op[0] in _LENGTH_KEEPING or op[0] in ("take", "skip", "slice") for op in self._ops
        )

    def take_while(self, predicate: Callable[[T], Any] | Expr) -> Self:
        """The elements before the first for which the predicate does not hold."""
        return self._then("take_while", _function("take_while", predicate))  # type: ignore[no-any-return]

    def skip_while(self, predicate: Callable[[T], Any] | Expr) -> Self:
        """The elements from the first on for which the predicate does not hold."""
        return self._then("skip_while", _function("skip_while", predicate))  # type: ignore[no-any-return]

    # --- groups of elements -------------------------------------------------------------------

    def batch(self, size: int, *, strict: bool = False) -> "LazyCollection[list[T]]":
        """Lists of `size` elements; the last may be shorter, which `strict` makes an error."""
        size = min(check_number("batch", "size", size, 1), sys.maxsize)
        return self._then("batch", size, bool(strict))  # type: ignore[no-any-return]

    chunk = batch

    def window(self, size: int, step: int = 1) -> "LazyCollection[tuple[T, ...]]":
        """Tuples of `size` neighbours, each `step` further on; only whole ones."""
        size = min(check_number("window", "size", size, 1), sys.maxsize)
        step = min(check_number("window", "step", step, 1), sys.maxsize)
        return self._then("window", size, step)  # type: ignore[no-any-return]

    @overload
    def zip(
        self, other: Iterable[U], /, *, strict: bool = False
    ) -> "LazyCollection[tuple[T, U]]": ...
    @overload
    def zip(
        self, *others: Iterable[Any], strict: bool = False
    ) -> "LazyCollection[tuple[Any, ...]]": ...
    def zip(self, *others: Any, strict: bool = False) -> Any:
        """Tuples of elements at the same place, until one ends; `strict`: all must end together."""
        return self._then("zip", tuple(map(Source, others)), bool(strict))

    def concat(self, *others: Iterable[T]) -> Self:
        """These elements, then those of the others."""
        return self._then("concat", tuple(map(Source, others)))  # type: ignore[no-any-return]

    def sort(self, key: Callable[[T], Any] | Expr | None = None, *, reverse: bool = False) -> Self:
        """The elements in order. MATERIALISES: all of them are read and held before the first.

        By an expression, anything can be sorted: None first, then numbers, then text.
        """
        if key is not None:
            _function("sort", key)
        return self._then("sort", key, bool(reverse))  # type: ignore[no-any-return]

    def through(self, function: Callable[[Iterator[T]], Iterable[U]]) -> "LazyCollection[U]":
        """What a generator function of yours makes of all the elements, read as it asks for them.

        It is called once per iteration, with the iterator of the elements before it.
        """
        self._check_depth("through")
        return self._then("through", _function("through", function))  # type: ignore[no-any-return]

    # --- pages --------------------------------------------------------------------------------

    @overload
    def paginate(self, size: int) -> "LazyCollection[Page[T]]": ...
    @overload
    def paginate(self, size: int, page: int) -> Self: ...
    def paginate(self, size: int, page: int | None = None) -> Any:
        """All pages of this size; with a page number (from 1) the lazy elements of that page."""
        check_number("paginate", "size", size, 1)
        if page is not None:
            check_number("paginate", "page", page, 1)
            return self.skip((page - 1) * size).take(size)
        total = self._length() if self._source.is_sequence() else None
        return self._then("pages", min(size, sys.maxsize), _PageMaker(size, total))

    def page(self, number: int, size: int = 20, *, count: bool = False) -> Page[T]:
        """One page, counted from 1; it reads up to `size` + 1 elements from there.

        A page behind the last is empty. `count=True` also counts all elements, by reading them.
        """
        check_number("page", "number", number, 1)
        check_number("page", "size", size, 1)
        items = self.skip((number - 1) * size).take(size + 1).collect()
        total = self.count() if count else self._length()
        return Page(items[:size], number, size, len(items) > size, total)

    def after(self, cursor: str) -> Self:
        """The elements behind a page of a database's rows: see `DatabaseLazyCollection.after`."""
        del cursor
        raise ValueError(f"after() works on the rows of a database, not on {self!r}.")

    # --- keeping ------------------------------------------------------------------------------

    def cache(self, max_items: int | None = None, *, on_overflow: str = "error") -> Self:
        """Keep the elements as they come, for all collections that grow from this one.

        Each is computed once, also when several iterators and threads read at the same time. Over
        `max_items` it raises `CacheFullError`; with `on_overflow="recompute"` the elements that do
        not fit are computed again for each reader.
        """
        if max_items is not None:
            check_number("cache", "max_items", max_items, 1)
        if on_overflow not in ("error", "recompute"):
            raise ValueError(f'cache(on_overflow): "error" or "recompute", not {on_overflow!r}.')
        self._check_depth("cache")
        source, ops = self._source, self._ops
        buffer = CachedSource(
            lambda skip: iterate(source, (*ops, ("skip", skip)) if skip else ops),
            (source, ops), max_items, recompute=on_overflow == "recompute",
        )  # fmt: skip
        new = _new(type(self))
        new._source = buffer
        new._ops = ()
        return new

    def _check_depth(self, op: str) -> None:
        if depth_of(self._source, self._ops) >= MAX_DEPTH:
            raise ValueError(
                f"{op}(): {MAX_DEPTH} cache and through operations read one another already, each "
                "within the one after it. Make a list of the elements in between."
            )

    # --- results ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[T]:
        return iterate(self._source, self._ops)

    def collect(self) -> list[T]:
        """All elements as a list."""
        return gather(self._source, self._ops)

    def first(self, default: U = MISSING) -> T | U:
        """The first element, or the default; without one, an empty collection is an error."""
        for element in self.take(1):
            return element
        return _or_empty(default, "first")  # type: ignore[no-any-return]

    def last(self, default: U = MISSING) -> T | U:
        """The last element, or the default; it reads all of them."""
        held = deque(self, maxlen=1)
        return held[0] if held else _or_empty(default, "last")

    def count(self) -> int:
        """How many elements there are; it reads all of them."""
        if not self._ops and (size := self._source.size()) is not None:
            return size
        number = 0
        for number, _ in enumerate(self, 1):  # noqa: B007  (it is what is returned)
            pass
        return number

    def is_empty(self) -> bool:
        """Whether there is no element; it reads up to one, which counts as reading the source."""
        return self.first(MISSING_ELEMENT) is MISSING_ELEMENT

    def sum(self, start: Any = 0) -> Any:
        """The sum, as Python's own `sum` computes it."""
        return builtins.sum(iter(self), start)  # type: ignore[arg-type]

    def min(self, key: Callable[[T], Any] | Expr | None = None, default: U = MISSING) -> T | U:
        """The least element, or that with the least key."""
        return self._extreme(builtins.min, key, default)  # type: ignore[no-any-return]

    def max(self, key: Callable[[T], Any] | Expr | None = None, default: U = MISSING) -> T | U:
        """The greatest element, or that with the greatest key."""
        return self._extreme(builtins.max, key, default)  # type: ignore[no-any-return]

    def _extreme(self, choose: Any, key: Any, default: Any) -> Any:
        options = {} if default is MISSING else {"default": (None, default)}
        if key is None:
            return choose(self, **({} if default is MISSING else {"default": default}))
        pairs = self._then("keyed", _function("min or max", key))
        return choose(pairs, key=operator.itemgetter(0), **options)[1]

    @overload
    def reduce(self, function: Callable[[T, T], T]) -> T: ...
    @overload
    def reduce(self, function: Callable[[U, T], U], init: U) -> U: ...
    def reduce(self, function: Any, init: Any = MISSING) -> Any:
        """The elements folded from the left; without `init` an empty collection is a TypeError."""
        results = self._then("reduce", _function("reduce", function), init)
        held = deque(results, maxlen=1)
        if held:
            return held[0]
        if init is MISSING:
            raise TypeError("reduce() of an empty collection needs an init.")
        return init

    def any(self, predicate: Callable[[T], Any] | Expr | None = None) -> bool:
        """Whether the predicate holds for an element; it stops at the first."""
        return self._decide(predicate, True)

    def all(self, predicate: Callable[[T], Any] | Expr | None = None) -> bool:
        """Whether the predicate holds for all elements; it stops at the first exception."""
        return self._decide(predicate, False)

    def _decide(self, predicate: Any, wanted: bool) -> bool:
        values = iter(self if predicate is None else self.map(predicate))
        try:
            return wanted if builtins.any(bool(v) is wanted for v in values) else not wanted
        finally:
            _close(values)

    def group_by(self, key: Callable[[T], K] | Expr) -> dict[K, list[T]]:
        """The elements by key, keys and elements in the order in which they came."""
        groups: dict[K, list[T]] = {}
        for name, element in self._then("keyed", _function("group_by", key)):
            groups.setdefault(name, []).append(element)
        return groups

    def for_each(self, function: Callable[[T], Any]) -> None:
        """Call the function with each element."""
        deque(self._then("tap", _function("for_each", function)), maxlen=0)

    def to_ndjson(self, path: str | PathLike[str]) -> int:
        """Write one JSON value per line; return their number. `.gz` packs.

        The file appears whole or not at all.
        """
        return write_ndjson(path, self)

    def to_csv(self, path: str | PathLike[str]) -> int:
        """Write the records with a header of the first one's fields; return their number."""
        return write_csv(path, self)

    def explain(self, *, analyze: bool = False) -> Explanation:
        """What will run: segments, what is inlined, merged, and done by the source.

        `analyze=True` runs the plan to its end, and adds what left each operation and its time.
        """
        return explain(self._source, self._ops, analyze=analyze)

    # --- like a sequence ----------------------------------------------------------------------

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: builtins.slice) -> Self: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, builtins.slice):
            return self.slice(index.start, index.stop, index.step)
        place = operator.index(index)
        if place < 0:
            length = self._length() if self._source.is_sequence() else None
            if length is None:
                raise ValueError(
                    f"[{place}] counts from an end that is not known; .last() reads all elements."
                )
            place += length
        if place >= 0:
            for element in self.skip(place).take(1):
                return element
        raise IndexError(f"There is no element [{index}].")

    def __contains__(self, value: object) -> bool:
        elements = iter(self)
        try:
            return builtins.any(element is value or element == value for element in elements)
        finally:
            _close(elements)

    def __len__(self) -> int:
        length = self._length()
        if length is None:
            raise TypeError("The length is not known before all is read; .count() reads it.")
        return length

    def _length(self) -> int | None:
        """The number of elements, where source and operations tell it."""
        if (
            not builtins.all(op[0] in _LENGTH_KEEPING or op[0] in _LENGTHS for op in self._ops)
            or (length := self._source.size()) is None
        ):
            return None
        for op in self._ops:
            if op[0] in _LENGTHS:
                length = _LENGTHS[op[0]](length, op)
        return length

    def __bool__(self) -> bool:
        raise TypeError("Whether there are elements needs reading; ask .is_empty().")

    def close(self) -> None:
        """Close the source, and what iterations of it have open."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return describe_plan(type(self).__name__, self._source, self._ops)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self._source, self._ops)


LazyIterator = LazyCollection
MISSING_ELEMENT: Any = object()

_new = object.__new__


def _restored(kind: type, source: Source, ops: tuple[Op, ...]) -> Any:
    new: Any = _new(kind)
    new._source = source
    new._ops = ops
    return new


class _PageMaker:
    """Makes the pages of `paginate`."""

    def __init__(self, size: int, total: int | None) -> None:
        self.size = size
        self.total = total

    def __call__(self, items: list[Any], number: int, has_next: bool) -> Page[Any]:
        return Page(items, number, self.size, has_next, self.total)


_LENGTHS: dict[str, Callable[[int, Op], int]] = {
    "take": lambda n, op: min(n, op[1]),
    "skip": lambda n, op: max(0, n - op[1]),
    "slice": lambda n, op: len(range(n)[op[1] : op[2] : op[3]]),
    "batch": lambda n, op: -(-n // op[1]),
    "sort": lambda n, _op: n,
}


def _function(op: str, function: Any) -> Any:
    if not callable(function):
        raise TypeError(f"{op}() takes a function or an expression, not {shorten(function)}.")
    return function


def check_number(op: str, name: str, value: Any, least: int) -> int:
    """The number as it is, or an error that names operation, argument and value."""
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}({name}={value!r}): {name} must be a whole number.")
        value = operator.index(value)
    if value < least:
        raise ValueError(f"{op}({value}): {name} must be at least {least}.")
    return int(value)


def _or_empty(default: Any, what: str) -> Any:
    if default is MISSING:
        raise EmptyCollectionError(f"The collection is empty: it has no {what} element.")
    return default


def _close(iterator: Any) -> None:
    iterator.close()
