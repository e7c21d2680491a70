"""Chains fit before they run, and say which joint or step is wrong."""

import asyncio
from typing import Any

import pytest

from utils import (
    Chain,
    ChainError,
    ChainInvalid,
    ChainTypeError,
    PluginBase,
    Processor,
    Transformer,
    ValidationReport,
    Validator,
)

pytestmark = pytest.mark.unit


class Positive(Validator[int], register=False):
    def validate(self, data: int) -> bool | ValidationReport:
        return ValidationReport() if data > 0 else ValidationReport.of([("", "Not positive.")])


class Text(Transformer[int, str], register=False):
    def transform(self, data: int) -> str:
        return str(data)


class Length(Processor[str, int], register=False):
    def process(self, data: str) -> int:
        return len(data)


class Loose(PluginBase, register=False):
    def process(self, data):  # type: ignore[no-untyped-def]
        return data


def test_a_value_goes_through_all_stages() -> None:
    chain = Positive() >> Text() >> Length()

    assert chain.run(1234) == 4
    assert isinstance(chain, Chain)
    assert (Positive() >> (Text() >> Length())).run(10) == 2
    assert Chain(Text()).run(5) == "5"


def test_types_are_checked_when_it_is_composed_and_the_joint_is_named() -> None:
    with pytest.raises(ChainTypeError) as caught:
        Positive() >> Text() >> Positive()

    text = str(caught.value)
    assert "Joint 2, between Text.transform and Positive.validate" in text
    assert "gives str" in text
    assert "takes int" in text
    assert caught.value.joint == 2


def test_a_validator_says_what_flows() -> None:
    with pytest.raises(ChainTypeError, match=r"Joint 1, between Positive\.validate and Length"):
        Positive() >> Length()


def test_what_is_not_annotated_fits_and_the_contract_fills_in() -> None:
    class Bare(Processor[str, int], register=False):
        def process(self, data):  # type: ignore[no-untyped-def]
            return len(data)

    assert (Loose() >> Length() >> Loose()).run("abc") == 3
    with pytest.raises(ChainTypeError):
        Bare() >> Length()


def test_a_no_stops_the_chain_with_its_reasons() -> None:
    with pytest.raises(ChainInvalid) as caught:
        (Positive() >> Text()).run(-1)

    assert caught.value.step == 1
    assert [error.message for error in caught.value.report.errors] == ["Not positive."]
    assert isinstance(caught.value, ValueError)


def test_a_stage_that_raises_is_named_and_chained() -> None:
    class Fails(Processor[str, int], register=False):
        def process(self, data: str) -> int:
            raise KeyError(data)

    with pytest.raises(ChainError, match=r"Step 2 of 2, Fails.process, raised KeyError") as caught:
        (Text() >> Fails()).run(1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_plugin_with_several_methods_runs_them_in_order() -> None:
    class All(PluginBase, register=False):
        def process(self, data: str) -> list[str]:
            return [data]

        def validate(self, data: int) -> bool:
            return data > 0

        def transform(self, data: int) -> str:
            return str(data)

    assert Chain(All()).run(3) == ["3"]
    with pytest.raises(ChainInvalid):
        Chain(All()).run(-3)


def test_async_stages_are_awaited() -> None:
    class Later(PluginBase, register=False):
        async def process(self, data: str) -> str:
            await asyncio.sleep(0)
            return data + "!"

    chain = Text() >> Later()
    assert asyncio.run(chain.run_async(1)) == "1!"
    with pytest.raises(TypeError, match="run_async"):
        chain.run(1)


@pytest.mark.parametrize("thing", [object(), 3, Text])
def test_what_is_no_plugin_is_refused(thing: Any) -> None:
    with pytest.raises(ChainTypeError):
        Chain(Text(), thing)


def test_a_verdict_that_is_none_is_an_error() -> None:
    class Odd(PluginBase, register=False):
        def validate(self, data: Any) -> Any:
            return "yes"

    with pytest.raises(ChainError, match="TypeError"):
        Chain(Odd()).run(1)
