"""Plugins one after the other: `validate >> transform >> process`, checked before anything runs."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from annotations import EMPTY, UNRESOLVED, text_of
from contracts import SPEC
from generics import substitute, type_arguments
from signatures import read
from subtyping import assignable, awaited, has_awaitable_arm, is_awaitable

_ANYTHING = (EMPTY, UNRESOLVED, Any)
STAGES = ("validate", "transform", "process")  # in the order a plugin with several runs them


@dataclass(frozen=True)
class Finding:
    """One reason why data is not valid: where (a JSON pointer, "" for the whole), and what."""

    pointer: str
    message: str


@dataclass(frozen=True)
class ValidationReport:
    """What a validator found out; true when it found nothing."""

    errors: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, errors: Iterable[tuple[str, str] | Finding]) -> "ValidationReport":
        """From (pointer, message) pairs."""
        return cls(tuple(e if isinstance(e, Finding) else Finding(*e) for e in errors))

    @property
    def valid(self) -> bool:
        """Whether nothing was found."""
        return not self.errors

    def __bool__(self) -> bool:
        return self.valid

    def to_dict(self) -> dict[str, Any]:
        """`{"valid": …, "errors": [{"pointer": …, "message": …}]}`."""
        return {"valid": self.valid, "errors": [asdict(error) for error in self.errors]}


class InvalidInput(ValueError):
    """Raise it in a plugin for input that it cannot take: over HTTP it is 422, with the reasons."""

    def __init__(self, errors: Iterable[tuple[str, str] | Finding]) -> None:
        self.report = ValidationReport.of(errors)
        super().__init__("; ".join(error.message for error in self.report.errors[:3]))


def report_of(answer: Any) -> ValidationReport:
    """The report behind what `validate` returned; TypeError for what is neither it nor a bool."""
    if isinstance(answer, ValidationReport):
        return answer
    if isinstance(answer, bool):
        return ValidationReport() if answer else ValidationReport.of([("", "Not valid.")])
    raise TypeError(f"validate returned a {type(answer).__name__}; a bool or report was expected.")


class ChainTypeError(TypeError):
    """Raised when a chain is composed whose parts do not fit; it names the joint."""

    def __init__(self, message: str, joint: int) -> None:
        super().__init__(message)
        self.joint = joint


class ChainError(RuntimeError):
    """Raised when a stage fails while the chain runs; it names the stage, the cause is chained."""

    def __init__(self, message: str, step: int, name: str) -> None:
        super().__init__(message)
        self.step = step
        self.name = name


class ChainInvalid(ChainError, ValueError):
    """Raised when a validator of the chain says no; `report` has its reasons."""

    def __init__(self, message: str, step: int, name: str, report: ValidationReport) -> None:
        super().__init__(message, step, name)
        self.report = report


@dataclass(frozen=True, eq=False)
class Stage:
    """One method of one plugin."""

    step: int  # counted from 1; the methods of one plugin share it
    plugin: Any
    method: str
    takes: Any
    gives: Any
    is_async: bool

    @property
    def name(self) -> str:
        """`Plugin.method`."""
        return f"{type(self.plugin).__name__}.{self.method}"


def stages_of(plugin: Any, step: int) -> Iterator[Stage]:
    """The methods a plugin takes part with, and what they take and give."""
    for method in STAGES:
        types = types_of(type(plugin), method)
        if types is not None:
            yield Stage(step, plugin, method, *types)


def types_of(cls: type, method: str) -> tuple[Any, Any, bool] | None:
    """What a method takes and gives, and whether it is async; None when the class has none.

    Where the implementation states nothing, what its contract states counts.
    """
    owner = next((base for base in cls.__mro__ if method in vars(base)), None)
    if owner is None or SPEC in vars(owner):
        return None
    takes = gives = EMPTY
    is_async = False
    arguments = type_arguments(cls)
    for base in cls.__mro__:
        if method not in vars(base):
            continue
        member = read(method, vars(base)[method], base)
        parameters = [p for p in member.claimed or () if p.kind <= 2]
        first = parameters[0].annotation if parameters else EMPTY
        values = arguments.get(base, {})
        found = substitute(member.resolved(first), values)
        returned = substitute(member.resolved(member.annotation), values)
        if base is owner:
            is_async = inspect.iscoroutinefunction(member.outer) or is_awaitable(returned)
        takes = found if takes in (EMPTY, UNRESOLVED) else takes
        if gives in (EMPTY, UNRESOLVED):
            gives = awaited(returned) if is_awaitable(returned) else returned
            gives = Any if has_awaitable_arm(gives) else gives
    return takes, gives, is_async


class Chain:
    """Stages that fit: data goes through all of them, and stops at a validator that says no.

    A plugin with several of validate, transform and process runs them in that order.
    """

    def __init__(self, *plugins: Any) -> None:
        self.plugins: tuple[Any, ...] = tuple(
            part
            for plugin in plugins
            for part in (plugin.plugins if isinstance(plugin, Chain) else (plugin,))
        )
        self.stages: tuple[Stage, ...] = tuple(
            stage
            for step, plugin in enumerate(self.plugins, 1)
            for stage in stages_of(plugin, step)
        )
        for step, plugin in enumerate(self.plugins, 1):
            if not any(stage.step == step for stage in self.stages):
                name = getattr(plugin, "__name__", type(plugin).__name__)
                raise ChainTypeError(
                    f"Step {step} of the chain, {name}, has none of {', '.join(STAGES)}"
                    f"{'; join instances, not classes' if isinstance(plugin, type) else ''}.",
                    step - 1,
                )
        self._loose = self._check_joints()

    def _check_joints(self) -> set[Stage]:
        """The stages that take something definite while nobody says what comes to them."""
        loose: set[Stage] = set()
        flowing: Any = EMPTY
        giver = "the input"
        for stage in self.stages:
            if assignable(flowing, stage.takes) is False:
                raise ChainTypeError(
                    f"Joint {stage.step - 1}, between {giver} and {stage.name}: {giver} gives "
                    f"{text_of(flowing)}, but {stage.name} takes {text_of(stage.takes)}.",
                    stage.step - 1,
                )
            if (
                flowing in _ANYTHING
                and stage.takes not in _ANYTHING
                and stage is not self.stages[0]
            ):
                loose.add(stage)
            if stage.method != "validate":
                flowing, giver = stage.gives, stage.name
            elif flowing in _ANYTHING:
                flowing, giver = stage.takes, stage.name
        return loose

    def __rshift__(self, other: Any) -> "Chain":
        return Chain(self, other)

    @property
    def is_async(self) -> bool:
        """Whether a stage has to be awaited, so that only `run_async` can run the chain."""
        return any(stage.is_async for stage in self.stages)

    @property
    def takes(self) -> Any:
        """The type of what goes in."""
        return self.stages[0].takes if self.stages else EMPTY

    @property
    def gives(self) -> Any:
        """The type of what comes out."""
        moving = [stage for stage in self.stages if stage.method != "validate"]
        return moving[-1].gives if moving else self.takes

    def run(self, value: Any, fit: Callable[[Stage, Any], Any] | None = None) -> Any:
        """The value after the last stage; ChainInvalid or ChainError name the one that stopped.

        `fit` makes what a stage takes of a value of which nobody says what it is.
        """
        for stage in self.stages:
            if stage.is_async:
                raise TypeError(f"{stage.name} is async: await run_async(value).")
            if fit is not None and stage in self._loose:
                value = fit(stage, value)
            with _Naming(stage, len(self.plugins)):
                answer = getattr(stage.plugin, stage.method)(value)
            value = self._next(stage, value, answer)
        return value

    async def run_async(
        self,
        value: Any,
        call: Callable[..., Any] | None = None,
        fit: Callable[[Stage, Any], Any] | None = None,
    ) -> Any:
        """Like `run`, awaiting async stages; `call` (a thread pool's) runs the plain ones."""
        for stage in self.stages:
            if fit is not None and stage in self._loose:
                value = fit(stage, value)
            method = getattr(stage.plugin, stage.method)
            with _Naming(stage, len(self.plugins)):
                answer = method(value) if stage.is_async or not call else call(method, value)
                if inspect.isawaitable(answer):
                    answer = await answer
            value = self._next(stage, value, answer)
        return value

    def _next(self, stage: Stage, value: Any, answer: Any) -> Any:
        if stage.method != "validate":
            return answer
        with _Naming(stage, len(self.plugins)):
            report = report_of(answer)
        if report.valid:
            return value
        reasons = "; ".join(error.message for error in report.errors[:3])
        raise ChainInvalid(
            f"Step {stage.step} of {len(self.plugins)}, {stage.name}, says no: {reasons}",
            stage.step, type(stage.plugin).__name__, report,
        )  # fmt: skip


class _Naming:
    """Names the stage in whatever goes wrong inside."""

    def __init__(self, stage: Stage, steps: int) -> None:
        self.stage = stage
        self.steps = steps

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise ChainError(
                f"Step {self.stage.step} of {self.steps}, {self.stage.name}, raised "
                f"{type(error).__name__}.",
                self.stage.step, type(self.stage.plugin).__name__,
            ) from error  # fmt: skip
