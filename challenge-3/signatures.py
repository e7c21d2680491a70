"""Members of classes as callers meet them, and whether one can stand in for another.

The principle: every call that is legal under the contract is legal on the implementation, as seen
from an instance, with self or cls already bound. Members are read from `__dict__`, never with
`getattr`, so that nothing of a class under examination runs.
"""

import contextlib
import enum
import functools
import inspect
import types
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, NamedTuple

from annotations import EMPTY, resolve, text_of
from generics import is_plain
from subtyping import is_awaitable

RAW = "__contract_raw__"  # on a function that stands before a member: the member as it was written

POSITIONAL_ONLY, POSITIONAL, VAR_POSITIONAL, KEYWORD_ONLY, VAR_KEYWORD = range(5)


class Kind(enum.Enum):
    """How a member is reached."""

    INSTANCE = "an instance method"
    CLASS = "a class method"
    STATIC = "a static method"
    PROPERTY = "a property"
    DATA = "a class attribute"
    DESCRIPTOR = "a descriptor"
    NOTHING = "None"


class Color(enum.Enum):
    """What a call gives back before anybody waits or iterates."""

    SYNC = "a plain function"
    ASYNC = "an async function"
    GENERATOR = "a generator"
    ASYNC_GENERATOR = "an async generator"


class Param(NamedTuple):
    """One parameter."""

    name: str
    kind: int
    required: bool
    annotation: Any = EMPTY


class Fault(NamedTuple):
    """One reason why a member cannot stand in for another."""

    code: str
    expected: str
    actual: str
    hint: str


Parameters = tuple[Param, ...]


@dataclass(slots=True, eq=False)  # not frozen: making a frozen one takes three times as long
class Member:
    """A member, read without running it.

    `parameters` are those as the code has them (bound; `with_self` unbound), `claimed` those that
    `inspect.signature` tells (None: not known); `function` is the innermost one, which has the
    annotations and the line.
    """

    name: str
    value: Any
    owner: type
    kind: Kind
    outer: Any = None
    function: Any = None
    parameters: Parameters | None = None
    claimed: Parameters | None = None
    with_self: Parameters | None = None
    has_self: bool = True
    color: Color = Color.SYNC
    inner_color: Color = Color.SYNC
    annotation: Any = EMPTY
    manager: Any = None  # what `@contextmanager` makes of it
    spaces: Any = field(default=None, repr=False)
    layout: tuple[Any, ...] | None = None  # of a declaration that can be repeated word for word
    awaits: bool | None = None  # whether that one gives something to await

    def resolved(self, annotation: Any) -> Any:
        """The annotation without strings in it, or UNRESOLVED."""
        return resolve(annotation, self._names)

    def _names(self) -> tuple[dict[str, Any], dict[str, Any]]:
        function = self.function
        known = dict(self.spaces or {})
        known.update(vars(self.owner))
        known[self.owner.__name__] = self.owner
        if function is None:
            return vars(inspect.getmodule(self.owner) or types), known
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=False
        ):
            try:
                known[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        for variable in getattr(function, "__type_params__", ()):
            known[variable.__name__] = variable
        return function.__globals__, known

    def repeated(self, value: Any, owner: type) -> "Member | None":
        """What `value` is as a member of `owner`, where it repeats this one word for word.

        Then nothing is left to compare: most classes are written so.
        """
        if self.layout is None or type(value) is not type(self.value):
            return None
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if (
            type(function) is not FunctionType
            or function.__dict__
            or _layout_of(function) != self.layout
            or not _equal(function.__annotations__, self.function.__annotations__)
        ):
            return None
        return Member(
            self.name, value, owner, self.kind, function, function,
            self.parameters, self.claimed, self.with_self, True,
            self.color, self.color, self.annotation, awaits=self.awaits,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """How the member looks to a caller: `(self, data: int) -> bool`."""
        if self.kind is Kind.NOTHING:
            return "None"
        if self.kind in (Kind.DATA, Kind.DESCRIPTOR):
            return f"{text_of(self.annotation) or type(self.value).__name__} value"
        if self.kind is Kind.PROPERTY:
            return f"property -> {text_of(self.annotation) or 'anything'}"
        parameters = self.claimed if self.claimed is not None else self.parameters
        shown = text_of_parameters(parameters, self.annotation, bound=self.kind)
        prefix = "async " if self.color is Color.ASYNC else ""
        if not self.has_self:
            shown = shown.replace("self, ", "").replace("(self)", "()")
        return prefix + shown


def text_of_parameters(
    parameters: Parameters | None, returned: Any = EMPTY, *, bound: Kind = Kind.STATIC
) -> str:
    """A signature as one would write it."""
    arrow = f" -> {text_of(returned)}" if returned is not EMPTY else ""
    if parameters is None:
        return "(not introspectable)" + arrow
    first = {Kind.INSTANCE: ["self"], Kind.CLASS: ["cls"]}.get(bound, [])
    parts: list[str] = list(first)
    previous = None
    for param in parameters:
        if previous == POSITIONAL_ONLY and param.kind != POSITIONAL_ONLY:
            parts.append("/")
        if param.kind == KEYWORD_ONLY and previous not in (KEYWORD_ONLY, VAR_POSITIONAL):
            parts.append("*")
        parts.append(text_of_parameter(param))
        previous = param.kind
    if previous == POSITIONAL_ONLY:
        parts.append("/")
    return f"({', '.join(parts)}){arrow}"


def text_of_parameter(param: Param) -> str:
    """One parameter as one would write it; a default is shown as `...`."""
    stars = {VAR_POSITIONAL: "*", VAR_KEYWORD: "**"}.get(param.kind, "")
    typed = f": {text_of(param.annotation)}" if param.annotation is not EMPTY else ""
    optional = not param.required and not stars
    default = (" = ..." if typed else "=...") if optional else ""
    return f"{stars}{param.name}{typed}{default}"


# --- reading ----------------------------------------------------------------------------------


def raw(value: Any) -> Any:
    """The member as it was written, where a measuring function stands before it."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(function, FunctionType):
        return function.__dict__.get(RAW, value)
    return value


def parameters_of(function: FunctionType) -> Parameters:
    """What the code of the function takes; much quicker than `inspect.signature`."""
    code = function.__code__
    names = code.co_varnames
    positional = code.co_argcount
    first_optional = positional - len(function.__defaults__ or ())
    keyword_defaults = function.__kwdefaults__ or {}
    annotations = function.__annotations__
    only = code.co_posonlyargcount
    found = [
        Param(
            name,
            POSITIONAL_ONLY if index < only else POSITIONAL,
            index < first_optional,
            annotations.get(name, EMPTY),
        )
        for index, name in enumerate(names[:positional])
    ]
    last = positional + code.co_kwonlyargcount
    extra = last
    if code.co_flags & inspect.CO_VARARGS:
        name = names[extra]
        found.append(Param(name, VAR_POSITIONAL, False, annotations.get(name, EMPTY)))
        extra += 1
    found.extend(
        Param(name, KEYWORD_ONLY, name not in keyword_defaults, annotations.get(name, EMPTY))
        for name in names[positional:last]
    )
    if code.co_flags & inspect.CO_VARKEYWORDS:
        name = names[extra]
        found.append(Param(name, VAR_KEYWORD, False, annotations.get(name, EMPTY)))
    return tuple(found)


_COLORS_AND_STARS = (
    inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR
)  # fmt: skip


def _layout_of(function: FunctionType) -> tuple[Any, ...]:
    """All of a signature but its annotations, as the code has it, to be compared in one step."""
    code = function.__code__
    flags = code.co_flags & _COLORS_AND_STARS
    stars = bool(flags & inspect.CO_VARARGS) + bool(flags & inspect.CO_VARKEYWORDS)
    return (
        code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars],
        code.co_argcount, code.co_posonlyargcount, flags,
        len(function.__defaults__ or ()), set(function.__kwdefaults__ or ()),
    )  # fmt: skip


def _equal(some: dict[str, Any], others: dict[str, Any]) -> bool:
    try:
        return some == others
    except Exception:  # noqa: BLE001  (an annotation may be anything, an array for one)
        return False


def note_layout(declared: Member) -> None:
    """Prepare a member of a contract for `repeated`, where its words mean the same elsewhere."""
    function = declared.function
    if (
        function is not None
        and function is declared.outer
        and declared.kind in (Kind.INSTANCE, Kind.CLASS, Kind.STATIC)
        and declared.parameters is declared.claimed
        and declared.has_self
        and all(map(is_plain, function.__annotations__.values()))
    ):
        declared.layout = _layout_of(function)
        declared.awaits = promises_await(declared)


def told_by_inspect(target: Any) -> tuple[Parameters, Any] | None:
    """What `inspect.signature` tells, or None where it knows nothing."""
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return None
    found = tuple(
        Param(
            p.name,
            int(p.kind),
            p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD),
            EMPTY if p.annotation is p.empty else p.annotation,
        )
        for p in signature.parameters.values()
    )
    returned = signature.return_annotation
    return found, EMPTY if returned is signature.empty else returned


def color_of(function: Any) -> Color:
    """By the flags of its code, through partials and markers."""
    while isinstance(function, (functools.partial, functools.partialmethod)):
        function = function.func
    if isinstance(function, FunctionType):  # the usual case, without four calls of inspect
        flags = function.__code__.co_flags
        if flags & inspect.CO_COROUTINE:
            return Color.ASYNC
        if flags & inspect.CO_ASYNC_GENERATOR:
            return Color.ASYNC_GENERATOR
        if flags & inspect.CO_GENERATOR:
            return Color.GENERATOR
        if not function.__dict__:  # nobody has marked it as a coroutine function
            return Color.SYNC
    return Color.ASYNC if inspect.iscoroutinefunction(function) else Color.SYNC


def read(name: str, value: Any, owner: type, spaces: Any = None) -> Member:
    """The member `name` of `owner`, whose `__dict__` holds `value`."""
    value = raw(value)
    if isinstance(value, FunctionType):
        return _callable(name, value, owner, Kind.INSTANCE, value, spaces)
    if value is None:
        return Member(name, value, owner, Kind.NOTHING)
    if isinstance(value, classmethod):
        return _callable(name, value, owner, Kind.CLASS, value.__func__, spaces)
    if isinstance(value, staticmethod):
        return _callable(name, value, owner, Kind.STATIC, value.__func__, spaces)
    if isinstance(value, (property, functools.cached_property)):
        return _property(name, value, owner, spaces)
    if isinstance(value, functools.partialmethod):
        return _partial_method(name, value, owner, spaces)
    if isinstance(value, functools.singledispatchmethod):
        return _dispatched_by_type(read(name, value.func, owner, spaces), value)
    if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
        return _data(name, value, owner, spaces)
    if callable(value):
        binds = _is_descriptor(value) and not isinstance(
            value, (types.BuiltinFunctionType, functools.partial, type)
        )
        kind = Kind.INSTANCE if binds else Kind.STATIC
        return _callable(name, value, owner, kind, value, spaces)
    return _data(name, value, owner, spaces)


def _is_descriptor(value: Any) -> bool:
    mro = type.__getattribute__(type(value), "__mro__")
    return any("__get__" in type.__getattribute__(base, "__dict__") for base in mro)


def _callable(name: str, value: Any, owner: type, kind: Kind, outer: Any, spaces: Any) -> Member:
    outer = raw(outer)
    inner = outer
    claimed: Parameters | None = None
    returned: Any = EMPTY
    manager = None
    if isinstance(outer, FunctionType):
        parameters: Parameters | None = parameters_of(outer)
        claimed = parameters
        returned = outer.__annotations__.get("return", EMPTY)
        if "__wrapped__" in outer.__dict__ or "__signature__" in outer.__dict__:
            inner = _innermost(outer)
            manager = _MANAGERS.get(outer.__code__)
            if told := told_by_inspect(outer):
                claimed, returned = told
    else:
        told = None if _is_c_function(outer) else told_by_inspect(outer)
        parameters, returned = told if told else (None, EMPTY)
        claimed = parameters
        inner = _innermost(outer)
    has_self = True
    with_self = parameters
    if kind is not Kind.STATIC:
        is_told = claimed is not parameters
        has_self, parameters = _without_first(parameters)
        claimed = _without_first(claimed)[1] if is_told else parameters
    color = color_of(outer)
    return Member(
        name, value, owner, kind,
        outer=outer,
        function=inner if isinstance(inner, FunctionType) else None,
        parameters=parameters, claimed=claimed, with_self=with_self, has_self=has_self,
        color=color, inner_color=color if inner is outer else color_of(inner),
        annotation=returned, manager=manager, spaces=spaces,
    )  # fmt: skip


def _dispatched_by_type(member: Member, value: Any) -> Member:
    """`singledispatchmethod` looks at the first argument, which must come by position."""
    if not member.parameters:
        return replace(member, value=value)
    first = member.parameters[0]._replace(kind=POSITIONAL_ONLY)
    parameters = (first, *member.parameters[1:])
    return replace(member, value=value, parameters=parameters, claimed=parameters)


# The functions that these decorators put before a generator all have the same code.
_MANAGERS: dict[Any, Any] = {
    contextlib.contextmanager(iter).__code__: contextlib.AbstractContextManager,
    contextlib.asynccontextmanager(aiter).__code__: contextlib.AbstractAsyncContextManager,
}


def _is_c_function(value: Any) -> bool:
    """Whether it has a signature on some versions of Python and none on others."""
    return isinstance(
        value,
        (
            types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
            types.ClassMethodDescriptorType, types.MethodWrapperType,
        ),
    ) or (isinstance(value, type) and value.__module__ == "builtins")  # fmt: skip


def _innermost(function: Any) -> Any:
    while isinstance(function, (functools.partial, functools.partialmethod)):
        function = function.func
    try:
        function = inspect.unwrap(function)
    except ValueError:  # it wraps itself
        return None
    if not isinstance(function, FunctionType):
        function = vars(type(function)).get("__call__")
    return function


def _without_first(parameters: Parameters | None) -> tuple[bool, Parameters | None]:
    """Bind self: the first positional parameter, or one of `*args`."""
    if parameters is None:
        return True, None
    if parameters and parameters[0].kind in (POSITIONAL_ONLY, POSITIONAL):
        return True, parameters[1:]
    takes_any = any(param.kind == VAR_POSITIONAL for param in parameters)
    return takes_any, parameters


def _partial_method(
    name: str, value: "functools.partialmethod[Any]", owner: type, spaces: Any
) -> Member:
    function = raw(value.func)
    if isinstance(function, (classmethod, staticmethod)):
        inner = function.__func__
        kind = Kind.CLASS if isinstance(function, classmethod) else Kind.STATIC
    else:
        inner, kind = function, Kind.INSTANCE
    given = (None, *value.args) if kind is not Kind.STATIC else value.args
    told = told_by_inspect(functools.partial(inner, *given, **value.keywords))
    parameters, returned = told if told else (None, EMPTY)
    innermost = _innermost(inner)
    return Member(
        name, value, owner, kind,
        outer=inner,
        function=innermost if isinstance(innermost, FunctionType) else None,
        parameters=parameters, claimed=parameters,
        color=color_of(inner), inner_color=color_of(innermost),
        annotation=returned, spaces=spaces,
    )  # fmt: skip


def _property(name: str, value: Any, owner: type, spaces: Any) -> Member:
    function = value.func if isinstance(value, functools.cached_property) else value.fget
    inner = _innermost(function) if function is not None else None
    function = inner if isinstance(inner, FunctionType) else None
    returned = function.__annotations__.get("return", EMPTY) if function else EMPTY
    return Member(
        name, value, owner, Kind.PROPERTY,
        outer=function, function=function, annotation=returned, spaces=spaces,
        color=color_of(function), inner_color=color_of(function),
    )  # fmt: skip


def _data(name: str, value: Any, owner: type, spaces: Any) -> Member:
    declared = vars(owner).get("__annotations__", {})
    annotation = declared.get(name, EMPTY) if isinstance(declared, dict) else EMPTY
    kind = Kind.DATA
    if annotation is EMPTY and not isinstance(value, types.MemberDescriptorType):
        if _is_descriptor(value):  # what it gives is known to itself alone
            kind = Kind.DESCRIPTOR
        else:
            annotation = type(value)
    return Member(name, value, owner, kind, annotation=annotation, spaces=spaces)


def setter_of(value: Any) -> FunctionType | None:
    """The function that sets a property, where there is one."""
    function = _innermost(value.fset) if isinstance(value, property) and value.fset else None
    return function if isinstance(function, FunctionType) else None


def promises_await(member: Member) -> bool:
    """Whether a call gives something to await."""
    if member.awaits is not None:
        return member.awaits
    return member.color is Color.ASYNC or is_awaitable(member.resolved(member.annotation))
