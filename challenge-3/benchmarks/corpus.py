"""Fifty-four class definitions, and which of them keep the contract.

Each case replaces one member of a correct class of this contract:

    class K(Contract):
        def process(self, data: dict[str, Any]) -> dict[str, Any]: ...
        def validate(self, data: dict[str, Any], *, strict: bool = False) -> bool: ...
        def merge(self, left: int, right: int) -> int: ...
        async def flush(self, timeout: float = 1.0) -> int: ...
        @classmethod
        def create(cls, config: Mapping[str, str]) -> Any: ...
        @staticmethod
        def slug(text: str) -> str: ...
        @property
        def ready(self) -> bool: ...

They are text, so that every checker can be given the same definitions in its own form.
"""

from dataclasses import dataclass
from textwrap import dedent, indent

PRELUDE = """\
import functools
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from functools import cached_property, partialmethod, wraps
from typing import Any


def loose(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper


def loose_async(function):
    @wraps(function)
    async def wrapper(*args, **kwargs):
        return await function(*args, **kwargs)
    return wrapper


def only_self(function):
    @wraps(function)
    def wrapper(self):
        return function(self, {})
    return wrapper


class Mixin:
    def process(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


class BrokenMixin:
    def process(self):
        return {}
"""

CONTRACT = {
    "process": "def process(self, data: dict[str, Any]) -> dict[str, Any]: ...",
    "validate": "def validate(self, data: dict[str, Any], *, strict: bool = False) -> bool: ...",
    "merge": "def merge(self, left: int, right: int) -> int: ...",
    "flush": "async def flush(self, timeout: float = 1.0) -> int: ...",
    "create": "@classmethod\ndef create(cls, config: Mapping[str, str]) -> Any: ...",
    "slug": "@staticmethod\ndef slug(text: str) -> str: ...",
    "ready": "@property\ndef ready(self) -> bool: ...",
}
CORRECT = {
    "version": 'version = "1.0.0"',
    "description": 'description = "A class of the corpus."',
    "author": 'author = "The authors"',
    "process": ("def process(self, data: dict[str, Any]) -> dict[str, Any]:\n    return data"),
    "validate": (
        "def validate(self, data: dict[str, Any], *, strict: bool = False) -> bool:\n"
        "    return True"
    ),
    "merge": "def merge(self, left: int, right: int) -> int:\n    return left + right",
    "flush": "async def flush(self, timeout: float = 1.0) -> int:\n    return 0",
    "create": (
        "@classmethod\ndef create(cls, config: Mapping[str, str]) -> Any:\n    return cls()"
    ),
    "slug": "@staticmethod\ndef slug(text: str) -> str:\n    return text.lower()",
    "ready": "@property\ndef ready(self) -> bool:\n    return True",
}


@dataclass(frozen=True)
class Case:
    """One definition: the member it replaces, by what, and the codes it must be rejected with."""

    title: str
    member: str
    text: str
    codes: tuple[str, ...] = ()
    bases: str = "{contract}"

    @property
    def is_legal(self) -> bool:
        """Whether the class keeps the contract."""
        return not self.codes

    def definition(self, contract: str = "K", header: str = "class P({bases}):") -> str:
        """The class statement, for a contract of this name."""
        members = {**CORRECT, self.member: self.text}
        body = "\n".join(dedent(text).strip() for text in members.values() if text.strip())
        bases = self.bases.format(contract=contract)
        return f"{header.format(bases=bases)}\n{indent(body, '    ')}\n"


def accept(title: str, member: str, text: str, bases: str = "{contract}") -> Case:
    """A legal one."""
    return Case(title, member, text, (), bases)


def reject(title: str, codes: str, member: str, text: str, bases: str = "{contract}") -> Case:
    """An illegal one."""
    return Case(title, member, text, tuple(codes.split()), bases)


CASES = [
    accept("exact", "process", CORRECT["process"]),
    accept("wider parameter, narrower return", "process", """
        def process(self, data: Mapping[str, Any]) -> OrderedDict[str, Any]:
            return OrderedDict(data)"""),
    accept("an extra parameter with a default", "process", """
        def process(self, data, depth=0):
            return data"""),
    accept("var-args take everything", "process", """
        def process(self, *args, **kwargs):
            return {}"""),
    accept("required becomes optional", "process", """
        def process(self, data=None):
            return data"""),
    accept("no annotations", "process", """
        def process(self, data):
            return data"""),
    accept("keyword-only becomes positional too", "validate", """
        def validate(self, data, strict=False):
            return True"""),
    accept("from a mixin left of the contract", "process", "", "Mixin, {contract}"),
    accept("a decorator that passes everything on", "process", """
        @loose
        def process(self, data: dict[str, Any]) -> dict[str, Any]:
            return data"""),
    accept("partialmethod", "process", """
        def _process(self, mode, data):
            return data
        process = partialmethod(_process, "fast")"""),
    accept("a plain function annotated to return a coroutine", "flush", """
        async def _flush(self) -> int:
            return 0
        def flush(self, timeout=1.0) -> Coroutine[Any, Any, int]:
            return self._flush()"""),
    accept("a class attribute for a property", "ready", "ready: bool = True"),
    accept("cached_property for a property", "ready", """
        @cached_property
        def ready(self) -> bool:
            return True"""),
    accept("a static method for an instance method", "process", """
        @staticmethod
        def process(data):
            return data"""),
    accept("a class method for an instance method", "process", """
        @classmethod
        def process(cls, data):
            return data"""),
    accept("int to float, int to bool", "merge", """
        def merge(self, left: float, right: float) -> bool:
            return True"""),
    accept("another default", "flush", """
        async def flush(self, timeout=9.0):
            return 0"""),
    accept("wider unions", "merge", """
        def merge(self, left: int | str, right: int | None) -> int:
            return 0"""),
    accept("a lambda", "merge", "merge = lambda self, left, right: left"),
    accept("an async decorator", "flush", """
        @loose_async
        async def flush(self, timeout: float = 1.0) -> int:
            return 0"""),
    reject("absent", "C101", "process", ""),
    reject("no self", "C112", "process", """
        def process():
            return {}"""),
    reject("renamed", "C104", "process", """
        def process(self, payload):
            return payload"""),
    reject("an extra required parameter", "C109", "process", """
        def process(self, data, mode):
            return data"""),
    reject("an extra required keyword", "C109", "process", """
        def process(self, data, *, mode):
            return data"""),
    reject("a keyword is missing", "C107", "validate", """
        def validate(self, data):
            return True"""),
    reject("all by position only", "C104 C107", "validate", """
        def validate(self, data, strict=False, /):
            return True"""),
    reject("optional becomes required", "C106", "flush", """
        async def flush(self, timeout):
            return 0"""),
    reject("by name only", "C102", "process", """
        def process(self, *, data):
            return data"""),
    reject("swapped", "C105 C105", "merge", """
        def merge(self, right, left):
            return left"""),
    reject("sync for async, annotated", "C111", "flush", """
        def flush(self, timeout: float = 1.0) -> int:
            return 0"""),
    reject("sync for async", "C111", "flush", """
        def flush(self, timeout=1.0):
            return 0"""),
    reject("async for sync, annotated", "C111", "process", """
        async def process(self, data: dict[str, Any]) -> dict[str, Any]:
            return data"""),
    reject("async for sync", "C111", "process", """
        async def process(self, data):
            return data"""),
    reject("another parameter type", "C120", "merge", """
        def merge(self, left: str, right: int):
            return 0"""),
    reject("a narrower parameter type", "C120", "process", """
        def process(self, data: OrderedDict[str, Any]):
            return data"""),
    reject("another return type", "C121", "process", """
        def process(self, data) -> str:
            return """ + '""'),
    reject("a wider return type", "C121", "process", """
        def process(self, data) -> dict[str, Any] | None:
            return data"""),
    reject("a list for a dict", "C121", "process", """
        def process(self, data) -> list[str]:
            return []"""),
    reject("a list for a bool", "C121", "validate", """
        def validate(self, data, *, strict=False) -> list[str]:
            return []"""),
    reject("an instance method for a class method", "C110", "create", """
        def create(self, config):
            return self"""),
    reject("a method for a property", "C110", "ready", """
        def ready(self):
            return True"""),
    reject("a property for a method", "C110", "process", """
        @property
        def process(self):
            return None"""),
    reject("data for a method", "C110", "process", "process = 7"),
    reject("None for a method", "C101", "process", "process = None"),
    reject("a decorator that lies", "C113", "process", """
        @only_self
        def process(self, data: dict[str, Any]) -> dict[str, Any]:
            return data"""),
    reject("a validator that yields", "C111", "validate", """
        def validate(self, data, *, strict=False):
            yield False"""),
    reject("an async method that yields", "C111", "flush", """
        async def flush(self, timeout=1.0):
            yield 0"""),
    reject("a static method with self", "C105 C109", "process", """
        @staticmethod
        def process(self, data):
            return data"""),
    reject("a broken mixin left of a good one", "C102", "process", "",
           "BrokenMixin, Mixin, {contract}"),
    reject("another keyword", "C107", "validate", """
        def validate(self, data, *, lax=False):
            return True"""),
    reject("by position only", "C104", "process", """
        def process(self, data, /):
            return data"""),
    reject("a property of another type", "C121", "ready", """
        @property
        def ready(self) -> str:
            return "yes" """),
    reject("positions without names", "C103", "process", """
        def process(self, *args):
            return {}"""),
]  # fmt: skip
