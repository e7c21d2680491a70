"""Not run: read by mypy, which has to find exactly the errors marked, and no other."""

from typing import TypeGuard, assert_type

from lazy import LazyCollection
from utils import Page, col


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int)


def length(text: str) -> int:
    return len(text)


numbers = LazyCollection([1, 2, 3])
words = LazyCollection(lambda: iter(["a", "b"]))
mixed: LazyCollection[int | str] = LazyCollection([1, "a"])

assert_type(numbers, LazyCollection[int])
assert_type(words, LazyCollection[str])
assert_type(words.map(length), LazyCollection[int])
assert_type(numbers.map(lambda n: str(n)), LazyCollection[str])
assert_type(numbers.filter(lambda n: n > 1).map(str).take(3).collect(), list[str])
assert_type(mixed.filter(is_int), LazyCollection[int])
assert_type(numbers.filter(col("a") > 1), LazyCollection[int])
assert_type(numbers.batch(2), LazyCollection[list[int]])
assert_type(numbers.chunk(2), LazyCollection[list[int]])
assert_type(numbers.window(2), LazyCollection[tuple[int, ...]])
assert_type(numbers.flat_map(lambda n: [str(n)]), LazyCollection[str])
assert_type(numbers.enumerate(), LazyCollection[tuple[int, int]])
assert_type(numbers.zip(words), LazyCollection[tuple[int, str]])
assert_type(numbers.paginate(2), LazyCollection[Page[int]])
assert_type(numbers.paginate(2, 1), LazyCollection[int])
assert_type(numbers.page(1, 2), Page[int])
assert_type(numbers.page(1).items, list[int])
assert_type(numbers.reduce(lambda a, b: a + b), int)
assert_type(numbers.reduce(lambda a, b: a + str(b), ""), str)
assert_type(numbers.group_by(str), dict[str, list[int]])
assert_type(numbers.first(), int)
assert_type(numbers.first(None), int | None)
assert_type(numbers[0], int)
assert_type(numbers[1:], LazyCollection[int])
assert_type(numbers.cache().distinct().sort(), LazyCollection[int])
assert_type(numbers.scan(lambda a, n: a + str(n), ""), LazyCollection[str])

numbers.map(length)  # error: arg-type
words.filter(lambda w: w.missing)  # error: attr-defined
numbers.take("3")  # error: arg-type
numbers.map(5)  # error: call-overload
LazyCollection(5)  # error: arg-type
numbers.missing()  # error: attr-defined
numbers.reduce(length)  # error: call-overload
