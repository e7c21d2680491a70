"""What type checkers know about plugins; `test_typing.py` runs mypy --strict over this file.

Every `type: ignore` is an error that must be there: an unused one is an error itself.
"""

from typing import Any, assert_type

from utils import (
    APIContractBase,
    Chain,
    PluginBase,
    Processor,
    PydanticPlugin,
    Transformer,
    ValidationReport,
    Validator,
    registry,
)


class Adds(Processor[int, int], name="adds"):
    version = "1.0.0"
    step = 1

    def process(self, data: int) -> int:
        return data + self.step


class Wrong(Processor[int, int]):
    def process(self, data: str) -> int:  # type: ignore[override]
        return 1


class Missing(Validator[int]):
    pass


class Checks(APIContractBase):
    version, description, author = "1.0.0", "Checks.", "ada"

    def process(self, data: int) -> int:
        return data

    def validate(self, data: int) -> bool | ValidationReport:
        return data > 0


class Middle(Transformer[int, str], abstract=True):
    pass


class Scale(PydanticPlugin, name="scale"):
    factor: int = 2

    def process(self, data: int) -> int:
        return data * self.factor


def uses() -> None:
    processor = registry.create("adds", Processor)
    assert_type(processor, Processor[Any, Any])
    assert_type(registry.create("adds", Validator), Validator[Any])
    assert_type(registry.create("adds", Adds), Adds)
    assert_type(registry.create("adds", PluginBase, "1.0.0"), PluginBase)
    assert_type(registry.create("adds", APIContractBase), APIContractBase)
    assert_type(registry.create("scale", Scale).factor, int)
    assert_type(Adds().process(1), int)
    assert_type(Adds.step, int)
    assert_type(Adds() >> Adds(), Chain)
    assert_type(Scale(factor=3).process(2), int)
    Missing()  # type: ignore[abstract]
    Adds().process("1")  # type: ignore[arg-type]
