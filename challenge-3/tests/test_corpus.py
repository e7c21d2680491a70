"""The 54 class definitions: each is judged when it is defined, with exactly the expected codes."""

import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from corpus import CASES, CONTRACT, PRELUDE, Case

from utils import ContractViolationError, check_contract, registry

pytestmark = pytest.mark.unit


def names() -> dict[str, Any]:
    body = indent("\n".join(CONTRACT.values()), "    ")
    space: dict[str, Any] = {"__name__": "corpus_case"}
    exec(f"{PRELUDE}\nfrom utils import Contract\nclass K(Contract):\n{body}", space)
    return space


def test_there_are_twenty_legal_and_thirty_four_illegal_definitions() -> None:
    assert (len(CASES), sum(case.is_legal for case in CASES)) == (54, 20)
    assert len({case.title for case in CASES}) == 54


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_definition_is_judged_when_it_is_made(case: Case) -> None:
    codes: tuple[str, ...] = ()
    before = len(registry)

    try:
        exec(case.definition(), names())
    except ContractViolationError as error:
        codes = tuple(violation.code for violation in error.violations)

    assert codes == case.codes
    assert len(registry) == before + case.is_legal


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_plain_class_is_judged_the_same_by_check_contract(case: Case) -> None:
    space = names()
    bases = case.bases.replace(", {contract}", "").replace("{contract}", "object")
    exec(case.definition(header=f"class P({bases}):"), space)

    found = check_contract(space["P"], space["K"])

    assert tuple(violation.code for violation in found) == case.codes
