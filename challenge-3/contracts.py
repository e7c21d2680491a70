"""What a contract demands, and every place where a class does not give it.

`examine` is the one check behind the metaclass, `check_contract` and `python check.py`. It has no
side effects and runs nothing of the class. The codes:

    C101 missing             C102-C105 positions and names    C106 defaults    C107 keywords
    C108 *args, **kwargs     C109 further required ones       C110 binding     C111 async, yield
    C112 no self             C113 a decorator that lies       C120 parameter types
    C121 return types        C130-C132 version, description, author            C140 identity
    C150 later changes       C190 not introspectable (strict only)
"""

import difflib
import inspect
import linecache
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import FunctionType
from typing import Any, Literal, TypeVar

from typing_extensions import is_typeddict

from calls import compare_calls, same_shape
from signatures import (
    KEYWORD_ONLY,
    POSITIONAL,
    POSITIONAL_ONLY,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Color,
    Fault,
    Kind,
    Member,
    Param,
    parameters_of,
    promises_await,
    read,
    setter_of,
    text_of_parameters,
)
from subtyping import (
    EMPTY,
    UNPACKS,
    UNRESOLVED,
    assignable,
    awaited,
    has_awaitable_arm,
    is_awaitable,
    is_iterator,
    substitute,
    text_of,
    type_arguments,
    upper_bound,
)
from versions import parse_version

SPEC = "__contract_spec__"  # in the `__dict__` of a contract
ATTRIBUTES = {"version": "C130", "description": "C131", "author": "C132"}
Deferred = Literal["types", "awaitable", "not awaitable", "field"]


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


@dataclass(frozen=True)
class ContractSpec:
    """What one contract demands: all members, or (`any_of`) at least one of them."""

    cls: type
    members: Mapping[str, Member]
    attributes: Literal["required", "optional", "none"] = "none"
    any_of: bool = False

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.cls.__name__


@dataclass
class Findings:
    """What an examination found out about a class."""

    violations: list[Violation] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    deferred: dict[str, set[Deferred]] = field(default_factory=dict)

    def defer(self, name: str, what: Deferred) -> None:
        """Note what can only be known later."""
        self.deferred.setdefault(name, set()).add(what)


def spec_of(
    cls: type,
    *,
    attributes: Literal["required", "optional", "none"] = "none",
    any_of: bool = False,
    spaces: Any = None,
) -> ContractSpec:
    """Read the members that a class declares: what is public or abstract in its body."""
    members = {
        name: member
        for name, value in vars(cls).items()
        if name not in ATTRIBUTES and not isinstance(value, type)
        if not name.startswith("_") or getattr(value, "__isabstractmethod__", False)
        if (member := read(name, value, cls, spaces)).kind not in (Kind.DATA, Kind.NOTHING)
    }
    for name, member in members.items():
        if name.startswith("__") and name != "__call__":  # `a < b`: nobody passes it by name
            members[name] = replace(member, claimed=_by_position(member.claimed or ()))
    return ContractSpec(cls, members, attributes, any_of)


def _by_position(parameters: tuple[Param, ...]) -> tuple[Param, ...]:
    return tuple(
        p._replace(kind=POSITIONAL_ONLY) if p.kind == POSITIONAL else p for p in parameters
    )


def contracts_of(cls: type) -> list[ContractSpec]:
    """The contracts in the MRO, nearest first."""
    return [spec for base in cls.__mro__ if (spec := vars(base).get(SPEC)) is not None]


def examine(
    cls: type,
    specs: Iterable[ContractSpec],
    *,
    strict: bool = False,
    place: tuple[str, int] | None = None,
    spaces: Any = None,
    decorated: bool = False,
    overrides: Mapping[tuple[type, str], Any] | None = None,
) -> Findings:
    """Compare a class with contracts; `overrides` are members as they would be after a change."""
    specs = list(specs)
    return _Examination(cls, specs, strict, place, spaces, decorated, dict(overrides or {})).run()


GONE: Any = object()  # there is no such member (any more)


class _Examination:
    def __init__(
        self,
        cls: type,
        specs: list[ContractSpec],
        strict: bool,
        place: tuple[str, int] | None,
        spaces: Any,
        decorated: bool,
        overrides: dict[tuple[type, str], Any],
    ) -> None:
        self.cls = cls
        self.specs = specs
        self.strict = strict
        self.given_place = place
        self.spaces = spaces
        self.decorated = decorated
        self.overrides = overrides
        self.found = Findings()
        self.declarers = {spec.cls for spec in specs}
        self._arguments: dict[type, dict[Any, Any]] | None = None
        self.model_fields: set[str] = set()
        self.mro = [(base, base.__dict__) for base in cls.__mro__]

    def run(self) -> Findings:
        demands = {spec.attributes for spec in self.specs}
        if demands & {"required", "optional"}:
            for _, space in self.mro:
                self.model_fields.update(space.get("__pydantic_fields__") or ())
            for name, code in ATTRIBUTES.items():
                self.attribute(name, code, required="required" in demands)
        for spec in self.specs:
            missing = [name for name in spec.members if not self.member(spec, name)]
            if missing and (not spec.any_of or len(missing) == len(spec.members)):
                self.report_missing(spec, missing)
        self.left_abstract()
        return self.found

    def left_abstract(self) -> None:
        """What no contract of ours demands, and yet keeps instances from being made."""
        left = getattr(self.cls, "__abstractmethods__", frozenset())
        for name in sorted(left.difference(*(spec.members for spec in self.specs))):
            value, owner = self.lookup(name)
            if not getattr(value, "__isabstractmethod__", False):
                continue
            if self.decorated:  # such as @dataclass(order=True), @total_ordering
                self.found.defer(name, "field")
                continue
            file, line = self.class_place()
            hint = f"Define {name}, or write `abstract=True` in the class statement."
            self.found.violations.append(
                Violation("C101", name, "a definition", f"abstract in {owner.__name__}", file,
                          line, hint, owner.__name__)
            )  # fmt: skip

    # --- attributes ---------------------------------------------------------------------------

    def attribute(self, name: str, code: str, *, required: bool) -> None:
        """`version`, `description` and `author` are real values of the class."""
        value = GONE if name in self.model_fields else self.lookup(name)[0]
        if value is GONE or self.comes_from_contract(name):
            if required or self.is_annotated(name):
                self.report_attribute(code, name, GONE)
            return
        if name == "version":
            good = parse_version(value) is not None
        else:
            good = isinstance(value, str) and bool(value.strip())
            if not required and value == "":
                good = True
        if not good:
            self.report_attribute(code, name, value)

    def comes_from_contract(self, name: str) -> bool:
        """Whether the first definition of it in the MRO is the default of a contract."""
        return SPEC in vars(self.lookup(name)[1])

    def report_attribute(self, code: str, name: str, value: Any) -> None:
        if name == "version":
            expected, example = "a SemVer 2.0.0 string such as '1.2.0'", '"1.0.0"'
        else:
            expected, example = "a string that is not blank", '"…"'
        if value is GONE:
            actual = "only an annotation" if self.is_annotated(name) else "nothing"
            if self.is_field(name):
                actual = "a field of the instances"
        elif isinstance(value, (str, int, float, bool, tuple, type(None))):
            actual = f"{value!r:.80}"
        else:
            actual = f"a {type(value).__name__}"
        hint = f"Write `{name}: ClassVar[str] = {example}` in the class body."
        file, line = self.line_of_name(name)
        self.found.violations.append(
            Violation(code, name, expected, actual, file, line, hint, self.attribute_contract())
        )

    def attribute_contract(self) -> str:
        ranked = sorted(self.specs, key=lambda spec: spec.attributes != "required")
        return ranked[0].name if ranked else ""

    # --- finding ------------------------------------------------------------------------------

    def lookup(self, name: str) -> tuple[Any, type]:
        """The value an instance would find, without running a descriptor; GONE if there is none."""
        for base, space in self.mro:
            value = space.get(name, GONE)
            if self.overrides:
                value = self.overrides.get((base, name), value)
            if value is not GONE:
                return value, base
        return GONE, self.cls

    def is_annotated(self, name: str) -> bool:
        return any(
            name in (vars(base).get("__annotations__") or ())
            for base in self.cls.__mro__
            if base not in self.declarers
        )

    def is_field(self, name: str) -> bool:
        """Whether a dataclass, attrs or pydantic has made an attribute of instances of it."""
        for base in self.cls.__mro__:
            space = vars(base)
            if name in (space.get("__pydantic_fields__") or ()):
                return True
            if name in (space.get("__dataclass_fields__") or ()):
                return True
            if any(each.name == name for each in space.get("__attrs_attrs__") or ()):
                return True
        return False

    def is_contract(self, base: type) -> bool:
        return base in self.declarers or SPEC in vars(base) or base is object

    # --- members ------------------------------------------------------------------------------

    def member(self, spec: ContractSpec, name: str) -> bool:
        """Examine one member; False when the class has none."""
        declared = spec.members[name]
        value, owner = self.lookup(name)
        if value is GONE or self.is_contract(owner):
            return self.may_be_completed(declared)
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if isinstance(value, property):
            function = value.fget
        if isinstance(function, FunctionType) and getattr(function, "__isabstractmethod__", False):
            return False
        found = read(name, value, owner, self.spaces)
        if found.kind is Kind.NOTHING and declared.kind is not Kind.PROPERTY:
            return False
        self.found.members[name] = found
        for fault in self.compare(spec, declared, found):
            self.report(spec, declared, found, fault)
        return True

    def may_be_completed(self, declared: Member) -> bool:
        """A decorator that still has to run may give a property by a slot, or make `__lt__`."""
        name = declared.name
        may_be_slot = declared.kind is Kind.PROPERTY and self.is_annotated(name)
        may_be_made = name.startswith("__") and name not in vars(self.cls)
        if self.decorated and (may_be_made or may_be_slot and not self.is_field(name)):
            self.found.defer(name, "field")
            return True
        return False

    def compare(self, spec: ContractSpec, declared: Member, found: Member) -> Iterator[Fault]:
        if found.is_copy_of(declared):
            return
        if fault := _binding(declared, found):
            yield fault
            return
        if declared.kind is Kind.PROPERTY:
            if found.color is not Color.SYNC:
                yield _colored(declared, found)
                return
            target = self.contract_type(spec, declared, declared.annotation)
            source = self.found_type(found, found.annotation)
            if found.kind is Kind.NOTHING and source is EMPTY:
                source = type(None)
            yield from self.returns(source, target)
            yield from self.setting(spec, declared, found)
            return
        if found.kind is Kind.DESCRIPTOR:
            yield from self.not_introspectable(declared, found)
            return
        if not found.has_self:
            yield Fault(
                "C112", "a first parameter for the instance", found.text,
                "Write 'self' as the first parameter, or make it a @staticmethod.",
            )  # fmt: skip
            return
        faults = list(self.calls(declared, found))
        yield from faults
        if not any(fault.code in ("C113", "C190") for fault in faults):
            yield from self.parameter_types(spec, declared, found)
        yield from self.outcome(spec, declared, found)

    def calls(self, declared: Member, found: Member) -> Iterator[Fault]:
        """Names, positions, defaults; of what the code takes and of what it says it takes."""
        wanted = declared.claimed
        if found.parameters is None:
            yield from self.not_introspectable(declared, found)
            return
        claimed = found.claimed if found.claimed is not None else found.parameters
        if wanted is None:
            return
        wanted, claimed = _spelled_out(declared, wanted), _spelled_out(found, claimed)
        if claimed is found.parameters or same_shape(claimed, found.parameters):
            if not same_shape(wanted, claimed):
                yield from compare_calls(wanted, claimed)
            return
        told = list(compare_calls(wanted, claimed))
        if told:
            if not self.is_answered_by_wrapper(wanted, found):
                yield from told
        elif list(compare_calls(wanted, found.parameters)):
            real = text_of_parameters(found.parameters, bound=found.kind)
            yield Fault(
                "C113", text_of_parameters(claimed, bound=found.kind),
                f"{real} in the function that is called",
                "Let the decorator's wrapper pass on what it says: (self, *args, **kwargs).",
            )  # fmt: skip

    def is_answered_by_wrapper(self, wanted: tuple[Param, ...], found: Member) -> bool:
        """Whether a decorator's function that passes nothing on unseen takes all these calls."""
        real = found.parameters or ()
        passes_on = any(param.kind in (VAR_POSITIONAL, VAR_KEYWORD) for param in real)
        return not passes_on and not list(compare_calls(wanted, real))

    def not_introspectable(self, declared: Member, found: Member) -> Iterator[Fault]:
        if self.strict:
            yield Fault(
                "C190", declared.text, f"{found.kind.value} without a signature",
                "Wrap it in a function that spells its parameters out.",
            )  # fmt: skip
        else:
            self.found.defer(found.name, "types")

    def setting(self, spec: ContractSpec, declared: Member, found: Member) -> Iterator[Fault]:
        """What can be assigned under the contract can be assigned here."""
        if (setter := setter_of(declared.value)) is None:
            return
        source = self.contract_type(spec, declared, _assigned(setter, declared.annotation))
        if (own := setter_of(found.value)) is not None:
            target = self.found_type(found, _assigned(own, found.annotation))
        elif found.name in (vars(found.owner).get("__annotations__") or ()):
            target = self.found_type(found, found.annotation)
        else:  # a value without annotation, or a descriptor
            return
        if assignable(source, target) is False:
            yield Fault(
                "C120", f"{text_of(source)} can be assigned", f"only {text_of(target)}",
                f"Let it be set to {text_of(source)} or something wider.",
            )  # fmt: skip

    # --- types --------------------------------------------------------------------------------

    def arguments_of(self, owner: type) -> Mapping[Any, Any]:
        if self._arguments is None:
            generic = any("__orig_bases__" in vars(base) for base in self.cls.__mro__)
            self._arguments = type_arguments(self.cls) if generic else {}
        found = self._arguments.setdefault(owner, {})
        found[typing.Self] = self.cls
        return found

    def contract_type(self, spec: ContractSpec, declared: Member, annotation: Any) -> Any:
        return self.typed(spec.cls, declared, annotation)

    def found_type(self, found: Member, annotation: Any) -> Any:
        return self.typed(found.owner, found, annotation)

    def typed(self, owner: type, member: Member, annotation: Any) -> Any:
        resolved = member.resolved(annotation)
        if resolved is UNRESOLVED:
            self.found.defer(member.name, "types")
        return substitute(resolved, self.arguments_of(owner))

    def parameter_types(
        self, spec: ContractSpec, declared: Member, found: Member
    ) -> Iterator[Fault]:
        given = _spelled_out(declared, declared.claimed or ())
        for wanted, have in _pairs(given, _spelled_out(found, found.claimed or ())):
            source = self.contract_type(spec, declared, wanted.annotation)
            target = self.found_type(found, have.annotation)
            if isinstance(source, TypeVar) and self.is_free(source):
                source = upper_bound(source)
            fits = assignable(source, target)
            if self.strict and have.annotation is EMPTY and wanted.annotation is not EMPTY:
                fits = False
            if fits is False:
                yield Fault(
                    "C120", f"'{wanted.name}' accepts {text_of(source)}",
                    f"'{have.name}' accepts {text_of(target) or 'nothing stated'}",
                    f"Annotate '{have.name}' with {text_of(source)} or something wider.",
                )  # fmt: skip

    def is_free(self, variable: TypeVar) -> bool:
        """Whether it belongs to the method, so that callers choose what it stands for."""
        return not any(variable in getattr(base, "__parameters__", ()) for base in self.cls.__mro__)

    def result_type(self, owner: type, member: Member) -> Any:
        result = self.typed(owner, member, member.annotation)
        if member.manager is None:
            return result
        items = typing.get_args(result)
        return member.manager[items[0] if items else EMPTY]

    def outcome(self, spec: ContractSpec, declared: Member, found: Member) -> Iterator[Fault]:
        """Async or not, generator or not, and the type of what comes out in the end."""
        target = self.result_type(spec.cls, declared)
        source = self.result_type(found.owner, found)
        if found.parameters is None and found.color is Color.SYNC:
            return
        if has_awaitable_arm(target):
            if found.color in (Color.GENERATOR, Color.ASYNC_GENERATOR):
                yield _colored(declared, found)
            elif found.color is Color.SYNC:
                yield from self.returns(source, target)
            return
        if declared.color is Color.ASYNC or is_awaitable(target):
            target = target if declared.color is Color.ASYNC else awaited(target)
            if found.color is not Color.ASYNC:
                if found.color is not Color.SYNC or not self.may_be_awaited(found, source):
                    yield _colored(declared, found)
                    return
                source = awaited(source) if is_awaitable(source) else source
            yield from self.returns(source, target)
            return
        if found.color is Color.ASYNC:
            yield _colored(declared, found)
            return
        if found.color in (Color.GENERATOR, Color.ASYNC_GENERATOR):
            same_color = declared.color is found.color
            if not same_color and not _may_iterate(target, found.color):
                yield _colored(declared, found)
                return
        elif found.inner_color is Color.ASYNC:
            self.found.defer(found.name, "not awaitable")
        yield from self.returns(source, target)

    def may_be_awaited(self, found: Member, source: Any) -> bool:
        """Annotated so; or passing on what an async function gives, which the first call shows."""
        if promises_await(found):
            return True
        if source is UNRESOLVED or found.inner_color is Color.ASYNC:
            self.found.defer(found.name, "awaitable")
            return True
        return False

    def returns(self, source: Any, target: Any) -> Iterator[Fault]:
        fits = assignable(source, target)
        if self.strict and source is EMPTY and target is not EMPTY:
            fits = False
        if fits is False:
            yield Fault(
                "C121", f"-> {text_of(target)}", f"-> {text_of(source) or 'nothing stated'}",
                f"Return {text_of(target)} or something narrower.",
            )  # fmt: skip

    # --- reporting ----------------------------------------------------------------------------

    def report(self, spec: ContractSpec, declared: Member, found: Member, fault: Fault) -> None:
        if found.function is not None:
            file, line = place_of_function(found.function)
        else:
            file, line = self.line_of_name(found.name, found.owner)
        violation = Violation(
            fault.code, declared.name, fault.expected, fault.actual, file, line, fault.hint,
            spec.name,
        )  # fmt: skip
        if violation not in self.found.violations:
            self.found.violations.append(violation)

    def report_missing(self, spec: ContractSpec, missing: list[str]) -> None:
        file, line = self.class_place()
        if spec.any_of:
            names = ", ".join(spec.members)
            self.found.violations.append(
                Violation(
                    "C101",
                    " | ".join(spec.members),
                    f"at least one of {names}",
                    "none of them",
                    file,
                    line,
                    f"Define one: `def {missing[0]}{spec.members[missing[0]].text}`.",
                    spec.name,
                )
            )
            return
        for name in missing:
            declared = spec.members[name]
            actual, hint = self.why_missing(declared)
            file, line = self.class_place()
            if name in vars(self.cls) and (self.cls, name) not in self.overrides:
                file, line = self.line_of_name(name)
            self.found.violations.append(
                Violation("C101", name, _declaration(declared), actual, file, line, hint, spec.name)
            )

    def why_missing(self, declared: Member) -> tuple[str, str]:
        name = declared.name
        for base in self.cls.__mro__:
            if name in vars(base) and not self.is_contract(base) and vars(base)[name] is not None:
                function = vars(base)[name]
                if getattr(function, "__isabstractmethod__", False):
                    return f"abstract in {base.__name__}", f"Define {name} in {self.cls.__name__}."
                return (
                    f"{base.__name__} has it, but stands after the contract in the bases",
                    f"Swap the bases: {base.__name__} before the contract.",
                )
        if self.lookup(name)[0] is None:
            return "None", f"Define `{_declaration(declared)}`."
        if self.is_field(name):
            hint = (
                "Give it a slot (`@dataclass(slots=True)`, `@attrs.define`), or write a property."
            )
            return "a field, which the contract's property hides", hint
        if self.is_annotated(name):
            return "only an annotation", f"Define `{_declaration(declared)}`."
        near = difflib.get_close_matches(
            name, [n for n, v in vars(self.cls).items() if callable(v) and n[0] != "_"], 1
        )
        hint = f"Define `{_declaration(declared)}`."
        return "nothing", f"{hint} Is '{near[0]}' a misspelling of it?" if near else hint

    def class_place(self) -> tuple[str, int]:
        return self.given_place or place_of_class(self.cls)

    def line_of_name(self, name: str, owner: type | None = None) -> tuple[str, int]:
        """Where `name = …` stands in the class body; the class itself when it is not found."""
        owner = owner or next((b for b in self.cls.__mro__ if name in vars(b)), self.cls)
        if self.is_contract(owner):
            owner = self.cls
        file, line = self.class_place() if owner is self.cls else place_of_class(owner)
        return file, find_line(
            file, line, re.compile(rf"\s+(async\s+def\s+|def\s+)?{re.escape(name)}\s*[:=(]"),
            after_class=True,
        )  # fmt: skip


def _binding(declared: Member, found: Member) -> Fault | None:
    """C110: reached as the contract says."""
    expected, actual = declared.kind, found.kind
    if actual is Kind.DESCRIPTOR:
        return None
    if expected is Kind.PROPERTY:
        good = actual in (Kind.PROPERTY, Kind.DATA, Kind.NOTHING)
        if good and (lacking := _lacking(declared.value, found)):
            return Fault(
                "C110", f"a property with a {lacking}", f"{_shown(found)} without a {lacking}",
                f"Add `@{declared.name}.{lacking}`.",
            )  # fmt: skip
    elif expected is Kind.INSTANCE:
        good = actual in (Kind.INSTANCE, Kind.CLASS, Kind.STATIC)
    else:
        good = actual in (Kind.CLASS, Kind.STATIC)
    if good:
        return None
    hint = {
        Kind.PROPERTY: "Decorate it with @property.",
        Kind.INSTANCE: f"Define `{_declaration(declared)}`.",
        Kind.CLASS: "Decorate it with @classmethod: it is called on the class.",
    }.get(expected, "Decorate it with @staticmethod: it is called on the class.")
    shown = actual.value
    if actual is Kind.DATA and isinstance(found.value, (int, str)):
        shown = f"{found.value!r:.60}"
    return Fault("C110", expected.value, shown, hint)


def _lacking(declared: Any, found: Member) -> str | None:
    """Which way of using the property of the contract is not there."""
    of_property = isinstance(found.value, property)
    is_final = (
        typing.get_origin(found.annotation) is typing.Final or found.annotation is typing.Final
    )
    if getattr(declared, "fset", None) and (found.value.fset is None if of_property else is_final):
        return "setter"
    if of_property and getattr(declared, "fdel", None) and found.value.fdel is None:
        return "deleter"
    return None


def _shown(found: Member) -> str:
    return "a property" if isinstance(found.value, property) else "a Final value"


def _assigned(setter: Any, otherwise: Any) -> Any:
    """The annotation of what a setter is given; that of the getter where it has none."""
    parameters = parameters_of(setter)
    stated = parameters[1].annotation if len(parameters) > 1 else EMPTY
    return otherwise if stated is EMPTY else stated


def _declaration(declared: Member) -> str:
    if declared.kind is Kind.PROPERTY:
        arrow = text_of(declared.annotation)
        return f"@property def {declared.name}(self)" + (f" -> {arrow}" if arrow else "")
    prefix = {Kind.CLASS: "@classmethod ", Kind.STATIC: "@staticmethod "}.get(declared.kind, "")
    text = declared.text
    is_async = text.startswith("async ")
    return f"{prefix}{'async ' if is_async else ''}def {declared.name}{text.removeprefix('async ')}"


def _colored(declared: Member, found: Member) -> Fault:
    if declared.color is Color.ASYNC or promises_await(declared):
        expected = "something to await"
        hint = "Write `async def`, or annotate the return type as an Awaitable."
    else:
        expected, hint = declared.color.value, "Write a plain `def` without `yield`."
    if found.color in (Color.GENERATOR, Color.ASYNC_GENERATOR):
        hint = "Return the value instead of yielding: a generator is always true."
    return Fault("C111", expected, found.color.value, hint)


def _may_iterate(target: Any, color: Color) -> bool:
    if not is_iterator(target):
        return False
    origin = typing.get_origin(target) or target
    is_async = hasattr(origin, "__aiter__")
    return is_async is (color is Color.ASYNC_GENERATOR)


def _spelled_out(member: Member, parameters: tuple[Param, ...]) -> tuple[Param, ...]:
    """With the keys of `**options: Unpack[Options]` as the keywords that they are."""
    if not parameters or parameters[-1].kind != VAR_KEYWORD or parameters[-1].annotation is EMPTY:
        return parameters
    annotation = member.resolved(parameters[-1].annotation)
    options = typing.get_args(annotation)[0] if typing.get_origin(annotation) in UNPACKS else None
    if not is_typeddict(options):
        return parameters
    keys = [
        Param(key, KEYWORD_ONLY, key in options.__required_keys__, each)
        for key, each in options.__annotations__.items()
    ]
    return (*parameters[:-1], *keys)


def _pairs(wanted: tuple[Param, ...], found: tuple[Param, ...]) -> Iterator[tuple[Param, Param]]:
    """Each parameter of the contract beside those that may receive its value."""
    by_name = {p.name: p for p in found if p.kind in (POSITIONAL, KEYWORD_ONLY)}
    positions = [p for p in found if p.kind in (POSITIONAL_ONLY, POSITIONAL)]
    var = {p.kind: p for p in found if p.kind in (VAR_POSITIONAL, VAR_KEYWORD)}
    for index, param in enumerate(wanted):
        if param.kind in (VAR_POSITIONAL, VAR_KEYWORD):
            receiver = var.get(param.kind)
            named = {p.name for p in wanted if p.kind != POSITIONAL_ONLY}
            more = positions[index:] if param.kind == VAR_POSITIONAL else by_name.values()
            yield from ((param, each) for each in more if each.name not in named)
        elif param.kind == KEYWORD_ONLY:
            receiver = by_name.get(param.name) or var.get(VAR_KEYWORD)
        else:
            in_range = index < len(positions)
            receiver = by_name.get(param.name)
            if receiver is None or param.kind == POSITIONAL_ONLY:
                receiver = positions[index] if in_range else var.get(VAR_POSITIONAL)
        if receiver is not None:
            yield param, receiver


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


def check_contract(cls: type, *contracts: type, strict: bool = False) -> list[Violation]:
    """Every place where a class breaks contracts (default: those in its MRO).

    Works for any class, changes nothing, runs nothing of it and never raises. `strict` also
    rejects missing annotations and what cannot be introspected.
    """
    try:
        specs = [vars(each).get(SPEC) or spec_of(each) for each in contracts] or contracts_of(cls)
        return examine(cls, specs, strict=strict).violations
    except Exception as error:  # noqa: BLE001  (never raises: whatever a hostile class does)
        name = getattr(cls, "__name__", type(cls).__name__)
        return [
            Violation(
                "C190",
                str(name)[:100],
                "a class that can be examined",
                f"the examination failed with {type(error).__name__}",
                "<unknown>",
                1,
                "Pass classes, whose members can be read from their __dict__.",
            )
        ]
