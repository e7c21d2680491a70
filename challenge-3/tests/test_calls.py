"""Every call that is legal under the contract is legal on the implementation: by exhaustion.

Python itself is the oracle: each signature becomes a function, which is called in every way.
"""

import functools
import inspect
from collections.abc import Iterator
from itertools import combinations, permutations, product
from types import FunctionType

import pytest

from calls import compare_calls
from signatures import (
    KEYWORD_ONLY,
    POSITIONAL,
    POSITIONAL_ONLY,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Kind,
    Param,
    Parameters,
    note_layout,
    read,
    text_of_parameters,
)

pytestmark = pytest.mark.unit

CALLS = [
    (positions, names)
    for positions in range(5)
    for count in range(5)
    for names in combinations("abcz", count)  # z stands for all names that no signature has
]


def signatures() -> Iterator[Parameters]:
    """All with at most two of a, b and c, in every kind, with and without *args and **kwargs."""
    kinds = (POSITIONAL_ONLY, POSITIONAL, KEYWORD_ONLY)
    for count in range(3):
        for names in permutations("abc", count):
            for given in product(product(kinds, (True, False)), repeat=count):
                named = [Param(name, *each) for name, each in zip(names, given, strict=True)]
                by_position = [p for p in named if p.kind != KEYWORD_ONLY]
                in_order = named == sorted(named, key=lambda p: p.kind)
                if not in_order or by_position != sorted(by_position, key=lambda p: not p.required):
                    continue
                for args, kwargs in product((True, False), repeat=2):
                    yield tuple(
                        by_position
                        + [Param("args", VAR_POSITIONAL, False)] * args
                        + [p for p in named if p.kind == KEYWORD_ONLY]
                        + [Param("kwargs", VAR_KEYWORD, False)] * kwargs
                    )


def legal_calls(parameters: Parameters) -> tuple[int, list[str | None]]:
    """Which of CALLS the signature allows (as bits), and what each parameter is given then."""
    space: dict[str, object] = {}
    text = text_of_parameters(parameters).replace("...", "None")
    exec(f"def function{text}: return locals()", space)
    function = space["function"]
    bits = 0
    received: list[str | None] = []
    for number, (positions, names) in enumerate(CALLS):
        try:
            bound = function(*range(positions), **dict.fromkeys(names, "by name"))  # type: ignore[operator]
        except TypeError:
            received.append(None)
        else:
            bits |= 1 << number
            received.append(repr({name: bound.get(name) for name in "abc"}))
    return bits, received


def test_no_call_that_the_contract_allows_fails_where_nothing_is_reported() -> None:
    """Nothing reported means no such call; a report means one, or a value that changes its name."""
    known = {each: legal_calls(each) for each in signatures()}
    assert len(known) > 500
    wrongly_accepted, wrongly_rejected = [], []
    for contract, (allowed, meant) in known.items():
        for found, (possible, received) in known.items():
            codes = {fault.code for fault in compare_calls(contract, found)}
            fails = allowed & ~possible
            if fails and not codes:
                wrongly_accepted.append((contract, found))
            elif codes and not fails and (codes != {"C105"} or meant == received):
                wrongly_rejected.append((contract, found, codes))
    assert wrongly_accepted == []
    assert wrongly_rejected == []


def test_only_what_repeats_a_declaration_word_for_word_is_not_compared() -> None:
    class Owner: ...

    made: dict[Parameters, FunctionType] = {}
    for each in signatures():
        space: dict[str, FunctionType] = {}
        text = text_of_parameters(each, bound=Kind.INSTANCE).replace("...", "None")
        exec(f"def f{text}: ...", space)
        made[each] = space["f"]
    declared = {each: read("f", function, Owner) for each, function in made.items()}
    for member in declared.values():
        note_layout(member)
    assert not [
        (contract, found)
        for contract, member in declared.items()
        for found, function in made.items()
        if (member.repeated(function, Owner) is not None) is not (contract == found)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "async def f(self, a: int) -> int: ...", "def f(self, a: int) -> int: yield",
        "async def f(self, a: int) -> int: yield", "def f(self, a: int) -> str: ...",
        "def f(self, a: object) -> int: ...", "def f(self, a: int): ...",
        "@staticmethod\ndef f(self, a: int) -> int: ...",
        "@classmethod\ndef f(self, a: int) -> int: ...",
        "@wraps(print)\ndef f(self, a: int) -> int: ...", "f = 1",
    ],
)  # fmt: skip
def test_what_differs_in_color_type_or_binding_is_compared(text: str) -> None:
    declared = read("f", plainly, object)
    note_layout(declared)
    space: dict[str, object] = {"wraps": functools.wraps}
    exec(text, space)

    assert declared.repeated(space["f"], object) is None
    assert declared.repeated(plainly, object) is not None


def plainly(self: object, a: int) -> int:
    return a


def shape(text: str) -> Parameters:
    """The parameters of `def f(…)`."""
    space: dict[str, object] = {}
    exec(f"def f{text}: ...", space)
    signature = inspect.signature(space["f"])  # type: ignore[arg-type]
    return tuple(
        Param(p.name, int(p.kind), p.default is p.empty and p.kind not in (2, 4))
        for p in signature.parameters.values()
    )


@pytest.mark.parametrize(
    ("contract", "found", "codes", "actual"),
    [
        ("(a, /, *, b)", "(b, a=None)", ["C105"], "'b' at position 1, so it gets two values"),
        ("(a, *args, **kwargs)", "(a, b=None, *args, **kwargs)", ["C105"],
         "'b' at position 2, so it gets two values"),
        ("(a)", "(a, /, **kwargs)", ["C104"], "'a' by position only"),
        ("(*, a=None)", "(a, /, **kwargs)", ["C109"], "'a' is required"),
        ("(a, b)", "(a, b=None, *, c)", ["C109"], "'c' is required"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_call_that_fails(
    contract: str, found: str, codes: list[str], actual: str
) -> None:
    """The sentence names the parameter at fault."""
    faults = list(compare_calls(shape(contract), shape(found)))
    assert [fault.code for fault in faults] == codes
    assert faults[0].actual == actual
