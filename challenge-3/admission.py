"""A class on its way in: examined, measured, registered, in this order, or without any trace."""

import functools
import inspect
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from contracts import ContractSpec, Findings, contracts_of, examine
from instrumentation import Meter, measured
from loading import PACKAGE, EntryPoints
from registry import Plugin, Registry, current_source, key_fault, loading_from
from signatures import Kind, Member, raw
from versions import parse_version
from violations import ContractRuntimeError, ContractViolationError, Violation

registry = Registry()
entry_points = EntryPoints(registry)
registry.resolve_with(entry_points.resolve)
CAPABILITIES = ("process", "validate", "transform")  # what can be called over HTTP
METHODS = (Kind.INSTANCE, Kind.CLASS, Kind.STATIC)
DEFINITION = "__contract_definition__"
NO_VERSION = "0.0.0"

# While `check.py` reads a file, violations are collected here instead of being raised.
collecting: "ContextVar[list[Plugin | ContractViolationError] | None]" = ContextVar(
    "collecting", default=None
)


@dataclass
class Definition:
    """How a class was defined; it stays in the namespace, so that it survives a re-creation.

    `@dataclass(slots=True)` and `attrs.define` make the class a second time out of its `__dict__`,
    without the keywords and with the measuring functions in it.
    """

    keywords: dict[str, Any]
    place: tuple[str, int]
    cls_name: str
    originals: dict[str, Any] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    cls: type | None = None
    plugin: Plugin | None = None
    meters: dict[str, Meter] = field(default_factory=dict)
    pending_fields: bool = False
    pending_types: bool = False  # of what is not measured, so that no first call looks at them


def admit(cls: type, definition: Definition, previous: type | None, frame: Any) -> None:
    """Examine, measure, and register at last: a class that fails leaves nothing behind."""
    specs = contracts_of(cls)
    found = examine(
        cls, specs, place=definition.place, spaces=locals_of(frame),
        decorated=_may_be_completed(cls, specs) and _is_decorated(frame),
    )  # fmt: skip
    for member in found.members.values():
        member.spaces = None  # do not keep the locals of a function alive
    name = definition.keywords["name"] or cls.__name__
    registers = definition.keywords["register"]
    if registers and (fault := key_fault(name)) is not None:
        found.violations.append(
            Violation(
                "C140", "name", "letters, digits, '_', '.', '-', at most 64, none that is reserved",
                fault, *definition.place, "Give it a `name=` in the class statement.",
            )
        )  # fmt: skip
    if registers and loading_from.get() is None and cls.__module__.startswith(f"{PACKAGE}."):
        found.violations.append(
            Violation(
                "C140", "name", "to be registered by the file that is being read",
                "a class of a plugin file, made in another thread or when the file was read",
                *definition.place, "Write `register=False`, or define it in the body of the file.",
            )
        )  # fmt: skip
    checking = collecting.get()
    try:
        _raise_for(cls, found.violations)
        definition.pending_fields = any("field" in what for what in found.deferred.values())
        plugin = _plugin(cls, name, specs, found, definition, frame)
        definition.pending_types = not found.deferred.keys() <= definition.meters.keys()
        for member in found.members.values():
            measure(cls, definition, member, found)
        if checking is not None:
            checking.append(plugin)
        elif registers:
            registry.register(plugin, replaces=previous or _defined_again(cls, plugin))
    except ContractViolationError as error:
        if previous is not None and vars(previous)[DEFINITION].plugin is not None:
            registry.withdraw(vars(previous)[DEFINITION].plugin)
        if checking is None:
            raise
        checking.append(error)


def _raise_for(cls: type, violations: list[Violation]) -> None:
    if violations:
        raise ContractViolationError(cls.__name__, violations)


def _plugin(
    cls: type, name: str, specs: list[ContractSpec], found: Findings, definition: Definition,
    frame: Any,
) -> Plugin:  # fmt: skip
    version = parse_version(_static(cls, "version")) or parse_version(NO_VERSION)
    assert version is not None  # noqa: S101  (it was examined)
    public = (m for m in found.members.values() if not m.name.startswith("_"))
    methods = [m.name for m in public if m.kind in METHODS]
    definition.meters = {m: registry.meter(name, version.text, m) for m in methods}
    definition.plugin = Plugin(
        name=name,
        version=version,
        cls=cls,
        contracts=tuple(spec.name for spec in specs if spec.members),
        capabilities=frozenset(methods).intersection(CAPABILITIES),
        source=current_source(cls, frame),
        place="{}:{}".format(*definition.place),
        meters=definition.meters,
        verify=functools.partial(verify, cls),
    )
    return definition.plugin


def measure(cls: type, definition: Definition, member: Member, found: Findings) -> bool:
    """Put a measuring function before a method, where it is one that is measured.

    In one step, so that no call of another thread is missed when a method is exchanged.
    """
    meter = definition.meters.get(member.name)
    if meter is None:
        return False
    deferred: frozenset[str] = frozenset(found.deferred.get(member.name, ()))
    made = measured(member, cls, meter, deferred - {"field"}, verify)
    if member.owner is cls:
        definition.originals[member.name] = member.value
    else:
        definition.added.add(member.name)
    type.__setattr__(cls, member.name, made)
    return True


def undo(namespace: dict[str, Any], definition: Definition) -> None:
    """Take the measuring functions out of a namespace that a class is made of once more."""
    for name in definition.added:
        namespace.pop(name, None)
    for name, value in definition.originals.items():
        if name in namespace and raw(namespace[name]) is value:
            namespace[name] = value
    for name in ("__abstractmethods__", "_abc_impl"):
        namespace.pop(name, None)


def move_class_cells(cls: type, previous: type) -> None:
    """Let `super()` in the methods of a class that was made again mean the new class."""
    for value in vars(cls).values():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        function = getattr(function, "fget", function)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                if cell.cell_contents is previous:
                    cell.cell_contents = cls
            except ValueError:  # an empty cell
                continue


def _defined_again(cls: type, plugin: Plugin) -> type | None:
    """The class this one takes the place of: the same one, defined anew in a notebook."""
    if cls.__module__ != "__main__" or "<locals>" in cls.__qualname__:
        return None
    old = registry.peek(*plugin.key)
    if old is None:
        return None
    same = (old.cls.__module__, old.cls.__qualname__) == (cls.__module__, cls.__qualname__)
    return old.cls if same else None


def _static(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _may_be_completed(cls: type, specs: Iterable[ContractSpec]) -> bool:
    """Whether a class decorator may still add what is wanted: slots, or `__lt__` and the like."""
    if getattr(cls, "__abstractmethods__", None):
        return True
    wanted = {name for spec in specs for name in spec.properties}
    return bool(wanted) and any(
        wanted & set(vars(base).get("__annotations__") or ()) - set(vars(base))
        for base in cls.__mro__
    )


def verify(cls: type) -> None:
    """Look again at what could not be known at definition; ContractRuntimeError if it is wrong."""
    found = examine(cls, contracts_of(cls), place=vars(cls)[DEFINITION].place)
    if found.violations:
        raise ContractRuntimeError(cls.__name__, found.violations)


# --- the frame of the class statement ----------------------------------------------------------


def defining_frame() -> Any:
    """The frame of the `class` statement, past metaclasses and decorators' machinery."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_name == "__new__" or frame.f_globals.get("__name__") in _MACHINERY
    ):
        frame = frame.f_back
    return frame


_MACHINERY = frozenset({"abc", "types", "typing", "dataclasses"})


def locals_of(frame: Any) -> dict[str, Any] | None:
    """Names of the function in which the class stands: postponed annotations may need them."""
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return dict(frame.f_locals)
    return None


def _is_decorated(frame: Any) -> bool:
    """Whether what the `class` statement makes is called with something: a decorator follows.

    Only asked when a class has an annotation where a contract wants a property: it may become a
    field. The instruction behind the running one is then a call, else it stores the class.
    """
    import dis

    following = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti)
    first = next(following, None)
    return first is not None and first.opname in ("PRECALL", "CALL")
