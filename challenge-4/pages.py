"""One page of a collection."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Sequence[T], Generic[T]):
    """The items of one page, and what is around it. `number` counts from 1.

    `total` is the number of elements where it is known without reading them all. `cursor` is what
    `after` of a SQL source takes to go on behind this page; None on the last one, and where the
    plan cannot be resumed (a batch or a count made in Python lies between the row and the item).
    """

    items: list[T]
    number: int
    size: int
    has_next: bool
    total: int | None = None
    cursor: str | None = None

    @property
    def has_previous(self) -> bool:
        """Whether there is a page before."""
        return self.number > 1

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.items[index]
