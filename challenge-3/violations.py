"""What is wrong with a class, where it stands, and how to cure it."""

import inspect
import linecache
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """One place where a class breaks a contract."""

    code: str
    member: str
    expected: str
    actual: str
    file: str
    line: int
    hint: str
    contract: str = ""

    @property
    def location(self) -> str:
        """`file:line`, which editors make a link of."""
        return f"{self.file}:{self.line}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "location": self.location}

    def __str__(self) -> str:
        owner = f" of {self.contract}" if self.contract else ""
        return (
            f"{self.code} {self.member}{owner}  at {self.location}\n"
            f"    expected  {self.expected}\n"
            f"    actual    {self.actual}\n"
            f"    cure      {self.hint}"
        )


class ContractViolationError(TypeError):
    """Raised when a class is defined or changed so that it breaks its contracts: all places."""

    def __init__(self, cls_name: str, violations: Iterable[Violation]) -> None:
        self.cls_name = cls_name
        self.violations = tuple(violations)
        super().__init__(cls_name, self.violations)

    def __str__(self) -> str:
        count = len(self.violations)
        places = "1 place" if count == 1 else f"{count} places"
        listed = "\n".join(
            f"  {line}" for each in self.violations for line in str(each).split("\n")
        )
        return f"{self.cls_name} breaks its contract in {places}:\n{listed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, in a stable order."""
        return {"class": self.cls_name, "violations": [each.to_dict() for each in self.violations]}


class ContractRuntimeError(ContractViolationError):
    """Raised at the first call when what could not be known at definition turns out to be wrong."""


# --- where things stand -----------------------------------------------------------------------

_DEF = re.compile(r"\s*(async\s+)?def\s")
_CLASS = re.compile(r"\s*class\s")
SCANNED_LINES = 200


def place_of_function(function: Any) -> tuple[str, int]:
    """File and line of the `def`; decorators stand above it."""
    code = function.__code__
    return code.co_filename, find_line(code.co_filename, code.co_firstlineno, _DEF)


def place_of_class(cls: type) -> tuple[str, int]:
    """File and line of the `class` statement, as well as they can be found."""
    if (definition := vars(cls).get("__contract_definition__")) is not None:
        place: tuple[str, int] = definition.place
        return place
    try:
        file = inspect.getsourcefile(cls) or "<unknown>"
        return file, max(1, inspect.findsource(cls)[1] + 1)
    except (OSError, TypeError, IndexError):
        return getattr(inspect.getmodule(cls), "__file__", None) or "<unknown>", 1


def find_line(
    file: str, first: int, pattern: "re.Pattern[str]", *, after_class: bool = False
) -> int:
    """The first line from `first` on that matches; `first` when none does."""
    indent: int | None = None
    for number in range(first, first + SCANNED_LINES):
        line = linecache.getline(file, number)
        if not line:
            break
        if after_class:
            width = len(line) - len(line.lstrip())
            if indent is None:
                if _CLASS.match(line):
                    indent = width
                continue
            if line.strip() and width <= indent and not line.lstrip().startswith(("#", ")")):
                break
        if pattern.match(line):
            return number
    return first
