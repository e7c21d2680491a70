"""Expressions as SQL, where SQL says exactly what Python says; otherwise nothing is pushed.

A text is made so that it is TRUE exactly when the expression is true in Python; FALSE and NULL both
mean "no". The kinds of a column tell what its values can be. SQLite's columns hold anything: there
the affinity decides which comparison would convert, and ranges keep other storage classes out.
Arithmetic is pushed for whole numbers of PostgreSQL only, as numeric, which knows no overflow.
"""

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from databases import Column, quoted
from expressions import Expr, candidates

MAX_CANDIDATES = 200  # of is_in
MAX_OPERANDS = 50  # of arithmetic: numeric ends at 131,072 digits
Text = tuple[str, list[Any]]
SIGNS = {"eq": "=", "ne": "<>", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "mod": "%", "floordiv": "//"}
NEVER: Text = ("1 = 0", [])


class Translator:
    """Translates for one query; `resolve` knows which column an expression names, if it does."""

    def __init__(self, dialect: str, mark: str, columns: dict[str, Column]) -> None:
        self.sqlite = dialect == "sqlite"
        self.mark = mark
        self.columns = columns  # by the name that the expression uses
        self.element: Column | None = None  # the column that is the element itself

    def column_of(self, expr: Expr) -> Column | None:
        """The column that an expression names."""
        while expr.op == "alias":
            expr = expr.args[0]
        if expr.op == "it":
            return self.element
        if expr.op in ("col", "get") and self.element is None:
            return self.columns.get(expr.args[0])
        return None

    def condition(self, expr: Expr) -> Text | None:
        """The expression as a condition, or None: it has to be decided in Python."""
        op = expr.op
        if op in ("and", "or"):
            left, right = self.condition(expr.args[0]), self.condition(expr.args[1])
            if left is None or right is None:
                return None
            return f"({left[0]} {op.upper()} {right[0]})", left[1] + right[1]
        if op == "not":
            inner = self.condition(expr.args[0])
            return None if inner is None else (f"(({inner[0]}) IS NOT TRUE)", inner[1])
        if op in SIGNS:
            return self._comparison(op, *expr.args)
        column = self.column_of(expr.args[0] if op not in ("col", "get", "it") else expr)
        if column is None or column.kind == "json":
            return None
        name = quoted(column.name, self.mark)
        if op == "is_null":
            return f"{name} IS NULL", []
        if op == "is_in":
            return self._membership(column, expr.args[1].args[0])
        if op in ("contains", "startswith", "endswith"):
            return self._part(op, column, name, expr.args[1].args[0])
        if op in ("col", "get", "it") and column.kind == "bool":
            return f"{name} IS TRUE", []
        return None

    def _comparison(self, op: str, left: Expr, right: Expr) -> Text | None:
        if left.op == "lit":
            left, right, op = right, left, FLIPPED[op]
        if left.op in ARITHMETIC or right.op in ARITHMETIC:
            return self._computed(op, left, right)
        column = self.column_of(left)
        if column is None or column.kind == "json":
            return None
        if right.op == "lit":
            return self.compare(op, column, right.args[0])
        other = self.column_of(right)
        if other is None or self.sqlite or other.kind != column.kind:
            return None
        collate = ' COLLATE "C"' if column.kind == "text" and op not in ("eq", "ne") else ""
        if column.kind in ("integer", "text"):
            one, two = quoted(column.name, self.mark), quoted(other.name, self.mark)
            return f"{one}{collate} {SIGNS[op]} {two}", []
        return None

    # --- arithmetic ---

    def _computed(self, op: str, left: Expr, right: Expr) -> Text | None:
        if self.sqlite:
            return None
        budget = iter(range(MAX_OPERANDS))
        one, two = self._whole(left, budget), self._whole(right, budget)
        if one is None or two is None:
            return None
        return f"({one[0]} {SIGNS[op]} {two[0]})", one[1] + two[1]

    def _whole(self, expr: Expr, budget: Iterator[int]) -> Text | None:
        """An expression of whole numbers as numeric; divisors are constants, never 0."""
        if next(budget, None) is None:
            return None
        if expr.op == "lit":
            whole = type(expr.args[0]) is int
            return ("%s::numeric", [Decimal(expr.args[0])]) if whole else None
        if expr.op not in ARITHMETIC:
            column = self.column_of(expr)
            whole = column is not None and column.kind == "integer"
            return (f"{quoted(column.name, self.mark)}::numeric", []) if column and whole else None
        left, right = expr.args
        one, two = self._whole(left, budget), self._whole(right, budget)
        if one is None or two is None:
            return None
        if expr.op in ("add", "sub", "mul"):
            return f"({one[0]} {ARITHMETIC[expr.op]} {two[0]})", one[1] + two[1]
        if right.op != "lit" or not right.args[0]:
            return None
        # SQL's remainder has the sign of the dividend, Python's that of the divisor.
        rest = f"mod(mod({one[0]}, {two[0]}) + {two[0]}, {two[0]})"
        if expr.op == "mod":
            return rest, one[1] + two[1] * 3
        return f"div({one[0]} - {rest}, {two[0]})", one[1] * 2 + two[1] * 4

    def compare(self, op: str, column: Column, value: Any) -> Text | None:
        """A column with a constant."""
        if value is None:
            return NEVER
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, str) and not _storable(value):
            return None
        if type(value) not in (int, float, str, bool):
            return None
        if self.sqlite:
            return self._compare_sqlite(op, column, value)
        return self._compare_postgres(op, column, value)

    # --- SQLite ---

    def _compare_sqlite(self, op: str, column: Column, value: Any) -> Text | None:
        name, sign, kind = quoted(column.name, self.mark), SIGNS[op], column.kind
        if isinstance(value, str):
            if kind == "text":
                text = f"{name} COLLATE BINARY {sign} ?"
                # A blob is greater than every text.
                return (f"({text} AND {name} < x'')" if op in ("gt", "ge") else text), [value]
            same = f"(typeof({name}) = 'text' AND +{name} COLLATE BINARY {{}} ?)"
        else:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                return None
            value = int(value) if isinstance(value, bool) else value
            if kind == "text":  # holds no numbers: they would have become text
                return (f"{name} IS NOT NULL", []) if op == "ne" else NEVER
            if kind in ("numeric", "none", "rowid"):
                text = f"{name} {sign} ?"
                # A text is greater than every number.
                beyond = op in ("gt", "ge") and kind != "rowid"
                return (f"({text} AND {name} < '')" if beyond else text), [value]
            same = f"(typeof({name}) IN ('integer', 'real') AND +{name} {{}} ?)"
        if op == "ne":
            return f"({name} IS NOT NULL AND {same.format('=')} IS NOT TRUE)", [value]
        return same.format(sign), [value]

    # --- PostgreSQL ---

    def _compare_postgres(self, op: str, column: Column, value: Any) -> Text | None:
        name, sign, kind = quoted(column.name, self.mark), SIGNS[op], column.kind
        if kind not in ("integer", "float", "decimal", "text", "bool"):
            return None
        if isinstance(value, str) is not (kind == "text"):
            unlike: Text = (f"{name} IS NOT NULL", []) if op == "ne" else NEVER
            return unlike
        if kind == "text":
            collate = "" if op in ("eq", "ne") else ' COLLATE "C"'
            return f"{name}{collate} {sign} %s::text", [value]
        if kind == "bool":
            same = isinstance(value, bool) and op in ("eq", "ne")
            return (f"{name} {sign} %s", [value]) if same else None
        value = int(value) if isinstance(value, bool) else value
        if kind == "float":
            if float(value) != value:
                return None
            text = f"{name} {sign} %s::float8"
            # NaN is greater than every number there, and equal to itself.
            beyond = f" AND {name} <> 'NaN'::float8" if op in ("gt", "ge") else ""
            return f"({text}{beyond})", [float(value)]
        if isinstance(value, float) and math.isinf(value):
            return None
        if kind == "integer" and isinstance(value, int) and -(2**63) <= value < 2**63:
            return f"{name} {sign} %s::int8", [value]
        beyond = (
            f" AND {name} <> 'NaN'::numeric" if kind == "decimal" and op in ("gt", "ge") else ""
        )
        return f"({name}::numeric {sign} %s::numeric{beyond})", [Decimal(value)]

    # --- lists and parts of texts ---

    def _membership(self, column: Column, values: tuple[Any, ...]) -> Text | None:
        wanted = candidates(values)
        if len(wanted) > MAX_CANDIDATES:
            return None
        texts: list[str] = []
        parameters: list[Any] = []
        for value in wanted:
            one = self.compare("eq", column, value)
            if one is None:
                return None
            texts.append(one[0])
            parameters += one[1]
        return (f"({' OR '.join(texts)})", parameters) if texts else NEVER

    def _part(self, op: str, column: Column, name: str, part: str) -> Text | None:
        if not _storable(part):
            return None
        if self.sqlite:
            # Bytes: LIKE would fold case and know wildcards, and text ends at a NUL.
            whole, size = f"CAST({name} AS BLOB)", len(part.encode())
            tests = {
                "contains": f"instr({whole}, CAST(? AS BLOB)) > 0",
                "startswith": f"substr({whole}, 1, {size}) = CAST(? AS BLOB)",
                "endswith": f"substr({whole}, -{size}) = CAST(? AS BLOB)",
            }
            if not part:
                return f"typeof({name}) = 'text'", []
            return f"(typeof({name}) = 'text' AND {tests[op]})", [part]
        if column.kind != "text":
            return NEVER if column.kind in ("integer", "float", "decimal", "bool") else None
        tests = {
            "contains": f"strpos({name}, %s::text) > 0",
            "startswith": f"starts_with({name}, %s::text)",
            "endswith": f"right({name}, {len(part)}) = %s::text",
        }
        return (tests[op], [part]) if part else (f"{name} IS NOT NULL", [])


def _storable(text: str) -> bool:
    """Whether a database takes the text as it is: no NUL, no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
