"""One member of a class beside the one that a contract declares: does it stand in for it?

`faults_of` asks in this order: is it reached in the same way, does it take the same calls, does it
accept and give the same types, and is it as async. What cannot be known yet is deferred.
"""

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from typing_extensions import is_typeddict

from annotations import EMPTY, UNRESOLVED, text_of
from calls import compare_calls, same_shape
from generics import UNPACKS, is_plain, substitute, type_arguments, upper_bound
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
    setter_of,
    text_of_parameters,
)
from subtyping import assignable, awaited, has_awaitable_arm, is_awaitable, is_iterator

Deferred = Literal["types", "awaitable", "not awaitable", "field"]


@dataclass
class Subject:
    """The class under examination, and what can only be known about its members later."""

    cls: type
    strict: bool = False
    deferred: dict[str, set[Deferred]] = field(default_factory=dict)
    _arguments: dict[type, dict[Any, Any]] | None = None

    def defer(self, name: str, what: Deferred) -> None:
        """Note what can only be known later."""
        self.deferred.setdefault(name, set()).add(what)

    def arguments_of(self, owner: type) -> Mapping[Any, Any]:
        """What the type variables of a base, and Self, stand for in this class."""
        if self._arguments is None:
            generic = any("__orig_bases__" in vars(base) for base in self.cls.__mro__)
            self._arguments = type_arguments(self.cls) if generic else {}
        found = self._arguments.setdefault(owner, {})
        found[typing.Self] = self.cls
        return found

    def is_free(self, variable: TypeVar) -> bool:
        """Whether it belongs to the method, so that callers choose what it stands for."""
        return not any(variable in getattr(base, "__parameters__", ()) for base in self.cls.__mro__)


def faults_of(subject: Subject, contract: type, declared: Member, found: Member) -> Iterator[Fault]:
    """Every reason why `found` cannot stand in for what the contract declares."""
    return _Comparison(subject, contract, declared, found).faults()


class _Comparison:
    def __init__(self, subject: Subject, contract: type, declared: Member, found: Member) -> None:
        self.subject = subject
        self.contract = contract
        self.declared = declared
        self.found = found

    def faults(self) -> Iterator[Fault]:
        declared, found = self.declared, self.found
        if fault := _binding(declared, found):
            yield fault
            return
        if declared.kind is Kind.PROPERTY:
            if found.color is not Color.SYNC:
                yield _colored(declared, found)
                return
            target = self.contract_type(declared.annotation)
            source = self.found_type(found.annotation)
            if found.kind is Kind.NOTHING and source is EMPTY:
                source = type(None)
            yield from self.returns(source, target)
            yield from self.setting()
            return
        if found.kind is Kind.DESCRIPTOR:
            yield from self.not_introspectable()
            return
        if not found.has_self:
            yield Fault(
                "C112", "a first parameter for the instance", found.text,
                "Write 'self' as the first parameter, or make it a @staticmethod.",
            )  # fmt: skip
            return
        faults = list(self.calls())
        yield from faults
        if not any(fault.code in ("C113", "C190") for fault in faults):
            yield from self.parameter_types()
        yield from self.outcome()

    def calls(self) -> Iterator[Fault]:
        """Names, positions, defaults; of what the code takes and of what it says it takes."""
        declared, found = self.declared, self.found
        wanted = declared.claimed
        if found.parameters is None:
            yield from self.not_introspectable()
            return
        claimed = found.claimed if found.claimed is not None else found.parameters
        if wanted is None:
            return
        wanted, claimed = _spelled_out(declared, wanted), _spelled_out(found, claimed)
        if claimed is found.parameters or same_shape(claimed, found.parameters):
            yield from compare_calls(wanted, claimed)
            return
        told = list(compare_calls(wanted, claimed))
        if told:
            if not self.is_answered_by_wrapper(wanted):
                yield from told
        elif list(compare_calls(wanted, found.parameters)):
            real = text_of_parameters(found.parameters, bound=found.kind)
            yield Fault(
                "C113", text_of_parameters(claimed, bound=found.kind),
                f"{real} in the function that is called",
                "Let the decorator's wrapper pass on what it says: (self, *args, **kwargs).",
            )  # fmt: skip

    def is_answered_by_wrapper(self, wanted: tuple[Param, ...]) -> bool:
        """Whether a decorator's function that passes nothing on unseen takes all these calls."""
        real = self.found.parameters or ()
        passes_on = any(param.kind in (VAR_POSITIONAL, VAR_KEYWORD) for param in real)
        return not passes_on and not list(compare_calls(wanted, real))

    def not_introspectable(self) -> Iterator[Fault]:
        declared, found = self.declared, self.found
        if self.subject.strict:
            yield Fault(
                "C190", declared.text, f"{found.kind.value} without a signature",
                "Wrap it in a function that spells its parameters out.",
            )  # fmt: skip
        else:
            self.subject.defer(found.name, "types")

    def setting(self) -> Iterator[Fault]:
        """What can be assigned under the contract can be assigned here."""
        declared, found = self.declared, self.found
        if (setter := setter_of(declared.value)) is None:
            return
        source = self.contract_type(_assigned(setter, declared.annotation))
        if (own := setter_of(found.value)) is not None:
            target = self.found_type(_assigned(own, found.annotation))
        elif found.name in (vars(found.owner).get("__annotations__") or ()):
            target = self.found_type(found.annotation)
        else:  # a value without annotation, or a descriptor
            return
        if assignable(source, target) is False:
            yield Fault(
                "C120", f"{text_of(source)} can be assigned", f"only {text_of(target)}",
                f"Let it be set to {text_of(source)} or something wider.",
            )  # fmt: skip

    # --- types --------------------------------------------------------------------------------

    def contract_type(self, annotation: Any) -> Any:
        return self.typed(self.contract, self.declared, annotation)

    def found_type(self, annotation: Any) -> Any:
        return self.typed(self.found.owner, self.found, annotation)

    def typed(self, owner: type, member: Member, annotation: Any) -> Any:
        if is_plain(annotation):  # the usual case
            return annotation
        resolved = member.resolved(annotation)
        if resolved is UNRESOLVED:
            self.subject.defer(member.name, "types")
        return substitute(resolved, self.subject.arguments_of(owner))

    def parameter_types(self) -> Iterator[Fault]:
        declared, found = self.declared, self.found
        given = _spelled_out(declared, declared.claimed or ())
        for wanted, have in _pairs(given, _spelled_out(found, found.claimed or ())):
            if wanted.annotation is have.annotation and is_plain(have.annotation):
                continue
            source = self.contract_type(wanted.annotation)
            target = self.found_type(have.annotation)
            if isinstance(source, TypeVar) and self.subject.is_free(source):
                source = upper_bound(source)
            fits = assignable(source, target)
            if self.subject.strict and have.annotation is EMPTY and wanted.annotation is not EMPTY:
                fits = False
            if fits is False:
                yield Fault(
                    "C120", f"'{wanted.name}' accepts {text_of(source)}",
                    f"'{have.name}' accepts {text_of(target) or 'nothing stated'}",
                    f"Annotate '{have.name}' with {text_of(source)} or something wider.",
                )  # fmt: skip

    def result_type(self, owner: type, member: Member) -> Any:
        result = self.typed(owner, member, member.annotation)
        if member.manager is None:
            return result
        items = typing.get_args(result)
        return member.manager[items[0] if items else EMPTY]

    def outcome(self) -> Iterator[Fault]:
        """Async or not, generator or not, and the type of what comes out in the end."""
        declared, found = self.declared, self.found
        if (
            declared.layout is not None  # so that its color is plain to see
            and declared.color is found.color is found.inner_color
            and found.manager is None
            and is_plain(found.annotation)
            and found.annotation == declared.annotation
        ):
            return
        target = self.result_type(self.contract, declared)
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
                if found.color is not Color.SYNC or not self.may_be_awaited(source):
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
            self.subject.defer(found.name, "not awaitable")
        yield from self.returns(source, target)

    def may_be_awaited(self, source: Any) -> bool:
        """Annotated so; or passing on what an async function gives, which the first call shows."""
        found = self.found
        if promises_await(found):
            return True
        if source is UNRESOLVED or found.inner_color is Color.ASYNC:
            self.subject.defer(found.name, "awaitable")
            return True
        return False

    def returns(self, source: Any, target: Any) -> Iterator[Fault]:
        fits = assignable(source, target)
        if self.subject.strict and source is EMPTY and target is not EMPTY:
            fits = False
        if fits is False:
            yield Fault(
                "C121", f"-> {text_of(target)}", f"-> {text_of(source) or 'nothing stated'}",
                f"Return {text_of(target)} or something narrower.",
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
        Kind.INSTANCE: f"Define `{declaration(declared)}`.",
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


def declaration(declared: Member) -> str:
    """How one would write it: `def process(self, data: int) -> int`."""
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
    options: Any = None
    if typing.get_origin(annotation) in UNPACKS:
        options = typing.get_args(annotation)[0]
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
