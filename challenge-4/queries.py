"""A SELECT in the making: what is filtered, sorted and cut becomes one statement.

The order of the steps is kept: what is added behind a limit makes a sub-select of what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from databases import quoted

MAX_CONDITIONS = 500  # in one WHERE: SQLite nests them, up to 1000
MAX_SUBSELECTS = 8  # SQLite's parser ends at 15


@dataclass(frozen=True)
class Term:
    """One term of ORDER BY."""

    column: str
    descending: bool = False
    collation: str = ""  # by code points, as Python sorts; empty: as the database does
    nullable: bool = True
    cast: str = ""  # the type that a value of a cursor has to be given


@dataclass
class Query:
    """A SELECT in the making. Whatever follows a limit wraps what is there into a sub-select."""

    mark: str
    base: str
    base_columns: list[str]
    order: list[Term]
    parameters: list[Any] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    where_parameters: list[Any] = field(default_factory=list)
    skip: int = 0
    take: int | None = None
    row_id: str | None = None
    wraps: int = 0

    def is_full(self) -> bool:
        """Whether a further condition or order might be more than a database takes."""
        nests = self.wraps >= MAX_SUBSELECTS and (self.skip > 0 or self.take is not None)
        return nests or len(self.where) >= MAX_CONDITIONS

    def name(self, column: str) -> str:
        """The column as SQL names it; the hidden key is no quoted name."""
        return column if column == self.row_id else quoted(column, self.mark)

    def add_where(self, text: str, parameters: list[Any]) -> None:
        """Keep the rows for which the text is true."""
        if self.skip or self.take is not None:
            self.wrap()
        self.where.append(text)
        self.where_parameters += parameters

    def add_order(self, term: Term) -> None:
        """Sort by this before everything else."""
        if self.skip or self.take is not None:
            self.wrap()
        self.order = [term, *(old for old in self.order if old.column != term.column)]

    def add_skip(self, number: int) -> None:
        """Leave out the first rows."""
        self.skip += number
        if self.take is not None:
            self.take = max(0, self.take - number)

    def add_take(self, number: int) -> None:
        """Stop after so many rows."""
        self.take = number if self.take is None else min(self.take, number)

    def wrap(self) -> None:
        """Make it the FROM of a new one."""
        key = [self.row_id] if self.row_id else []
        names = [f"{self.name(c)} AS {quoted(c, self.mark)}" for c in [*self.base_columns, *key]]
        text, parameters = self.text(names)
        self.base, self.parameters = f"({text}) AS q", parameters
        self.base_columns = [*self.base_columns, *key]
        self.where, self.where_parameters = [], []
        self.skip, self.take, self.row_id = 0, None, None
        self.wraps += 1

    def text(self, selected: Sequence[str], *, ordered: bool = True) -> tuple[str, list[Any]]:
        """The statement and its parameters."""
        text = f"SELECT {', '.join(selected)} FROM {self.base}"
        parameters = [*self.parameters, *self.where_parameters]
        if self.where:
            text += f" WHERE {' AND '.join(self.where)}"
        if ordered and self.order:
            text += f" ORDER BY {', '.join(map(self._term, self.order))}"
        if self.take is not None or self.skip:
            take = self.take
            if take is None and self.mark == "?":
                take = -1  # SQLite has no OFFSET without LIMIT
            if take is not None:
                text += f" LIMIT {self.mark}"
                parameters.append(min(take, 2**63 - 1))
            if self.skip:
                text += f" OFFSET {self.mark}"
                parameters.append(min(self.skip, 2**63 - 1))
        return text, parameters

    def _term(self, term: Term) -> str:
        text = self.name(term.column)
        if term.collation:
            text += f" COLLATE {term.collation}"
        text += " DESC" if term.descending else ""
        if term.nullable:  # None comes first, as in Python's order of expressions
            text += " NULLS LAST" if term.descending else " NULLS FIRST"
        return text

    def after(self, values: Sequence[Any]) -> tuple[str, list[Any]]:
        """The condition for rows behind the one with these values in the terms of the order."""
        text, parameters = "1 = 0", list[Any]()
        for term, value in reversed(list(zip(self.order, values, strict=True))):
            name = self.name(term.column)
            collate = f" COLLATE {term.collation}" if term.collation else ""
            if value is None:
                beyond = "1 = 0" if term.descending else f"{name} IS NOT NULL"
                text = f"({beyond} OR ({name} IS NULL AND {text}))"
                continue
            sign = "<" if term.descending else ">"
            mark = self.mark + term.cast
            beyond = f"{name}{collate} {sign} {mark}"
            if term.descending and term.nullable:
                beyond = f"({beyond} OR {name} IS NULL)"
            if text == "1 = 0":
                text, parameters = beyond, [value, *parameters]
            else:
                text = f"({beyond} OR ({name}{collate} = {mark} AND {text}))"
                parameters = [value, value, *parameters]
        return text, parameters
