"""Contracts that are enforced when a class is written, and the registry of those that keep them.

    class Celsius(Processor[float, float], name="celsius"):
        version = "1.0.0"

        def process(self, data: float) -> float:
            return (data - 32) / 1.8

The `class` statement above examines the class against every contract in its MRO. A class that
breaks one does not come into being: `ContractViolationError` lists every place with file, line and
cure. One that keeps them is registered under (name, version) and measured.
"""

import abc
import dataclasses
import functools
import inspect
import sys
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from pydantic import BaseModel
from typing_extensions import TypeVar

from chains import (
    Chain,
    ChainError,
    ChainInvalid,
    ChainTypeError,
    Finding,
    InvalidInput,
    ValidationReport,
)
from contracts import (
    ATTRIBUTES,
    GONE,
    SPEC,
    ContractRuntimeError,
    ContractSpec,
    ContractViolationError,
    Findings,
    Violation,
    check_contract,
    contracts_of,
    examine,
    spec_of,
)
from instrumentation import Meter, measured
from loading import EntryPoints
from registry import (
    Plugin,
    PluginDisabledError,
    Registry,
    RegistryError,
    State,
    UnknownPluginError,
    WrongKindError,
    current_source,
    key_fault,
)
from signatures import Kind, Member, raw
from versions import Version, parse_version

__all__ = [
    "CAPABILITIES",
    "APIContractBase",
    "APIContractMeta",
    "Chain",
    "ChainError",
    "ChainInvalid",
    "ChainTypeError",
    "Contract",
    "ContractEnforcerMeta",
    "ContractRuntimeError",
    "ContractViolationError",
    "Finding",
    "InvalidInput",
    "Plugin",
    "PluginBase",
    "PluginDisabledError",
    "Processor",
    "PydanticPlugin",
    "Registry",
    "RegistryError",
    "State",
    "Transformer",
    "UnknownPluginError",
    "ValidationReport",
    "Validator",
    "Version",
    "Violation",
    "WrongKindError",
    "check_contract",
    "combine_metaclass",
    "entry_points",
    "get_all_plugins",
    "registry",
]

In = TypeVar("In", default=Any)
Out = TypeVar("Out", default=Any)

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


class ContractEnforcerMeta(abc.ABCMeta):
    """Examines a class when it is defined, registers and measures it when it keeps its contracts.

    Keywords of the `class` statement: `name=` (default: the class name), `abstract=True` (neither
    examined nor registered, cannot be instantiated), `register=False` (examined, not registered).
    A class that names `Contract` in its bases is itself a contract: `attributes="optional"` does
    not demand version, description and author, `any_of=True` demands one of its members.
    """

    def __new__(  # noqa: D102
        mcs,
        cls_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        name: str | None = None,
        abstract: bool = False,
        register: bool = True,
        attributes: str = "required",
        any_of: bool = False,
        **keywords: Any,
    ) -> Any:
        frame = _defining_frame()
        if "__pydantic_generic_metadata__" in keywords:  # made by `Model[int]`, no class statement
            register = False
        given = {"name": name, "abstract": abstract, "register": register}
        definition = Definition(given, (frame.f_code.co_filename, frame.f_lineno), cls_name)
        previous = None
        earlier: Definition | None = namespace.get(DEFINITION)
        if earlier is not None and earlier.cls_name == cls_name:
            _undo(namespace, earlier)
            previous = earlier.cls
            definition = Definition(earlier.keywords, earlier.place, cls_name)
        namespace[DEFINITION] = definition
        namespace.pop(SPEC, None)
        cls = super().__new__(mcs, cls_name, bases, namespace, **keywords)
        definition.cls = cls
        if _is_contract(bases):
            spec = spec_of(cls, attributes=attributes, any_of=any_of, spaces=_locals(frame))  # type: ignore[arg-type]
            type.__setattr__(cls, SPEC, spec)
            return cls
        if previous is not None:
            _move_class_cells(cls, previous)
        if definition.keywords["abstract"] or abc.ABC in bases:
            definition.keywords["abstract"] = True
            return cls
        _admit(cls, definition, previous, frame)
        return cls

    def __init__(cls, *args: Any, **_: Any) -> None:
        super().__init__(*args)  # without our keywords

    if not TYPE_CHECKING:  # type checkers would take its return type for that of every class

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            """Make an instance; contracts and abstract classes have none."""
            definition = vars(cls)[DEFINITION]
            if SPEC in vars(cls) or definition.keywords["abstract"]:
                what = "a contract" if SPEC in vars(cls) else "abstract"
                raise TypeError(
                    f"{cls.__name__} is {what} and cannot be instantiated; define a class that "
                    "derives from it."
                )
            if definition.pending_fields:
                _verify(cls)
                definition.pending_fields = False
            return super().__call__(*args, **kwargs)

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "__bases__":
            _change_bases(cls, value)
        elif name.startswith("_") and not _is_demanded(cls, name):
            type.__setattr__(cls, name, value)
        else:
            _change(cls, name, value)

    def __delattr__(cls, name: str) -> None:
        _change(cls, name, GONE)


def _is_contract(bases: tuple[type, ...]) -> bool:
    """`Contract` itself, and classes that name it in their bases, declare members."""
    return "Contract" not in globals() or Contract in bases


def _defining_frame() -> Any:
    """The frame of the `class` statement, past metaclasses and decorators' machinery."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_name == "__new__" or frame.f_globals.get("__name__") in _MACHINERY
    ):
        frame = frame.f_back
    return frame


_MACHINERY = frozenset({"abc", "types", "typing", "dataclasses"})


def _locals(frame: Any) -> dict[str, Any] | None:
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


# --- admitting a class ------------------------------------------------------------------------


def _admit(cls: type, definition: Definition, previous: type | None, frame: Any) -> None:
    """Examine, measure, and register at last: a class that fails leaves nothing behind."""
    specs = contracts_of(cls)
    found = examine(
        cls, specs, place=definition.place, spaces=_locals(frame),
        decorated=_may_be_completed(cls, specs) and _is_decorated(frame),
    )  # fmt: skip
    for member in found.members.values():
        object.__setattr__(member, "spaces", None)  # do not keep the locals of a function alive
    name = definition.keywords["name"] or cls.__name__
    registers = definition.keywords["register"]
    if registers and (fault := key_fault(name)):
        found.violations.append(
            Violation(
                "C140", "name", "letters, digits, '_', '.', '-', at most 64, none that is reserved",
                fault, *definition.place, "Give it a `name=` in the class statement.",
            )
        )  # fmt: skip
    checking = collecting.get()
    try:
        _raise_for(cls, found.violations)
        definition.pending_fields = any("field" in what for what in found.deferred.values())
        plugin = _plugin(cls, name, specs, found, definition)
        for member in found.members.values():
            _measure(cls, definition, member, found)
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
    cls: type, name: str, specs: list[ContractSpec], found: Findings, definition: Definition
) -> Plugin:
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
        source=current_source(cls),
        place="{}:{}".format(*definition.place),
        meters=definition.meters,
        verify=functools.partial(_verify, cls),
    )
    return definition.plugin


def _measure(cls: type, definition: Definition, member: Member, found: Findings) -> None:
    meter = definition.meters.get(member.name)
    if meter is None:
        return
    deferred = found.deferred.get(member.name, set()) - {"field"}
    made = measured(member, cls, meter, deferred, functools.partial(_verify, cls))
    if member.owner is cls:
        definition.originals[member.name] = member.value
    else:
        definition.added.add(member.name)
    type.__setattr__(cls, member.name, made)


def _undo(namespace: dict[str, Any], definition: Definition) -> None:
    """Take the measuring functions out of a namespace that a class is made of once more."""
    for name in definition.added:
        namespace.pop(name, None)
    for name, value in definition.originals.items():
        if name in namespace and raw(namespace[name]) is value:
            namespace[name] = value
    for name in ("__abstractmethods__", "_abc_impl"):
        namespace.pop(name, None)


def _move_class_cells(cls: type, previous: type) -> None:
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


def _is_demanded(cls: type, name: str) -> bool:
    return any(name in spec.members for spec in contracts_of(cls))


def _may_be_completed(cls: type, specs: Iterable[ContractSpec]) -> bool:
    """Whether a class decorator may still add what is wanted: slots, or `__lt__` and the like."""
    if getattr(cls, "__abstractmethods__", None):
        return True
    wanted = {n for spec in specs for n, m in spec.members.items() if m.kind is Kind.PROPERTY}
    return bool(wanted) and any(
        wanted & set(vars(base).get("__annotations__") or ()) - set(vars(base))
        for base in cls.__mro__
    )


def _verify(cls: type) -> None:
    """Look again at what could not be known at definition; ContractRuntimeError if it is wrong."""
    found = examine(cls, contracts_of(cls), place=vars(cls)[DEFINITION].place)
    if found.violations:
        raise ContractRuntimeError(cls.__name__, found.violations)


# --- later changes ----------------------------------------------------------------------------


def _change(cls: type, name: str, value: Any) -> None:
    """Set or delete (GONE) an attribute of a class; a contract member is examined first."""
    affected = list(_affected(cls, name))
    if value is GONE and isinstance(vars(cls).get(name), dataclasses.Field):
        vars(cls)[DEFINITION].pending_fields = True  # @dataclass is at work: a slot may follow
        affected = []
    overrides = {
        (each, name): GONE for each in affected if name in vars(each)[DEFINITION].added
    } | {(cls, name): value}
    found = [
        examine(
            each, contracts_of(each), overrides=overrides,
            decorated=vars(each)[DEFINITION].pending_fields,
        )
        for each in affected
    ]  # fmt: skip
    if violations := [violation for each in found for violation in each.violations]:
        file, line = _caller()
        shown = "deleted" if value is GONE else f"set to {_shown(value)}"
        change = Violation(
            "C150", name, f"{cls.__name__}.{name} keeps the contract", shown, file, line,
            "Change the class statement instead; the old value was kept.",
        )  # fmt: skip
        raise ContractViolationError(cls.__name__, [change, *violations])
    if value is GONE:
        type.__delattr__(cls, name)
    else:
        if name == "version":
            _refuse_other_version(cls, value)
        type.__setattr__(cls, name, value)
    for each, findings in zip(affected, found, strict=True):
        definition: Definition = vars(each)[DEFINITION]
        if (member := findings.members.get(name)) is not None:
            definition.added.discard(name)
            definition.originals.pop(name, None)
            _measure(each, definition, member, findings)


def _refuse_other_version(cls: type, value: Any) -> None:
    """The version is half of the key under which a class is registered."""
    plugin: Plugin | None = vars(cls)[DEFINITION].plugin
    if plugin and registry.peek(*plugin.key) is plugin and value != plugin.version.text:
        file, line = _caller()
        refusal = Violation(
            "C150", "version", f"{plugin.version}, under which {plugin.name} is registered",
            f"set to {_shown(value)}", file, line,
            "Define a class with the new version; both can be registered.",
        )  # fmt: skip
        raise ContractViolationError(cls.__name__, [refusal])


def _change_bases(cls: type, bases: tuple[type, ...]) -> None:
    """Other bases, where the class and all below it still keep their contracts then."""
    before = cls.__bases__
    type.__setattr__(cls, "__bases__", bases)
    below = [cls]
    for each in below:
        below.extend(sub for sub in type.__subclasses__(each) if sub not in below)
    found: list[Violation] = []
    for each in below:
        definition = vars(each).get(DEFINITION)
        if (
            definition is not None
            and SPEC not in vars(each)
            and not definition.keywords["abstract"]
        ):
            found.extend(examine(each, contracts_of(each), place=definition.place).violations)
    if found:
        type.__setattr__(cls, "__bases__", before)
        raise ContractViolationError(cls.__name__, found)


def _affected(cls: type, name: str) -> Iterator[type]:
    """The class and those below that inherit the member, as far as a contract asks for it."""
    waiting, seen = [cls], set()
    while waiting:
        each = waiting.pop()
        definition = vars(each).get(DEFINITION)
        own = name in vars(each) and definition is not None and name not in definition.added
        if each in seen or definition is None or definition.cls is not each:
            continue
        if each is not cls and own:
            continue
        seen.add(each)
        waiting.extend(type.__subclasses__(each))
        if definition.keywords["abstract"] or SPEC in vars(each):
            continue
        specs = contracts_of(each)
        if any(name in spec.members or name in ATTRIBUTES for spec in specs):
            yield each


def _caller() -> tuple[str, int]:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


# --- the bases --------------------------------------------------------------------------------


class Contract(metaclass=ContractEnforcerMeta, attributes="none"):
    """Name it in the bases of a class to make that class a contract: `class K(Contract): …`.

    Every public method and property in the body of a contract is demanded of the classes that
    derive from it; so are the class attributes version, description and author.
    """

    if TYPE_CHECKING:
        version: ClassVar[str]
        description: ClassVar[str]
        author: ClassVar[str]

    __slots__ = ()

    def __rshift__(self, other: Any) -> Chain:
        """`validator >> transformer >> processor`."""
        return Chain(self, other)


class Processor(Contract, Generic[In, Out], attributes="optional"):
    """Makes something of its input."""

    __slots__ = ()

    @abc.abstractmethod
    def process(self, data: In) -> Out:
        """Return what comes out."""
        raise NotImplementedError


class Validator(Contract, Generic[In], attributes="optional"):
    """Says whether its input is right, or a `ValidationReport` with what is wrong."""

    __slots__ = ()

    @abc.abstractmethod
    def validate(self, data: In) -> bool | ValidationReport:
        """Return the verdict."""
        raise NotImplementedError


class Transformer(Contract, Generic[In, Out], attributes="optional"):
    """Brings its input into another form."""

    __slots__ = ()

    @abc.abstractmethod
    def transform(self, data: In) -> Out:
        """Return the new form."""
        raise NotImplementedError


class PluginBase(Contract, attributes="optional", any_of=True):
    """The lenient base: one of the three methods is enough, async or not; no version is 0.0.0."""

    __slots__ = ()

    version: ClassVar[str] = NO_VERSION
    description: ClassVar[str] = ""
    author: ClassVar[str] = ""

    def process(self, data: Any) -> Any | Awaitable[Any]:
        """Return what comes out."""
        raise NotImplementedError(f"{type(self).__name__} has no process.")

    def validate(self, data: Any) -> Any | Awaitable[Any]:
        """Return a bool or a ValidationReport."""
        raise NotImplementedError(f"{type(self).__name__} has no validate.")

    def transform(self, data: Any) -> Any | Awaitable[Any]:
        """Return the new form."""
        raise NotImplementedError(f"{type(self).__name__} has no transform.")

    @classmethod
    def get_all_plugins(cls) -> list[type]:
        """The registered classes that derive from this one."""
        return get_all_plugins(cls)


class APIContractMeta(ContractEnforcerMeta):
    """The metaclass of `APIContractBase`; knows which classes keep that contract, here and afar."""

    @classmethod
    def get_registry(mcs) -> Mapping[str, type]:
        """Class name to class, in the default version, of this process."""
        found = {
            plugin.cls.__name__: plugin.cls
            for plugin in registry.snapshot()
            if isinstance(plugin.cls, mcs) and registry.is_default(plugin)
        }
        return MappingProxyType(found)

    @classmethod
    def get_redis_registry(mcs) -> dict[str, Any]:
        """Plugin name to its record, of every process that shares the store.

        The store is Redis where REDIS_URL or REDIS_HOST is set, else the embedded one. The plugins
        of this process are announced first, and stay announced while it lives.
        """
        from cluster import join  # imports this module

        return join().by_name()


class APIContractBase(Contract, metaclass=APIContractMeta, attributes="required"):
    """The strict base: version, description and author, `process` and `validate`."""

    __slots__ = ()

    @abc.abstractmethod
    def process(self, data: Any) -> Any:
        """Return what comes out."""
        raise NotImplementedError

    @abc.abstractmethod
    def validate(self, data: Any) -> bool | ValidationReport:
        """Return the verdict."""
        raise NotImplementedError


def combine_metaclass(*bases: type) -> Any:
    """A metaclass for classes with all these bases: `class P(K, Enum, metaclass=…(K, Enum))`."""
    metas: list[type] = []
    for meta in map(type, bases):
        if not any(issubclass(each, meta) for each in metas):
            metas = [each for each in metas if not issubclass(meta, each)] + [meta]
    metas.sort(key=lambda meta: not issubclass(meta, ContractEnforcerMeta))
    if len(metas) == 1:
        return metas[0]
    return type("".join(meta.__name__ for meta in metas), tuple(metas), {})


if TYPE_CHECKING:  # no type checker follows a metaclass that is computed

    class PydanticPlugin(BaseModel):
        """A plugin whose settings are a pydantic model; version and the like are ClassVars."""

        version: ClassVar[str]
        description: ClassVar[str]
        author: ClassVar[str]

        def __init_subclass__(
            cls, *, name: str | None = None, abstract: bool = False, register: bool = True,
            **config: Any,
        ) -> None: ...  # fmt: skip

        def __rshift__(self, other: Any) -> Chain: ...

else:

    class PydanticPlugin(
        PluginBase, BaseModel, metaclass=combine_metaclass(PluginBase, BaseModel), abstract=True
    ):
        """A plugin whose settings are a pydantic model; version and the like are ClassVars."""

        version: ClassVar[str] = NO_VERSION
        description: ClassVar[str] = ""
        author: ClassVar[str] = ""


def get_all_plugins(kind: type | None = None, *, include_disabled: bool = False) -> list[type]:
    """The registered classes, by name and version; only those of a kind, where one is given."""
    return [
        plugin.cls
        for plugin in registry.snapshot()
        if (include_disabled or plugin.state is State.ENABLED)
        and (kind is None or issubclass(plugin.cls, kind))
    ]
