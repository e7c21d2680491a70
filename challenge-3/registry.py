"""Plugins by name and version: what is there, which is the default, who serves and who does not.

Reading takes no lock: a name leads to one immutable `Family`, which writers replace as a whole
under a lock. What is registered while a transaction is open in this context (a file being loaded)
is collected there and becomes visible all at once, or not at all.
"""

import datetime as dt
import difflib
import enum
import hashlib
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_origin, overload

from annotations import text_of
from contracts import contracts_of
from instrumentation import Figures, Meter
from signatures import read
from subtyping import forget
from versions import Version, default_of, parse_version
from violations import ContractViolationError, Violation, place_of_class

if TYPE_CHECKING:
    from utils import Processor, Transformer, Validator

P = TypeVar("P")

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
RESERVED = frozenset({"failed", "reload"})  # they are paths below /plugins


class State(enum.Enum):
    """Where a plugin stands in its life."""

    ENABLED = "enabled"
    DISABLED = "disabled"  # by an operator; nothing is lost
    CONFLICT = "conflict"  # another host serves this version with other signatures
    DRAINING = "draining"  # replaced or removed; calls that had begun are finished on it
    UNLOADED = "unloaded"


class RegistryError(LookupError):
    """Base of what goes wrong when a plugin is asked for."""


class UnknownPluginError(RegistryError, KeyError):
    """Nothing is registered under this name and version."""

    def __str__(self) -> str:
        return str(self.args[0])


class PluginDisabledError(RegistryError):
    """It is registered, and does not serve."""


class WrongKindError(RegistryError, TypeError):
    """It is registered, and is of another kind than the one asked for."""


class Source(Protocol):
    """Where classes came from."""

    label: str  # shown to people: "in process", a file name, a distribution

    def reload(self) -> None:
        """Read it again; raises when that fails, and then nothing has changed."""

    def code_hash(self, cls: type) -> str:
        """Of what was read."""

    def dropped(self) -> None:
        """No plugin of it is left."""

    def owns(self, cls: type, frame: FrameType) -> bool:
        """Whether the class, defined in this frame, comes from what is being read."""


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"


@dataclass(frozen=True)
class Failure:
    """Something that could not be loaded or served, and why."""

    phase: str  # read, compile, import, contract, register, entry point, conflict
    error: str
    name: str | None = None
    file: str | None = None
    line: int | None = None
    at: str = field(default_factory=_now)


class InProcess:
    """Classes that a running module has defined."""

    label = "in process"

    def reload(self) -> None:
        """Refused."""
        raise RegistryError("It was defined by a running module: there is no file to read again.")

    def code_hash(self, cls: type) -> str:
        """Of the file of its module, as it is now; of its name where there is no file."""
        try:
            content = Path(inspect.getfile(cls)).read_bytes()
        except (OSError, TypeError):
            content = f"{cls.__module__}.{cls.__qualname__}".encode()
        return hashlib.sha256(content).hexdigest()

    def dropped(self) -> None:
        """Nothing to let go of."""

    def owns(self, cls: type, frame: FrameType) -> bool:  # noqa: ARG002
        """Every class."""
        return True


IN_PROCESS = InProcess()
loading_from: "ContextVar[Source | None]" = ContextVar("loading_from", default=None)


def current_source(cls: type, frame: FrameType) -> Source:
    """What is being loaded, for its own classes; else this process."""
    source = loading_from.get()
    return source if source is not None and source.owns(cls, frame) else IN_PROCESS


@dataclass(eq=False)
class Plugin:
    """One registered class, which is one version of a plugin."""

    name: str
    version: Version
    cls: type[Any]
    contracts: tuple[str, ...]
    capabilities: frozenset[str]
    source: Source
    place: str
    meters: dict[str, Meter]
    verify: Callable[[], None]
    state: State = State.ENABLED
    reason: str = ""
    in_flight: int = 0
    stuck: int = 0
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Name and version."""
        return self.name, self.version.text

    @property
    def description(self) -> str:
        """Of the class, or the first line of its docstring."""
        told = getattr(self.cls, "description", "") or (self.cls.__doc__ or "").split("\n")[0]
        return str(told)

    @property
    def author(self) -> str:
        """Of the class."""
        return str(getattr(self.cls, "author", ""))

    @property
    def signature_hash(self) -> str:
        """SHA-256 of the names, kinds, defaults and annotations of its contract members."""
        text = json.dumps(signature_of(self.cls), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def code_hash(self) -> str:
        """SHA-256 of the source it was made from."""
        return self.source.code_hash(self.cls)

    def figures(self) -> dict[str, Figures]:
        """What each of its methods did so far."""
        return {name: meter.figures() for name, meter in self.meters.items()}


@dataclass(frozen=True)
class Family:
    """All versions of one name; replaced as a whole, never changed."""

    plugins: tuple[Plugin, ...]
    default: Plugin
    pinned: Version | None = None

    @classmethod
    def of(cls, plugins: tuple[Plugin, ...], pinned: Version | None) -> "Family":
        """With the pinned version as the default, or else the highest release."""
        if len(plugins) == 1:
            only = plugins[0]
            return cls(plugins, only, pinned if only.version == pinned else None)
        wanted = pinned if any(p.version == pinned for p in plugins) else None
        chosen = wanted or default_of([plugin.version for plugin in plugins])
        default = next(p for p in plugins if p.version == chosen)
        return cls(tuple(sorted(plugins, key=lambda p: p.version)), default, wanted)


Event = tuple[str, Plugin]
Transaction = list[Plugin]
_open: "ContextVar[Transaction | None]" = ContextVar("open", default=None)


class Registry:
    """The plugins of a process. Safe to use from any thread."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._meters: dict[tuple[str, str, str], Meter] = {}
        self._lock = threading.RLock()
        self._listeners: list[Callable[[Event], None]] = []
        self._resolve: list[Callable[[str], bool]] = []
        self.failures: dict[str, Failure] = {}  # by file name, entry point, or name and version
        self.revision = 0

    # --- reading ------------------------------------------------------------------------------

    def find(self, name: str, version: str | None = None) -> Plugin:
        """The record of a plugin, whatever its state; UnknownPluginError names near ones."""
        family = self._families.get(name)
        if family is None:
            if any(resolve(name) for resolve in self._resolve):
                family = self._families.get(name)
            if family is None:
                raise UnknownPluginError(self._unknown(name))
        if version is None:
            return family.default
        wanted = parse_version(version)
        for plugin in family.plugins:
            if plugin.version == wanted:
                return plugin
        known = ", ".join(p.version.text for p in family.plugins)
        raise UnknownPluginError(f"There is no such version of {name!r}; there are: {known}.")

    def plugin(self, name: str, version: str | None = None) -> Plugin:
        """The record of a plugin that serves."""
        found = self.find(name, version)
        # One that was replaced a moment ago still serves whoever has found it.
        if found.state in (State.DISABLED, State.CONFLICT):
            raise PluginDisabledError(
                f"{name} {found.version} is {'in ' * (found.state is State.CONFLICT)}"
                f"{found.state.value}"
                f"{': ' + found.reason if found.reason else ''}."
            )
        return found

    def get(self, name: str, version: str | None = None) -> type[Any]:
        """The class registered under the name; without a version the default."""
        return self.plugin(name, version).cls

    # An abstract class is no `type[P]` for mypy (its issue 4717), and from a generic one alone it
    # infers nothing: so the three typed bases are spelled out.
    @overload
    def create(self, name: str, kind: type[P], version: str | None = None) -> P: ...  # type: ignore[overload-overlap]

    @overload
    def create(
        self, name: str, kind: "Callable[..., Processor[Any, Any]]", version: str | None = None
    ) -> "Processor[Any, Any]": ...

    @overload
    def create(
        self, name: str, kind: "Callable[..., Transformer[Any, Any]]", version: str | None = None
    ) -> "Transformer[Any, Any]": ...

    @overload
    def create(
        self, name: str, kind: "Callable[..., Validator[Any]]", version: str | None = None
    ) -> "Validator[Any]": ...

    @overload
    def create(self, name: str, kind: Callable[..., P], version: str | None = None) -> P: ...

    def create(self, name: str, kind: Any, version: str | None = None) -> Any:
        """A new instance, which is one of `kind`; WrongKindError when the plugin is not."""
        found = self.plugin(name, version)
        kind = get_origin(kind) or kind
        if not isinstance(kind, type) or not issubclass(found.cls, kind):
            wanted = getattr(kind, "__name__", repr(kind))
            raise WrongKindError(
                f"{name} {found.version} is no {wanted}; it is: {', '.join(found.contracts)}."
            )
        return found.cls()

    def versions(self, name: str) -> list[str]:
        """The versions registered under a name, lowest first."""
        self.find(name)
        return [plugin.version.text for plugin in self._families[name].plugins]

    def snapshot(self) -> list[Plugin]:
        """All plugins, by name and version."""
        families = list(self._families.items())
        return [plugin for _, family in sorted(families) for plugin in family.plugins]

    def is_default(self, plugin: Plugin) -> bool:
        """Whether it answers when no version is named."""
        family = self._families.get(plugin.name)
        return family is not None and family.default is plugin

    def __len__(self) -> int:
        return sum(len(family.plugins) for family in list(self._families.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._families

    def verify(self) -> list[Violation]:
        """Look now at what was deferred to the first call; what is wrong with it."""
        found: list[Violation] = []
        for plugin in self.snapshot():
            try:
                plugin.verify()
            except ContractViolationError as error:
                found.extend(error.violations)
        return found

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name[:64], list(self._families), 3)
        if near:
            return f"There is no such plugin. Near to that name: {', '.join(near)}."
        return "There is no such plugin; GET /plugins lists those there are."

    def peek(self, name: str, version: str) -> Plugin | None:
        """Like `find` among what is there or being loaded, without looking any further."""
        family = self._families.get(name)
        wanted = parse_version(version)
        found = [*(family.plugins if family else ()), *(_open.get() or ())]
        return next((p for p in found if (p.name, p.version) == (name, wanted)), None)

    def peek_default(self, name: str) -> str | None:
        """The default version of a name, if there is one."""
        family = self._families.get(name)
        return family.default.version.text if family else None

    # --- writing ------------------------------------------------------------------------------

    def meter(self, name: str, version: str, method: str) -> Meter:
        """The counts of one method, the same ones before and after a reload."""
        return self._meters.get((name, version, method)) or Meter()

    def register(self, plugin: Plugin, replaces: type | None = None) -> None:
        """Add a plugin; `replaces` is the class it was made again from (slots, a notebook).

        Raises ContractViolationError (C140) naming both places when the key is taken.
        """
        if (transaction := _open.get()) is not None:
            self._refuse_duplicate(plugin, transaction, replaces)
            transaction[:] = [each for each in transaction if each.cls is not replaces]
            transaction.append(plugin)
            return
        with self._lock:
            family = self._families.get(plugin.name)
            self._refuse_duplicate(plugin, family.plugins if family else (), replaces)
            self._put([plugin], [])

    def withdraw(self, plugin: Plugin) -> None:
        """Take exactly this one out again, wherever it is."""
        if (transaction := _open.get()) is not None and plugin in transaction:
            transaction.remove(plugin)
            return
        with self._lock:
            family = self._families.get(plugin.name)
            if family and plugin in family.plugins:
                self._put([], [plugin])

    def _refuse_duplicate(self, plugin: Plugin, others: Any, replaces: type | None) -> None:
        for other in others:
            if (other.name, other.version) == (plugin.name, plugin.version):
                if other.cls is replaces or other.cls is plugin.cls:
                    continue
                file, line = place_of_class(plugin.cls)
                raise ContractViolationError(
                    plugin.cls.__name__,
                    [
                        Violation(
                            "C140", "name and version",
                            f"{plugin.name} {plugin.version} to be free",
                            f"taken by {other.cls.__qualname__} at {other.place}, "
                            f"wanted by {plugin.cls.__qualname__} at {plugin.place}",
                            file, line, "Raise the version, or give it another `name=`.",
                        )
                    ],
                )  # fmt: skip

    @contextmanager
    def transaction(self, replaced: Source | None = None) -> Iterator[Transaction]:
        """Collect what is registered in this context; commit it when the block ends well.

        With `replaced`, the plugins of that source make room for it in the same step.
        """
        collected: Transaction = []
        token = _open.set(collected)
        try:
            yield collected
        finally:
            _open.reset(token)
        with self._lock:
            leaving = [p for p in self.snapshot() if replaced and p.source is replaced]
            for plugin in collected:
                family = self._families.get(plugin.name)
                staying = [p for p in (family.plugins if family else ()) if p not in leaving]
                self._refuse_duplicate(plugin, staying, None)
            self._put(collected, leaving)

    def _put(self, added: list[Plugin], leaving: list[Plugin]) -> None:
        """Under the lock: one new family per name that changes."""
        left: list[Plugin] = []
        for name in {plugin.name for plugin in (*added, *leaving)}:
            family = self._families.get(name)
            plugins = list(family.plugins) if family else []
            for plugin in added:
                if plugin.name == name:
                    for old in [p for p in plugins if p.version == plugin.version]:
                        plugins.remove(old)
                        if old.state is State.DISABLED:
                            plugin.state, plugin.reason = old.state, old.reason
                        left.append(old)
                    plugins.append(plugin)
                    for method, meter in plugin.meters.items():
                        self._meters[plugin.name, plugin.version.text, method] = meter
            for old in leaving:
                if old in plugins:
                    plugins.remove(old)
                    left.append(old)
                    for method in old.meters:
                        self._meters.pop((*old.key, method), None)
            if plugins:
                pinned = family.pinned if family else None
                self._families[name] = Family.of(tuple(plugins), pinned)
            else:
                self._families.pop(name, None)
        self.revision += 1
        if left:
            forget()
        for plugin in left:
            plugin.state = State.DRAINING
            self.drained(plugin)
        for plugin in leaving:
            self._tell("removed", plugin)
        for plugin in added:
            self._tell("added", plugin)

    def drained(self, plugin: Plugin) -> None:
        """Let go of a plugin that left, once no call is running on it."""
        if plugin.state is State.DRAINING and plugin.in_flight == 0:
            plugin.state = State.UNLOADED
            plugin.extras.clear()
            if not any(p.source is plugin.source for p in self.snapshot()):
                plugin.source.dropped()

    @contextmanager
    def serving(self, plugin: Plugin) -> Iterator[None]:
        """While it runs, the plugin that is called is kept, whatever happens to its name."""
        with self._lock:
            plugin.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                plugin.in_flight -= 1
                self.drained(plugin)

    def unregister(self, name: str, version: str | None = None) -> None:
        """Remove one version, or without a version all of them; running calls are finished."""
        with self._lock:
            found = self.find(name, version)
            leaving = list(self._families[name].plugins) if version is None else [found]
            self._put([], leaving)

    def use_default(self, name: str, version: str | None) -> None:
        """Pin the version that answers when none is named; None lets it be the highest release."""
        with self._lock:
            found = self.find(name, version)
            family = self._families[name]
            pinned = found.version if version is not None else None
            self._families[name] = Family.of(family.plugins, pinned)
            self.revision += 1
            self._tell("changed", found)

    def enable(self, name: str, version: str | None = None) -> None:
        """Let it serve again."""
        self.set_state(self.find(name, version), State.ENABLED)

    def disable(self, name: str, version: str | None = None) -> None:
        """Refuse calls until it is enabled; calls that had begun are finished."""
        self.set_state(self.find(name, version), State.DISABLED, "switched off by an operator")

    def set_state(self, plugin: Plugin, state: State, reason: str = "") -> None:
        """Change whether a plugin serves."""
        with self._lock:
            if plugin.state in (State.DRAINING, State.UNLOADED) or plugin.state is state:
                return
            plugin.state, plugin.reason = state, reason
            self.revision += 1
            self._tell("changed", plugin)

    def reload(self, name: str, version: str | None = None) -> None:
        """Read the source of a plugin again and swap it in; a failure keeps the old one."""
        self.find(name, version).source.reload()

    # --- others that take part ----------------------------------------------------------------

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Be told ("added" | "removed" | "changed", plugin), under the lock; returns the end."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def resolve_with(self, resolve: Callable[[str], bool]) -> None:
        """Ask it for names that are not there; it registers what it finds and says so."""
        self._resolve.append(resolve)

    def _tell(self, what: str, plugin: Plugin) -> None:
        for listener in list(self._listeners):
            listener((what, plugin))


def key_fault(name: str) -> str | None:
    """Why a plugin cannot be called so."""
    if name in RESERVED:
        return f"{name!r}, which is reserved"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"{name!r:.80}"
    return None


def signature_of(cls: type) -> dict[str, Any]:
    """Names, kinds, defaults and annotations of its contract members, the same on every host."""
    found: dict[str, Any] = {}
    names = {name for spec in contracts_of(cls) for name in spec.members}
    for name in sorted(names):
        owner = next((base for base in cls.__mro__ if name in vars(base)), cls)
        if name not in vars(owner):
            continue
        member = read(name, vars(owner)[name], owner)
        found[name] = {
            "kind": member.kind.value,
            "color": member.color.value,
            "returns": text_of(member.annotation),
            "parameters": [
                [p.name, p.kind, p.required, text_of(p.annotation)] for p in member.claimed or ()
            ],
        }
    return found
