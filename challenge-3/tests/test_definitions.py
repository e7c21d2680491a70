"""Definitions beyond the corpus, and which of them keep the contract.

The principle: every call that is legal under the contract is legal on the implementation, and gives
what was promised. `P` is the class that is judged, `K` its contract.
"""

import re
import sys
import types

import pytest

from utils import ContractViolationError, registry

pytestmark = pytest.mark.unit

PRELUDE = """
import abc, asyncio, functools
from abc import abstractmethod
from collections.abc import *
from contextlib import *
from enum import Enum, IntEnum
from functools import cached_property, lru_cache, partialmethod, singledispatchmethod, wraps
from typing import *
from typing_extensions import Self, TypedDict, TypeVarTuple, Unpack
from utils import Contract

T, U = TypeVar("T"), TypeVar("U")
B = TypeVar("B", bound=int)
TC = TypeVar("TC", covariant=True)
Ts, PS = TypeVarTuple("Ts"), ParamSpec("PS")
UserId = NewType("UserId", int)

class Box(Generic[T]): ...
class CBox(Generic[TC]): ...
class Row(NamedTuple):
    f: int
class Color_(Enum):
    RED = 1
    BLUE = 2
class Movie(TypedDict):
    title: str
    year: int
class Long(Movie):
    minutes: int
class Other(TypedDict):
    title: str
class Opts(TypedDict, total=False):
    timeout: int
    retries: int
class Sized2(Protocol):
    def size(self) -> int: ...
class HasSize:
    def size(self) -> int:
        return 1

def injecting(function):
    @wraps(function)
    def wrapper(self, a):
        return function(self, a, object())
    return wrapper

def passing(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper
"""

# The method of the contract, that of the class, and the codes it is rejected with.
SIGNATURES = [
    ("(self, a, /)", "(self, x)", ""),
    ("(self, a)", "(self, a, /)", "C104"),
    ("(self, a, *, b=1)", "(self, *args, **kwargs)", ""),
    ("(self, a, /, *, b=1)", "(self, *args)", "C107"),
    ("(self, **kw: Unpack[Opts])", "(self, *, timeout: int = 0, retries: int = 1)", ""),
    ("(self, **kw: Unpack[Opts])", "(self, *, timeout: int = 0)", "C107"),
    ("(self, **kw: Unpack[Opts])", "(self, *, timeout: str = '', retries: int = 1)", "C120"),
    ("(self, *, timeout: int = 0)", "(self, **kw: Unpack[Opts])", ""),
    ("(self, *, level: int = 0)", "(self, **kw: Unpack[Opts])", "C107"),
    ("(self, **kw: Unpack[Opts])", "(self, **kw: Unpack[Opts])", ""),
    ("(self, *args: str)", "(self, a: int = 0, *args: str)", "C120"),
    ("(self, **kw: str)", "(self, *, a: int = 0, **kw: str)", "C120"),
    ("(self) -> float", "(self) -> bool", ""),
    ("(self, a: bool)", "(self, a: float)", ""),
    ("(self) -> int", "(self) -> float", "C121"),
    ("(self, a: list[int])", "(self, a: list[float])", "C120"),
    ("(self, a: list[int])", "(self, a: Sequence[float])", ""),
    ("(self) -> Sequence[float]", "(self) -> list[int]", ""),
    ("(self) -> dict[str, float]", "(self) -> dict[str, int]", "C121"),
    ("(self) -> Mapping[str, float]", "(self) -> dict[str, int]", ""),
    ("(self) -> Mapping[float, int]", "(self) -> Mapping[int, int]", "C121"),
    ("(self) -> Box[int]", "(self) -> Box[int]", ""),
    ("(self) -> Box[float]", "(self) -> Box[int]", "C121"),
    ("(self) -> CBox[float]", "(self) -> CBox[int]", ""),
    ("(self) -> str", "(self) -> Literal['a']", ""),
    ("(self) -> Literal['a']", "(self) -> str", "C121"),
    ("(self, a: Literal[1, 2])", "(self, a: int)", ""),
    ("(self, a: Literal[1, 2])", "(self, a: Literal[1])", "C120"),
    ("(self) -> Literal[Color_.RED, Color_.BLUE]", "(self) -> Color_", ""),
    ("(self) -> Literal[Color_.RED]", "(self) -> Color_", "C121"),
    ("(self) -> Literal[None]", "(self) -> None", ""),
    ("(self, a: Annotated[int, 'x'])", "(self, a: int)", ""),
    ("(self) -> int", "(self) -> UserId", ""),
    ("(self) -> float", "(self) -> UserId", ""),
    ("(self) -> UserId", "(self) -> int", "C121"),
    ("(self) -> Movie", "(self) -> Long", ""),
    ("(self) -> Movie", "(self) -> Other", "C121"),
    ("(self, a: Other)", "(self, a: Movie)", "C120"),
    ("(self) -> Other", "(self) -> Movie", ""),
    ("(self) -> Sized2", "(self) -> HasSize", ""),
    ("(self) -> Sized2", "(self) -> int", "C121"),
    ("(self, a: int|None)", "(self, a: int|str|None)", ""),
    ("(self, a: Optional[int])", "(self, a: int)", "C120"),
    ("(self, a: Any) -> Any", "(self, a: int) -> str", ""),
    ("(self) -> int", "(self) -> NoReturn", ""),
    ("(self) -> NoReturn", "(self) -> int", "C121"),
    ("(self) -> None", "(self) -> int", "C121"),
    ("(self) -> tuple[int, ...]", "(self) -> tuple[int, bool]", ""),
    ("(self) -> tuple[int, int]", "(self) -> tuple[int, ...]", "C121"),
    ("(self) -> tuple[()]", "(self) -> tuple[int]", "C121"),
    ("(self) -> tuple[int, Unpack[tuple[str, ...]]]", "(self) -> tuple[int, str]", ""),
    ("(self) -> tuple[int, *tuple[str, ...]]", "(self) -> tuple[int, str]", ""),
    ("(self) -> tuple[int, *tuple[str, ...]]", "(self) -> tuple[str, str]", "C121"),
    ("(self) -> Callable[[int], float]", "(self) -> Callable[[float], int]", ""),
    ("(self) -> Callable[[float], int]", "(self) -> Callable[[int], int]", "C121"),
    ("(self) -> type[int]", "(self) -> type[bool]", ""),
    ("(self) -> type[int]", "(self) -> type[str]", "C121"),
    ("(self) -> Generator[int, bool, None]", "(self) -> Generator[int, int, None]", ""),
    ("(self) -> Generator[int, int, None]", "(self) -> Generator[int, bool, None]", "C121"),
    ("(self) -> 'Self|None'", "(self) -> 'Self|None'", ""),
    ("(self) -> Optional[Self]", "(self) -> int", "C121"),
    ("(self) -> list[Self]", "(self) -> list[int]", "C121"),
    ("(self) -> Self", "(self) -> 'P'", ""),
    ("(self) -> Self", "(self) -> int", "C121"),
    ("(self, a: T) -> T", "(self, a: int) -> int", "C120"),
    ("(self, a: T) -> T", "(self, a: U) -> U", ""),
    ("(self, a: T) -> T", "(self, a: object) -> Any", ""),
    ("(self, a: B) -> B", "(self, a: float) -> Any", ""),
    ("(self, a: B) -> B", "(self, a: bool) -> Any", "C120"),
    (
        "(self, fn: Callable[PS, int], *a: PS.args, **k: PS.kwargs) -> int",
        "(self, fn: Callable[PS, int], *a: PS.args, **k: PS.kwargs) -> int",
        "",
    ),
]

DEFINITIONS = r"""
# singledispatchmethod cannot be called by name: C104
class K(Contract):
    def f(self, a): ...
class P(K):
    @singledispatchmethod
    def f(self, a): ...

# singledispatchmethod positional-only: legal
class K(Contract):
    def f(self, a, /): ...
class P(K):
    @singledispatchmethod
    def f(self, a): ...

# partialmethod keyword: legal
class K(Contract):
    def f(self, a): ...
class P(K):
    def _f(self, a, *, mode): ...
    f=partialmethod(_f, mode=1)

# partialmethod keeps required: C109
class K(Contract):
    def f(self, a): ...
class P(K):
    def _f(self, a, b, *, mode): ...
    f=partialmethod(_f, mode=1)

# lru_cache: legal
class K(Contract):
    def f(self, a: int) -> int: ...
class P(K):
    @lru_cache
    def f(self, a: int) -> int: ...

# lru_cache wrong type: C120
class K(Contract):
    def f(self, a: int) -> int: ...
class P(K):
    @lru_cache
    def f(self, a: str) -> int: ...

# wraps wrapper injects an argument: legal
class K(Contract):
    def f(self, a): ...
class P(K):
    @injecting
    def f(self, a, db): ...

# wraps passthrough does not inject: C109
class K(Contract):
    def f(self, a): ...
class P(K):
    @passing
    def f(self, a, db): ...

# contextmanager: legal
class K(Contract):
    @abstractmethod
    def f(self) -> AbstractContextManager[int]: ...
class P(K):
    @contextmanager
    def f(self) -> Iterator[int]: yield 1

# contextmanager of wrong type: C121
class K(Contract):
    @abstractmethod
    def f(self) -> AbstractContextManager[int]: ...
class P(K):
    @contextmanager
    def f(self) -> Iterator[str]: yield 1

# asynccontextmanager: legal
class K(Contract):
    @abstractmethod
    def f(self) -> AbstractAsyncContextManager[int]: ...
class P(K):
    @asynccontextmanager
    async def f(self) -> AsyncIterator[int]: yield 1

# generator for context manager: C111
class K(Contract):
    @abstractmethod
    def f(self) -> AbstractContextManager[int]: ...
class P(K):
    def f(self): yield 1

# both contextmanager: legal
class K(Contract):
    @contextmanager
    def f(self) -> Iterator[int]: yield 1
class P(K):
    @contextmanager
    def f(self) -> Iterator[int]: yield 1

# contextmanager of no generator, for an iterator: C121
class K(Contract):
    def f(self) -> Iterator[int]: ...
class P(K):
    @contextmanager
    def f(self) -> Iterator[int]: return iter([1])

# contract contextmanager, impl returns one: legal
class K(Contract):
    @contextmanager
    def f(self) -> Iterator[int]: yield 1
class P(K):
    def f(self) -> AbstractContextManager[int]: ...

# overload: legal
class K(Contract):
    def f(self, a: int|str) -> int|str: ...
class P(K):
    @overload
    def f(self, a: int) -> int: ...
    @overload
    def f(self, a: str) -> str: ...
    def f(self, a): return a

# IntEnum for float: legal
class K(Contract):
    def f(self) -> float: ...
class P(K):
    class E(IntEnum): A = 1
    def f(self) -> E: ...

# Any subclass: legal
class K(Contract):
    def f(self) -> int: ...
class P(K):
    class M(Any): ...
    def f(self) -> M: ...

# async def for Awaitable: legal
class K(Contract):
    def f(self) -> Awaitable[int]: ...
class P(K):
    async def f(self) -> int: ...

# async def for Awaitable wrong: C121
class K(Contract):
    def f(self) -> Awaitable[int]: ...
class P(K):
    async def f(self) -> str: ...

# Future for async: legal
class K(Contract):
    async def f(self) -> int: ...
class P(K):
    def f(self) -> 'asyncio.Future[int]': ...

# async gen for AsyncIterator: legal
class K(Contract):
    def f(self) -> AsyncIterator[int]: ...
class P(K):
    async def f(self) -> AsyncIterator[int]: yield 1

# async gen for coroutine of iterator: C111
class K(Contract):
    async def f(self) -> AsyncIterator[int]: ...
class P(K):
    async def f(self) -> AsyncIterator[int]: yield 1

# async gen by delegation: legal
class K(Contract):
    async def f(self) -> AsyncIterator[int]:
        yield 1
class P(K):
    def f(self) -> AsyncGenerator[int, None]: ...

# sync gen for async gen: C111
class K(Contract):
    async def f(self) -> AsyncIterator[int]:
        yield 1
class P(K):
    def f(self) -> Iterator[int]:
        yield 1

# list for gen: C121
class K(Contract):
    def f(self) -> Iterator[int]: yield 1
class P(K):
    def f(self) -> list[int]: ...

# gen for Iterable: legal
class K(Contract):
    def f(self) -> Iterable[int]: ...
class P(K):
    def f(self) -> Iterator[int]: yield 1

# gen of wrong type: C121
class K(Contract):
    def f(self) -> Iterable[int]: ...
class P(K):
    def f(self) -> Iterator[str]: yield ''

# async callable object: legal
class K(Contract):
    async def f(self, a): ...
class P(K):
    class C:
        async def __call__(self, a): ...
    f=C()

# static over method: legal
class K(Contract):
    def f(self, a): ...
class P(K):
    @staticmethod
    def f(a): ...

# method over static: C110
class K(Contract):
    @staticmethod
    def f(a): ...
class P(K):
    def f(self, a): ...

# property plain: legal
class K(Contract):
    @property
    def f(self) -> int: ...
class P(K):
    f: int = 3

# property by descriptor: legal
class K(Contract):
    @property
    def f(self) -> int: ...
class P(K):
    class D:
        def __get__(self, i, o) -> int: return 1
    f=D()

# property wrong data: C121
class K(Contract):
    @property
    def f(self) -> int: ...
class P(K):
    f='x'

# setter dropped: C110
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: int) -> None: ...
class P(K):
    @property
    def f(self) -> int: ...

# setter narrowed: C120
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: int) -> None: ...
class P(K):
    @property
    def f(self) -> bool: ...
    @f.setter
    def f(self, v: bool) -> None: ...

# setter widened: legal
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: int) -> None: ...
class P(K):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: object) -> None: ...

# deleter dropped: C110
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.deleter
    def f(self) -> None: ...
class P(K):
    @property
    def f(self) -> int: ...

# cached_property for settable: legal
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: int) -> None: ...
class P(K):
    @cached_property
    def f(self) -> int: ...

# settable attribute is invariant: C120
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: int) -> None: ...
class P(K):
    f: bool = True

# Final attribute for settable: C110
class K(Contract):
    @property
    def f(self) -> int: ...
    @f.setter
    def f(self, v: int) -> None: ...
class P(K):
    f: Final = 3

# NamedTuple mixin: legal
class K(Contract):
    @property
    def f(self) -> int: ...
class P(Row, K):
    pass

# NamedTuple mixin wrong: C121
class K(Contract):
    @property
    def f(self) -> str: ...
class P(Row, K):
    pass

# method descriptor: legal
class K(Contract):
    def f(self, a): ...
class P(K):
    class D:
        def __get__(self, i, o): return lambda a: a
    f=D()

# private abstract: C101
class K(Contract):
    @abstractmethod
    def _hook(self): ...
    def f(self): ...
class P(K):
    def f(self): ...

# dunder abstract: C101
class K(Contract):
    @abstractmethod
    def __len__(self) -> int: ...
    def f(self): ...
class P(K):
    def f(self): ...

# dunder abstract wrong: C121
class K(Contract):
    @abstractmethod
    def __call__(self, a) -> int: ...
class P(K):
    def __call__(self, a) -> str: ...

# abstract of another ABC: C101
class K(Contract):
    def f(self): ...
class P(K, Sized):
    def f(self): ...

# abstract of another ABC given: legal
class K(Contract):
    def f(self): ...
class P(K, Sized):
    def f(self): ...
    def __len__(self): return 1

# abstract property of K: C101
class K(Contract):
    @property
    @abstractmethod
    def f(self) -> int: ...
class P(K):
    pass

# abstract in own body: C101
class K(Contract):
    def f(self): ...
class P(K):
    @abstractmethod
    def f(self): ...

# generic ts ok: legal
class K(Contract, Generic[Unpack[Ts]]):
    def f(self, *a: Unpack[Ts]) -> tuple[Unpack[Ts]]: ...
class P(K[int, str]):
    def f(self, *a: Any) -> tuple[int, str]: ...

# generic ts wrong: C121
class K(Contract, Generic[Unpack[Ts]]):
    def f(self) -> tuple[Unpack[Ts]]: ...
class P(K[int, str]):
    def f(self) -> tuple[int, int]: ...

# generic partial: legal
class K(Contract, Generic[T, U]):
    def f(self, a: T) -> U: ...
class Mid(K[int, U], Generic[U], abstract=True): ...
class P(Mid[str]):
    def f(self, a: int) -> str: ...

# generic partial wrong: C120 C121
class K(Contract, Generic[T, U]):
    def f(self, a: T) -> U: ...
class Mid(K[int, U], Generic[U], abstract=True): ...
class P(Mid[str]):
    def f(self, a: str) -> int: ...

# generic paramspec: legal
class K(Contract, Generic[PS, T]):
    def f(self, fn: Callable[PS, T]) -> T: ...
class P(K[[int], str]):
    def f(self, fn: Callable[[int], str]) -> str: ...

# generic paramspec wrong: C120
class K(Contract, Generic[PS, T]):
    def f(self, fn: Callable[PS, T]) -> T: ...
class P(K[[int], str]):
    def f(self, fn: Callable[[str], str]) -> str: ...

# generic inherited wrong in mixin: C120 C121
class K(Contract, Generic[T]):
    def f(self, a: T) -> T: ...
class Mix(Generic[T]):
    def f(self, a: T) -> T: ...
class P(Mix[str], K[int]):

# generic mixin right: legal
class K(Contract, Generic[T]):
    def f(self, a: T) -> T: ...
class Mix(Generic[T]):
    def f(self, a: T) -> T: ...
class P(Mix[int], K[int]):

# PEP 695 class: legal
class K[X](Contract):
    def f(self, a: X) -> X: ...
class P[Y](K[list[Y]]):
    def f(self, a: list[Y]) -> list[Y]: ...

# PEP 695 wrong: C120 C121
class K[X](Contract):
    def f(self, a: X) -> X: ...
class P(K[int]):
    def f(self, a: str) -> str: ...

# PEP 695 method typevar: C120
class K(Contract):
    def f[X](self, a: X) -> X: ...
class P(K):
    def f(self, a: int) -> int: ...

# PEP 695 alias generic: C121
type L[X]=list[X]
class K(Contract):
    def f(self) -> L[int]: ...
class P(K):
    def f(self) -> list[str]: ...

# PEP 695 alias generic ok: legal
type L[X]=list[X]
class K(Contract):
    def f(self) -> Sequence[int]: ...
class P(K):
    def f(self) -> L[int]: ...

# PEP 695 recursive alias: legal
type J=dict[str, J]|list[J]|int
class K(Contract):
    def f(self, a: J) -> J: ...
class P(K):
    def f(self, a: J) -> dict[str, J]: ...

# PEP 695 alias unknown name: legal
type J=Nowhere
class K(Contract):
    def f(self, a: int) -> int: ...
class P(K):
    def f(self, a: J) -> J: ...

# future annotations: C120 C121
# postponed
class K(Contract):
    def f(self, a: int) -> Box[float]: ...
class P(K):
    def f(self, a: str) -> Box[int]: ...

# unresolvable: legal
class K(Contract):
    def f(self, a:"Nowhere") -> "Nowhere": ...
class P(K):
    def f(self, a: int) -> int: ...
"""


def cases() -> list[tuple[str, str, str]]:
    """Title, text, and codes ("" is legal)."""
    found = [
        (
            f"{given} for {wanted}",
            f"class K(Contract):\n    def f{wanted}: ...\nclass P(K):\n    def f{given}: ...\n",
            codes,
        )
        for wanted, given, codes in SIGNATURES
    ]
    for block in DEFINITIONS.strip().split("\n\n"):
        heading, text = block.split("\n", 1)
        title, codes = heading.removeprefix("# ").rsplit(": ", 1)
        if not title.startswith("PEP 695") or sys.version_info >= (3, 12):
            found.append((title, text, codes.replace("legal", "")))
    return found


def verdict(text: str) -> list[str]:
    """The codes that a definition is rejected with."""
    attributes = '    version, description, author = "1.0.0", "A plugin.", "The authors"'
    text = re.sub(r"^(class P.*)$", rf"\1\n{attributes}", text, flags=re.MULTILINE)
    module = types.ModuleType("definitions")
    sys.modules[module.__name__] = module
    future = "from __future__ import annotations\n" if "# postponed" in text else ""
    try:
        exec(compile(f"{future}{PRELUDE}\n{text}", "<definition>", "exec"), module.__dict__)
    except ContractViolationError as error:
        assert "P" not in registry
        return [violation.code for violation in error.violations]
    finally:
        del sys.modules[module.__name__]
    assert "P" in registry
    return []


@pytest.mark.parametrize(("title", "text", "codes"), cases(), ids=[case[0] for case in cases()])
def test_it_is_judged_by_the_principle(title: str, text: str, codes: str) -> None:
    """Legal ones are registered, the others rejected for their reason and for no other."""
    assert sorted(verdict(text)) == sorted(codes.split()), title
