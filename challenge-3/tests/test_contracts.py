"""What the metaclass examines, and how it says what is wrong."""

# mypy: ignore-errors
# (most of its classes are wrong on purpose; what type checkers see is in typing_cases.py)

import abc
import asyncio
import dataclasses
import enum
import functools
import inspect
import json
import pickle
import sys
import typing
from collections.abc import AsyncIterator, Awaitable, Iterator
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pytest

from utils import (
    APIContractBase,
    APIContractMeta,
    Contract,
    ContractEnforcerMeta,
    ContractRuntimeError,
    ContractViolationError,
    PluginBase,
    Processor,
    PydanticPlugin,
    Transformer,
    ValidationReport,
    Validator,
    check_contract,
    combine_metaclass,
    get_all_plugins,
    registry,
)

pytestmark = pytest.mark.unit

T = TypeVar("T")


class Shape(Contract):
    def area(self, scale: int) -> float: ...

    @property
    def label(self) -> str: ...


class Flusher(Contract, attributes="optional"):
    async def flush(self, timeout: float = 1.0) -> int: ...


def codes(error: Any) -> list[str]:
    found = getattr(error, "value", error)
    return [violation.code for violation in found.violations]


class TestOneErrorHasAll:
    def test_every_violation_with_code_member_place_and_cure(self) -> None:
        with pytest.raises(ContractViolationError) as caught:

            class Broken(APIContractBase):
                version = "1.0"
                author = " "

                @staticmethod
                def helper() -> int:
                    return 1

                def process(self, payload: Any) -> Any:
                    return payload

        error = caught.value
        assert codes(error) == ["C130", "C131", "C132", "C104", "C101"]
        lines, start = inspect.getsourcelines(
            type(self).test_every_violation_with_code_member_place_and_cure
        )
        by_member = {violation.member: violation for violation in error.violations}
        for member, text in (("version", 'version = "1.0"'), ("author", 'author = " "'),
                             ("process", "def process"), ("validate", "class Broken")):  # fmt: skip
            line = start + next(n for n, each in enumerate(lines) if text in each)
            assert by_member[member].location == f"{__file__}:{line}"
        assert by_member["process"].expected == "parameter 'data'"
        assert by_member["process"].actual == "parameter 'payload'"
        assert "Rename 'payload' to 'data'" in by_member["process"].hint
        for violation in error.violations:
            assert violation.hint
            assert violation.location in str(error)

    def test_to_dict_is_json_and_stable(self) -> None:
        def define() -> dict[str, Any]:
            with pytest.raises(ContractViolationError) as caught:
                type(PluginBase)("Broken", (APIContractBase,), {})
            return caught.value.to_dict()

        first, second = define(), define()

        assert json.dumps(first) == json.dumps(second)
        assert {"code", "member", "expected", "actual", "file", "line", "hint", "location"} <= set(
            first["violations"][0]
        )
        error = ContractViolationError("X", [])
        assert str(pickle.loads(pickle.dumps(error))) == str(error)

    def test_the_invalid_processor_lists_four_and_leaves_no_trace(self) -> None:
        with pytest.raises(ContractViolationError) as caught:

            class InvalidProcessor(APIContractBase):
                version = "1.0.0"

        assert [v.member for v in caught.value.violations] == [
            "description", "author", "process", "validate",
        ]  # fmt: skip
        assert "InvalidProcessor" not in registry
        assert "InvalidProcessor" not in APIContractMeta.get_registry()
        assert not [key for key in registry._meters if key[0] == "InvalidProcessor"]

    def test_the_data_validator_needs_no_attributes(self) -> None:
        class DataValidator(PluginBase):
            def validate(self, data: Any) -> bool:
                return bool(data)

        assert registry.get("DataValidator") is DataValidator
        assert registry.versions("DataValidator") == ["0.0.0"]
        assert DataValidator in get_all_plugins()
        assert DataValidator in PluginBase.get_all_plugins()

    def test_two_contracts_are_both_reported(self) -> None:
        with pytest.raises(ContractViolationError) as caught:

            class Both(Processor[int, int], Validator[int]):
                pass

        assert [(v.member, v.contract) for v in caught.value.violations] == [
            ("process", "Processor"), ("validate", "Validator"),
        ]  # fmt: skip

    def test_a_plugin_base_without_any_method_is_told_all_three(self) -> None:
        with pytest.raises(
            ContractViolationError, match="at least one of process, validate, trans"
        ):

            class Nothing(PluginBase):
                pass

    def test_a_misspelling_is_recognised(self) -> None:
        with pytest.raises(ContractViolationError, match="'proces' a misspelling"):

            class Misspelt(Processor[int, int]):
                def proces(self, data: int) -> int:
                    return data


class TestAttributes:
    @pytest.mark.parametrize(
        "version",
        ["01.0.0", "1.0", 1, None, "1.0.0\n", "1.0.0-01", "v1.0.0", "",
         property(lambda self: "1.0.0")],
    )  # fmt: skip
    @pytest.mark.parametrize("base", [APIContractBase, PluginBase])
    def test_what_is_no_semver_is_rejected(self, base: type, version: Any) -> None:
        body = {"process": lambda self, data: data, "validate": lambda self, data: True,
                "description": "d", "author": "a", "version": version}  # fmt: skip

        with pytest.raises(ContractViolationError) as caught:
            ContractEnforcerMeta("P", (base,), body) if base is PluginBase else APIContractMeta(
                "P", (base,), body
            )

        assert codes(caught) == ["C130"]

    @pytest.mark.parametrize("version", ["1.0.0-rc.1+b5", "0.0.0", "10.20.30", "1.0.0-0.3.7"])
    def test_what_is_semver_is_accepted(self, version: str) -> None:
        body = {"process": lambda self, data: data, "version": version}
        ContractEnforcerMeta("P", (PluginBase,), body)
        assert registry.versions("P") == [version]

    def test_an_annotation_without_a_value_is_rejected(self) -> None:
        with pytest.raises(ContractViolationError) as caught:

            class P(PluginBase):
                version: ClassVar[str]

                def process(self, data: Any) -> Any: ...

        assert codes(caught) == ["C130"]
        assert caught.value.violations[0].actual == "only an annotation"

    @pytest.mark.filterwarnings("ignore:Field name")
    def test_a_field_of_a_pydantic_plugin_is_no_class_attribute(self) -> None:
        with pytest.raises(ContractViolationError, match="ClassVar"):

            class P(PydanticPlugin):
                version: str = "1.0.0"

                def process(self, data: Any) -> Any: ...


class TestReading:
    def test_no_property_of_a_plugin_ever_runs(self) -> None:
        class Touchy(Shape):
            version, description, author = "1.0.0", "d", "a"

            def area(self, scale: int) -> float:
                return 1.0

            @property
            def label(self) -> str:
                raise AssertionError("it ran")

            def __getattr__(self, name: str) -> Any:
                raise AssertionError("it ran")

        assert check_contract(Touchy) == []

    def test_an_annotation_that_cannot_be_compared_says_nothing(self) -> None:
        class Array:
            def __hash__(self) -> int:
                raise ValueError("mutable")

            def __eq__(self, other: object) -> bool:
                raise ValueError("ambiguous")

        class Square(Shape):
            version, description, author, label = "1.0.0", "d", "a", "square"

            def area(self, scale: Array()) -> Array():
                return 1.0

        assert Square().area(2) == 1.0

    def test_check_contract_works_for_any_class_and_changes_nothing(self) -> None:
        class Square:
            def area(self) -> float:
                return 1.0

            label = 3

        before = dict(vars(Square)), len(registry)

        found = check_contract(Square, Shape)

        assert [v.code for v in found] == ["C130", "C131", "C132", "C102", "C121"]
        assert (dict(vars(Square)), len(registry)) == before

    def test_check_contract_accepts_a_plain_class_as_the_contract(self) -> None:
        class Duck(Protocol):
            def quack(self, times: int) -> str: ...

        class Mallard:
            def quack(self, times: int) -> int:
                return times

        assert [v.code for v in check_contract(Mallard, Duck)] == ["C121"]

    @pytest.mark.parametrize("thing", [42, None, "text", object()])
    def test_check_contract_never_raises(self, thing: Any) -> None:
        assert [v.code for v in check_contract(thing, Shape)] == ["C190"]

        class Leaves:
            label = ""

            def area(self, scale: "exit(3)") -> float: ...

        assert [v.code for v in check_contract(Leaves, Shape)] == ["C130", "C131", "C132"]
        assert check_contract(type("Odd", (), {"__annotations__": 3}), Shape)

    def test_strict_wants_annotations_and_signatures(self) -> None:
        class Loose(Processor[int, int]):
            def process(self, data):
                return data

        assert check_contract(Loose) == []
        assert [v.code for v in check_contract(Loose, strict=True)] == ["C120", "C121"]

        class Native(Processor[int, int]):
            process = staticmethod(max)

        assert check_contract(Native) == []
        assert [v.code for v in check_contract(Native, strict=True)] == ["C190"]
        assert Native().process([3, 4]) == 4

    def test_a_partial_is_not_bound(self) -> None:
        def two(mode: int, data: int) -> int:
            return mode + data

        def three(self: Any, mode: int, data: int) -> int:
            return data

        class Good(Processor[int, int]):
            process = partial(two, 1)

        assert Good().process(2) == 3
        with pytest.raises(ContractViolationError):

            class Bad(Processor[int, int]):
                process = partial(three, 1)

    def test_a_mixin_behind_the_contract_is_told_to_swap(self) -> None:
        class Mixin:
            def process(self, data: int) -> int:
                return data

        with pytest.raises(ContractViolationError, match="Swap the bases"):

            class P(Processor[int, int], Mixin):
                pass

        class Q(Mixin, Processor[int, int]):
            pass

        assert Q().process(1) == 1

    def test_a_signature_that_lies_is_rejected(self) -> None:
        def claims(self, data): ...

        def takes(self): ...

        takes.__signature__ = inspect.signature(claims)
        with pytest.raises(ContractViolationError) as caught:

            class P(PluginBase):
                process = takes

        assert codes(caught) == ["C113"]

    def test_var_args_of_the_contract_are_needed(self) -> None:
        class Caller(Contract, attributes="optional"):
            def call(self, *args: int, **options: str) -> None: ...

        with pytest.raises(ContractViolationError) as caught:

            class P(Caller):
                def call(self) -> None: ...

        assert codes(caught) == ["C108", "C108"]

    def test_positional_only_in_the_contract_frees_the_name(self) -> None:
        class Freed(Contract, attributes="optional"):
            def call(self, value: int, /) -> int: ...

        class P(Freed):
            def call(self, number: int) -> int:
                return number

        assert P().call(1) == 1

    def test_a_property_that_can_be_set_must_stay_so(self) -> None:
        class Tank(Contract, attributes="optional"):
            @property
            def level(self) -> int: ...

            @level.setter
            def level(self, value: int) -> None: ...

        with pytest.raises(ContractViolationError, match="setter"):

            class P(Tank):
                @property
                def level(self) -> int:
                    return 1


class TestTypes:
    def test_type_variables_are_substituted_through_the_mro(self) -> None:
        class Middle(Processor[T, str], Generic[T], abstract=True):
            pass

        class Good(Middle[int]):
            def process(self, data: int) -> str:
                return str(data)

        with pytest.raises(ContractViolationError) as caught:

            class Bad(Middle[int]):
                def process(self, data: str) -> int:
                    return 1

        assert codes(caught) == ["C120", "C121"]
        assert caught.value.violations[0].expected == "'data' accepts int"

    def test_a_name_that_is_known_later_is_checked_at_the_first_call(self) -> None:
        space: dict[str, Any] = {"__name__": "later"}
        exec(
            "from __future__ import annotations\n"
            "from utils import Processor\n"
            "class P(Processor[int, int]):\n"
            "    def process(self, data: Later) -> int:\n"
            "        return 1\n"
            "class Q(Processor[int, int]):\n"
            "    def process(self, data: Never) -> int:\n"
            "        return 2\n",
            space,
        )
        space["Later"] = str

        with pytest.raises(ContractRuntimeError) as caught:
            space["P"]().process(1)

        assert codes(caught) == ["C120"]
        assert [v.member for v in registry.verify()] == ["process"]
        assert registry.plugin("P").figures()["process"].calls == 0
        space["Later"] = int
        assert space["P"]().process(1) == 1
        assert space["Q"]().process(1) == 2  # a name for type checkers only is no error

    @pytest.mark.parametrize(
        ("declared", "defined"),
        [
            ("@property\n    def ready(self)", "@property\n    def ready(self)"),
            ("@abc.abstractmethod\n    def _hook(self)", "def _hook(self)"),
        ],
        ids=["property", "private"],
    )
    def test_what_is_not_measured_is_checked_at_the_first_instance(
        self, declared: str, defined: str
    ) -> None:
        space: dict[str, Any] = {"__name__": "later", "abc": abc}
        exec(
            "from __future__ import annotations\n"
            "from utils import Contract\n"
            "class K(Contract, attributes='none'):\n"
            f"    {declared} -> int: ...\n"
            "class P(K):\n"
            f"    {defined} -> Later: ...\n",
            space,
        )
        space["Later"] = str

        with pytest.raises(ContractRuntimeError) as caught:
            space["P"]()

        assert codes(caught) == ["C121"]
        space["Later"] = bool
        assert space["P"]()

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="there is no `type` statement")
    @pytest.mark.parametrize("annotation", ["Alias", "list[Alias]", "Pair[int]"])
    def test_an_alias_that_is_known_later_is_checked_at_the_first_call(
        self, annotation: str
    ) -> None:
        space: dict[str, Any] = {"__name__": "later"}
        exec(
            "from utils import Processor\n"
            "type Alias = Later\n"
            "type Pair[T] = tuple[T, Later]\n"
            "class P(Processor[int, bytes]):\n"
            f"    def process(self, data: int) -> {annotation}: ...\n",
            space,
        )
        space["Later"] = str

        with pytest.raises(ContractRuntimeError):
            space["P"]().process(1)

    def test_self_is_the_class(self) -> None:
        class Copier(Contract, attributes="optional"):
            def copy(self) -> typing.Self: ...

        class Good(Copier):
            def copy(self) -> "Good":
                return self

        with pytest.raises(ContractViolationError):

            class Bad(Copier):
                def copy(self) -> int:
                    return 1


class TestColors:
    def test_a_sync_wrapper_over_async_is_found_out_at_the_first_call(self) -> None:
        def passes(function: Any) -> Any:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

            return wrapper

        def runs(function: Any) -> Any:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                function(*args, **kwargs).close()
                return 7

            return wrapper

        class Good(Flusher):
            @passes
            async def flush(self, timeout: float = 1.0) -> int:
                return 1

        class Bad(Flusher):
            @runs
            async def flush(self, timeout: float = 1.0) -> int:
                return 1

        assert asyncio.run(Good().flush()) == 1
        assert registry.plugin("Good").figures()["flush"].calls == 1
        with pytest.raises(ContractRuntimeError, match="C111"):
            Bad().flush()
        assert registry.plugin("Bad").figures()["flush"].errors == 1

    def test_generators_stand_where_iterators_are_promised(self) -> None:
        class Rows(Contract, attributes="optional"):
            def rows(self) -> Iterator[int]: ...

            def later(self) -> AsyncIterator[int]: ...

        class Good(Rows):
            def rows(self) -> Iterator[int]:
                yield 1

            async def later(self) -> AsyncIterator[int]:
                yield 1

        assert list(Good().rows()) == [1]
        with pytest.raises(ContractViolationError) as caught:

            class Bad(Rows):
                async def rows(self) -> AsyncIterator[int]:
                    yield 1

                def later(self) -> Iterator[int]:
                    yield 1

        assert codes(caught) == ["C111", "C111"]

    def test_the_lenient_base_takes_both_colors_but_no_generator(self) -> None:
        class Later(PluginBase):
            async def process(self, data: int) -> int:
                return data + 1

        assert asyncio.run(Later().process(1)) == 2
        with pytest.raises(ContractViolationError) as caught:

            class Yields(PluginBase):
                def validate(self, data: Any) -> Any:
                    yield False

        assert codes(caught) == ["C111"]

    def test_a_union_with_an_awaitable_leaves_the_choice(self) -> None:
        class Free(Contract, attributes="optional"):
            def go(self) -> int | Awaitable[int]: ...

        class Sync(Free):
            def go(self) -> int:
                return 1

        class Async(Free):
            async def go(self) -> int:
                return 1


class TestAbstract:
    def test_an_abstract_class_is_neither_examined_nor_registered_nor_made(self) -> None:
        class Middle(Processor[int, int], abstract=True):
            pass

        class Other(Processor[int, int], abc.ABC):
            pass

        for cls in (Middle, Other, Processor, PluginBase, Contract):
            assert cls.__name__ not in registry
            with pytest.raises(TypeError, match="cannot be instantiated"):
                cls()
        with pytest.raises(ContractViolationError):

            class Child(Middle):
                pass

    def test_register_false_is_examined_and_not_registered(self) -> None:
        class Quiet(Processor[int, int], register=False):
            def process(self, data: int) -> int:
                return data

        assert Quiet().process(1) == 1
        assert "Quiet" not in registry
        with pytest.raises(ContractViolationError):

            class Broken(Processor[int, int], register=False):
                pass

    def test_a_subclass_has_its_own_name_and_is_examined(self) -> None:
        class Parent(Processor[int, int], name="parent"):
            def process(self, data: int) -> int:
                return data

        class Child(Parent):
            pass

        assert registry.get("parent") is Parent
        assert registry.get("Child") is Child
        with pytest.raises(ContractViolationError):

            class Broken(Parent):
                def process(self, data: int, mode: int) -> int:
                    return data

    @pytest.mark.parametrize("name", ["failed", "reload", "a b", "../x", "", "x" * 65, "é", 3])
    def test_names_that_cannot_be_paths_are_refused(self, name: Any) -> None:
        if name == "":
            return  # an empty name is no name: the class name is taken
        with pytest.raises(ContractViolationError) as caught:

            class P(PluginBase, name=name):
                def process(self, data: Any) -> Any: ...

        assert codes(caught) == ["C140"]


class TestMadeTwice:
    def test_a_slotted_dataclass_is_one_plugin_and_counts_once(self) -> None:
        @dataclasses.dataclass(slots=True)
        class Scale(Processor[int, int], name="scale"):
            factor: int = 2
            version: ClassVar[str] = "1.2.0"

            def process(self, data: int) -> int:
                return data * self.factor

        assert registry.get("scale") is Scale
        assert registry.versions("scale") == ["1.2.0"]
        assert Scale(3).process(2) == 6
        assert registry.plugin("scale").figures()["process"].calls == 1
        assert not hasattr(Scale(3), "__dict__")

    def test_a_slotted_dataclass_keeps_register_false(self) -> None:
        @dataclasses.dataclass(slots=True)
        class Quiet(Processor[int, int], register=False):
            def process(self, data: int) -> int:
                return data

        assert "Quiet" not in registry

    def test_attrs_classes_work_with_super(self) -> None:
        attrs = pytest.importorskip("attrs")

        class Base(Processor[int, int]):
            def process(self, data: int) -> int:
                return data + 1

        @attrs.define
        class Child(Base):
            factor: int = 2

            def process(self, data: int) -> int:
                return super().process(data) * self.factor

        assert Child(3).process(1) == 6
        assert registry.plugin("Child").figures()["process"].calls == 1
        assert registry.plugin("Base").figures()["process"].calls == 0

    def test_a_slot_may_give_a_property(self) -> None:
        attrs = pytest.importorskip("attrs")

        class Base(Shape, abstract=True):
            __slots__ = ()
            version, description, author = "1.0.0", "d", "a"

            def area(self, scale: int) -> float:
                return 1.0

        @dataclasses.dataclass(slots=True)
        class ByDataclass(Base):
            label: str

        @dataclasses.dataclass(slots=True)
        class ByField(Base):
            label: str = dataclasses.field(kw_only=True)

        @attrs.define
        class ByAttrs(Base):
            label: str

        @dataclasses.dataclass
        class ByDefault(Base):
            label: str = "x"

        assert ByDataclass("x").label == ByField(label="x").label == ByAttrs("x").label == "x"
        assert ByDefault().label == "x"
        with pytest.raises(ContractViolationError) as caught:

            class Bare(Base):
                label: str

        assert codes(caught) == ["C101"]

    def test_a_field_that_the_property_of_the_contract_hides_is_found_out(self) -> None:
        @dataclasses.dataclass
        class Hidden(Shape):
            label: str
            version: ClassVar[str] = "1.0.0"
            description: ClassVar[str] = "d"
            author: ClassVar[str] = "a"

            def area(self, scale: int) -> float:
                return 1.0

        with pytest.raises(ContractRuntimeError, match="slots=True"):
            Hidden("x")

    def test_a_decorated_class_that_gets_no_field_is_found_out_at_the_first_instance(self) -> None:
        def plain(cls: Any) -> Any:
            return cls

        @plain
        class Bare(Shape):
            label: str
            version, description, author = "1.0.0", "d", "a"

            def area(self, scale: int) -> float:
                return 1.0

        with pytest.raises(ContractRuntimeError) as caught:
            Bare()
        assert codes(caught) == ["C101"]

    def test_when_the_second_making_fails_the_first_is_gone_too(self) -> None:
        with pytest.raises(ContractViolationError, match="C130"):

            @dataclasses.dataclass(slots=True)
            class P(Processor[int, int]):
                version: str = "1.0.0"  # as a slot it is no class attribute any more

                def process(self, data: int) -> int:
                    return data

        assert "P" not in registry


class TestOtherMetaclasses:
    def test_a_pydantic_plugin_has_settings(self) -> None:
        class Scale(PydanticPlugin, name="scaled"):
            version: ClassVar[str] = "2.0.0"
            factor: int = 2

            def process(self, data: int) -> int:
                return data * self.factor

        assert registry.create("scaled", Scale).process(2) == 4
        assert Scale(factor=5).process(2) == 10
        assert Scale(factor=5).model_dump() == {"factor": 5}
        with pytest.raises(ContractViolationError):

            class Broken(PydanticPlugin):
                def process(self, payload: int) -> int:
                    return payload

    def test_combine_metaclass_joins_enums_and_protocols(self) -> None:
        class Unit(
            Processor[float, float], enum.Enum, metaclass=combine_metaclass(Processor, enum.Enum)
        ):
            FEET = 0.3048

            def process(self, data: float) -> float:
                return data * float(self.value)

        assert Unit.FEET.process(10) == pytest.approx(3.048)

        class Named(Protocol):
            def name(self) -> str: ...

        class P(Processor[int, int], Named, metaclass=combine_metaclass(Processor, Named)):
            def name(self) -> str:
                return "n"

            def process(self, data: int) -> int:
                return data

        assert P().process(1) == 1
        assert combine_metaclass(Processor, Validator) is ContractEnforcerMeta
        assert combine_metaclass(APIContractBase, Processor) is APIContractMeta


class TestLaterChanges:
    def plugin(self) -> Any:
        class P(Processor[int, int]):
            def process(self, data: int) -> int:
                return data

        return P

    def test_a_bad_redefinition_is_refused_and_the_old_stays(self) -> None:
        cls = self.plugin()

        with pytest.raises(ContractViolationError) as caught:
            cls.process = lambda self, payload: payload
        with pytest.raises(ContractViolationError) as deleted:
            del cls.process
        with pytest.raises(ContractViolationError):
            cls.version = "one"

        assert codes(caught) == ["C150", "C104"]
        assert deleted.value.violations[1].actual == "nothing"
        assert cls().process(3) == 3

    def test_a_good_redefinition_is_measured(self) -> None:
        cls = self.plugin()

        cls.process = lambda self, data: data + 1
        cls.other = 5
        del cls.other

        assert cls().process(3) == 4
        assert registry.plugin("P").figures()["process"].calls == 1

    def test_a_change_of_a_parent_is_examined_for_its_children(self) -> None:
        parent = self.plugin()

        class Child(parent):
            pass

        class Strict(parent, Transformer[int, int]):
            def transform(self, data: int) -> int:
                return data

        parent.process = lambda self, data: data * 10
        assert Child().process(2) == 20
        assert registry.plugin("Child").figures()["process"].calls == 1
        assert registry.plugin("P").figures()["process"].calls == 0
        with pytest.raises(ContractViolationError):
            del parent.process
        assert Child().process(2) == 20

    def test_the_version_is_half_of_the_key_and_stays(self) -> None:
        cls = self.plugin()
        cls.version = "0.0.0"

        with pytest.raises(ContractViolationError) as caught:
            cls.version = "2.0.0"

        assert codes(caught) == ["C150"]
        assert registry.plugin("P").version.text == "0.0.0"
        registry.unregister("P")
        cls.version = "2.0.0"

    def test_the_bases_are_those_it_was_examined_with(self) -> None:
        cls = self.plugin()
        bases = cls.__bases__

        with pytest.raises(ContractViolationError) as caught:
            cls.__bases__ = (Contract,)

        assert codes(caught) == ["C150"]
        assert cls.__bases__ == bases

    def test_what_is_abstract_is_demanded_whatever_its_name(self) -> None:
        class K(Contract, attributes="none"):
            @abc.abstractmethod
            def _hook(self) -> int: ...

        class P(K):
            def _hook(self) -> int:
                return 1

        with pytest.raises(ContractViolationError):
            P._hook = lambda self, more: more
        with pytest.raises(ContractViolationError):
            del P._hook
        assert P()._hook() == 1


class TestCompletedByDecorators:
    """Methods that `@dataclass(order=True)` and the like are about to make."""

    def contract(self) -> Any:
        class K(Contract, attributes="none"):
            @abc.abstractmethod
            def __lt__(self, other: object) -> bool: ...

        return K

    def test_a_dataclass_may_make_what_is_abstract(self) -> None:
        @dataclasses.dataclass(order=True)
        class P(self.contract()):
            x: int = 1

        assert P(1) < P(2)

    def test_one_that_does_not_is_found_out_at_the_first_instance(self) -> None:
        @dataclasses.dataclass
        class P(self.contract()):
            x: int = 1

        with pytest.raises(ContractRuntimeError) as caught:
            P()
        assert codes(caught) == ["C101"]

    def test_without_a_decorator_it_is_missing_at_once(self) -> None:
        with pytest.raises(ContractViolationError) as caught:

            class P(self.contract()):
                x: int = 1

        assert codes(caught) == ["C101"]


def test_a_pydantic_plugin_may_be_generic() -> None:
    """`P[int]` is a model of its own for pydantic, and no other plugin."""
    T = TypeVar("T")

    class P(PydanticPlugin, Generic[T]):
        scale: float = 1.0

        def process(self, data: float) -> float:
            return data * self.scale

    assert P[int](scale=2).process(3) == 6
    assert [plugin.name for plugin in registry.snapshot() if "P" in plugin.name[:1]] == ["P"]


def test_a_report_is_true_when_it_is_empty() -> None:
    assert ValidationReport()
    report = ValidationReport.of([("/a", "No.")])
    assert not report
    assert report.to_dict() == {"valid": False, "errors": [{"pointer": "/a", "message": "No."}]}
