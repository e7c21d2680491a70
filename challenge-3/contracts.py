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
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Literal

from members import Deferred, Subject, declaration, faults_of
from signatures import POSITIONAL, POSITIONAL_ONLY, Fault, Kind, Member, Param, note_layout, read
from versions import parse_version
from violations import (
    Violation,
    find_line,
    place_of_class,
    place_of_function,
)

SPEC = "__contract_spec__"  # in the `__dict__` of a contract
ATTRIBUTES = {"version": "C130", "description": "C131", "author": "C132"}


@dataclass(frozen=True)
class ContractSpec:
    """What one contract demands: all members, or (`any_of`) at least one of them."""

    cls: type
    members: Mapping[str, Member]
    attributes: Literal["required", "optional", "none"] = "none"
    any_of: bool = False
    properties: tuple[str, ...] = ()  # which of the members are

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
        note_layout(members[name])
    properties = tuple(name for name, each in members.items() if each.kind is Kind.PROPERTY)
    return ContractSpec(cls, members, attributes, any_of, properties)


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
        self.given_place = place
        self.spaces = spaces
        self.decorated = decorated
        self.overrides = overrides
        self.subject = Subject(cls, strict)
        self.found = Findings(deferred=self.subject.deferred)
        self.declarers = {spec.cls for spec in specs}
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
        left: frozenset[str] = getattr(self.cls, "__abstractmethods__", frozenset())
        if not left:
            return
        for name in sorted(left.difference(*(spec.members for spec in self.specs))):
            value, owner = self.lookup(name)
            if not getattr(value, "__isabstractmethod__", False):
                continue
            if self.decorated:  # such as @dataclass(order=True), @total_ordering
                self.subject.defer(name, "field")
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
        value, owner = (GONE, self.cls) if name in self.model_fields else self.lookup(name)
        if value is GONE or SPEC in vars(owner):  # the default of a contract
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
        if (repeated := declared.repeated(value, owner)) is not None:
            self.found.members[name] = repeated
            return True
        found = read(name, value, owner, self.spaces)
        if found.kind is Kind.NOTHING and declared.kind is not Kind.PROPERTY:
            return False
        self.found.members[name] = found
        for fault in faults_of(self.subject, spec.cls, declared, found):
            self.report(spec, declared, found, fault)
        return True

    def may_be_completed(self, declared: Member) -> bool:
        """A decorator that still has to run may give a property by a slot, or make `__lt__`."""
        name = declared.name
        may_be_slot = declared.kind is Kind.PROPERTY and self.is_annotated(name)
        may_be_made = name.startswith("__") and name not in vars(self.cls)
        if self.decorated and (may_be_made or (may_be_slot and not self.is_field(name))):
            self.subject.defer(name, "field")
            return True
        return False

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
                Violation("C101", name, declaration(declared), actual, file, line, hint, spec.name)
            )

    def why_missing(self, declared: Member) -> tuple[str, str]:
        name = declared.name
        for base in self.cls.__mro__:
            function = self.overrides.get((base, name), vars(base).get(name))
            if function is not None and function is not GONE and not self.is_contract(base):
                if getattr(function, "__isabstractmethod__", False):
                    return f"abstract in {base.__name__}", f"Define {name} in {self.cls.__name__}."
                return (
                    f"{base.__name__} has it, but stands after the contract in the bases",
                    f"Swap the bases: {base.__name__} before the contract.",
                )
        if self.lookup(name)[0] is None:
            return "None", f"Define `{declaration(declared)}`."
        if self.is_field(name):
            hint = (
                "Give it a slot (`@dataclass(slots=True)`, `@attrs.define`), or write a property."
            )
            return "a field, which the contract's property hides", hint
        if self.is_annotated(name):
            return "only an annotation", f"Define `{declaration(declared)}`."
        near = difflib.get_close_matches(
            name, [n for n, v in vars(self.cls).items() if callable(v) and n[0] != "_"], 1
        )
        hint = f"Define `{declaration(declared)}`."
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


def check_contract(cls: type, *contracts: type, strict: bool = False) -> list[Violation]:
    """Every place where a class breaks contracts (default: those in its MRO).

    Works for any class, changes nothing, runs nothing of it and never raises. `strict` also
    rejects missing annotations and what cannot be introspected.
    """
    try:
        specs = [vars(each).get(SPEC) or spec_of(each) for each in contracts] or contracts_of(cls)
        return examine(cls, specs, strict=strict).violations
    except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a hostile class does)
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
