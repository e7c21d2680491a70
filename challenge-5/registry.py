"""Tasks that may be asked for by name, with a schema of their arguments: `@task(...)`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from errors import NotRegistered
from payloads import name_of
from tasks import Kind, RetryPolicy, TaskPriority

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Registered:
    """A function that was declared as a task, and its defaults."""

    name: str
    func: Callable[..., Any]
    kind: Kind
    priority: TaskPriority
    timeout: float | None
    retry: RetryPolicy | None
    arguments: type[BaseModel]

    @property
    def description(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.func) or "").partition("\n")[0]

    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        return self.arguments.model_json_schema()

    def check(self, args: dict[str, Any]) -> dict[str, Any]:
        """The arguments as the types say; pydantic's ValidationError otherwise."""
        checked = self.arguments.model_validate(args)
        return {name: getattr(checked, name) for name in checked.model_fields_set}


class Registry:
    """Names and the functions behind them."""

    def __init__(self) -> None:
        self._tasks: dict[str, Registered] = {}

    def __iter__(self) -> Any:
        return iter(sorted(self._tasks.values(), key=lambda each: each.name))

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def get(self, name: str) -> Registered:
        """The task of this name, or NotRegistered naming those that exist."""
        try:
            return self._tasks[name]
        except KeyError:
            known = ", ".join(sorted(self._tasks)) or "none"
            raise NotRegistered(
                f"No task is registered under this name; there are: {known}."
            ) from None

    def of(self, func: Any) -> Registered | None:
        """The declaration of a function, if it has one."""
        found = getattr(func, "__registered__", None)
        return found if isinstance(found, Registered) and found.func is func else None

    def add(self, registered: Registered) -> None:
        """Declare it; a name belongs to one function."""
        present = self._tasks.get(registered.name)
        if present is not None and _where(present.func) != _where(registered.func):
            raise ValueError(
                f"The task name {registered.name!r} is taken by {name_of(present.func)}; choose "
                "another with @task(name=...)."
            )
        self._tasks[registered.name] = registered


registry = Registry()


@overload
def task(func: F) -> F: ...


@overload
def task(
    func: None = None,
    *,
    name: str | None = None,
    kind: Kind = "auto",
    priority: TaskPriority = TaskPriority.NORMAL,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    registry: Registry = registry,
) -> Callable[[F], F]: ...


def task(
    func: F | None = None,
    *,
    name: str | None = None,
    kind: Kind = "auto",
    priority: TaskPriority = TaskPriority.NORMAL,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    registry: Registry = registry,
) -> F | Callable[[F], F]:
    """Declare a function as a task that may be asked for by name, also over HTTP.

    The function stays what it is. Its parameters need type hints: they are the schema.
    """

    def declare(function: F) -> F:
        chosen = name or function.__name__
        registered = Registered(
            chosen, function, kind, priority, timeout, retry, _arguments(chosen, function)
        )
        registry.add(registered)
        function.__registered__ = registered  # type: ignore[attr-defined]
        return function

    return declare if func is None else declare(func)


def _arguments(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue  # for the results of parents
        if parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(
                f"Task {name!r} takes **{parameter.name}: a task that is asked for by name has "
                "named parameters only, because they are its schema."
            )
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in hints:
            raise TypeError(
                f"Parameter {parameter.name!r} of task {name!r} needs a name and a type hint."
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], Field(default))
    config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=False
    )
    model: type[BaseModel] = create_model(name, __config__=config, **fields)
    return model


def _where(func: Callable[..., Any]) -> tuple[str, str]:
    return func.__module__, func.__qualname__


__all__ = ["Registered", "Registry", "ValidationError", "registry", "task"]
