"""Plugins from files and installed distributions, each loaded whole or not at all.

A file is read as bytes, known by its SHA-256, compiled from those bytes (never from the bytecode
cache, which can be stale within a second) and run as a module of a private name, so that it hides
nothing. What it registers becomes visible when it has ended well. Whatever it raises is caught and
listed; whether it ends at all is found out in another process first (`probing`).
"""

import hashlib
import importlib.metadata
import linecache
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, Literal, TypeVar

from logs import get_logger
from probing import DoesNotLoad, Probe
from registry import Failure, Registry, RegistryError, loading_from
from violations import ContractViolationError

log = get_logger("plugins")

PACKAGE = "_c3_plugins"
GROUP = "challenge3.plugins"
LARGEST_FILE_BYTES = 1024 * 1024
LONGEST_ERROR = 2000
MOST_LINES = LARGEST_FILE_BYTES


class LoadError(RegistryError):
    """Raised by `reload` when the file did not load; what was there before still serves."""

    def __init__(self, failure: Failure) -> None:
        where = f", line {failure.line}" if failure.line else ""
        super().__init__(
            f"{failure.file or failure.name} failed in phase {failure.phase}{where}; "
            "the version that was loaded before keeps serving."
        )
        self.failure = failure


@dataclass
class LoadReport:
    """What a scan did, by file name."""

    loaded: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)


class FileSource:
    """One file, as it was when it was read."""

    def __init__(self, loader: "PluginLoader", path: Path, digest: str, module: ModuleType) -> None:
        self.loader = loader
        self.path = path
        self.label = path.name
        self.digest = digest
        self.module = module

    def reload(self) -> None:
        """Read the file again; LoadError when it does not load."""
        self.loader.reload(self.path)

    def code_hash(self, cls: type) -> str:  # noqa: ARG002  (all classes of a file share it)
        """SHA-256 of the file."""
        return self.digest

    def owns(self, cls: type, frame: FrameType) -> bool:  # noqa: ARG002
        """All but those of modules that the file imports: they are not made anew by a reload.

        The name of its module is no help: `make_dataclass` and factories elsewhere give others.
        """
        caller: FrameType | None = frame
        while caller is not None and caller.f_code is not PluginLoader._load_file.__code__:
            if caller.f_code.co_filename.startswith("<frozen importlib"):
                return False
            caller = caller.f_back
        return True

    def dropped(self) -> None:
        """Let the module go: no call runs on it any more."""
        if sys.modules.get(self.module.__name__) is self.module:
            del sys.modules[self.module.__name__]


class PluginLoader:
    """Keeps a registry in step with the `*.py` of a directory; those with `_` in front are left."""

    def __init__(self, registry: Registry, directory: Path, probe: Probe | None = None) -> None:
        self.registry = registry
        self.directory = directory
        self.probe = probe
        self._sources: dict[str, FileSource] = {}
        self._lock = threading.Lock()
        self._count = 0

    def load(self) -> LoadReport:
        """Load what is new or changed, try again what failed, remove what is gone."""
        report = LoadReport()
        with self._lock:
            self.registry.failures.pop(self.directory.name, None)
            if (error := self._refusal(self.directory)) is not None:
                report.failed.append(self._fail(self.directory, "read", error))
                return report
            files = sorted(p for p in self.directory.glob("*.py") if not p.name.startswith("_"))
            names = {path.name for path in files}
            for name in sorted(set(self._sources) - names):
                with self.registry.transaction(replaced=self._sources.pop(name)):
                    report.removed.append(name)
            for name in [n for n in self.registry.failures if n.endswith(".py")]:
                if name not in names:
                    del self.registry.failures[name]
            for path in files:
                self._load_or_list(path, report)
        log.info(
            "plugins_loaded", loaded=report.loaded, unchanged=len(report.unchanged),
            removed=report.removed, failed=[failure.file for failure in report.failed],
        )  # fmt: skip
        return report

    def _load_or_list(self, path: Path, report: LoadReport) -> None:
        failure = self._load_file(path, forced=path.name in self.registry.failures)
        if failure is not None:
            report.failed.append(failure)
        elif failure is None and self._changed:
            report.loaded.append(path.name)
        else:
            report.unchanged.append(path.name)

    def close(self) -> None:
        """Take everything out again that came from the directory."""
        if self.probe is not None:
            self.probe.close()
        with self._lock:
            for name in list(self._sources):
                with self.registry.transaction(replaced=self._sources.pop(name)):
                    pass
            for name in [n for n, f in self.registry.failures.items() if f.file == n]:
                del self.registry.failures[name]

    def read_alone(self, path: Path) -> Failure | None:
        """Run one file and nothing else; what went wrong, if anything did."""
        with self._lock:
            return self._load_file(path, forced=True)

    def reload(self, path: Path) -> None:
        """Read one file again, changed or not; LoadError keeps what was there."""
        with self._lock:
            failure = self._load_file(path, forced=True)
        if failure is not None:
            raise LoadError(failure)

    def _load_file(self, path: Path, *, forced: bool) -> Failure | None:
        """One file as one transaction."""
        self._changed = False
        old = self._sources.get(path.name)
        try:
            content = self._read(path)
        except OSError as error:
            return self._fail(path, "read", error)
        digest = hashlib.sha256(content).hexdigest()
        if old is not None and old.digest == digest and not forced:
            return None
        try:
            if self.probe is not None:
                self.probe.check(path, content)
        except DoesNotLoad as error:
            return self._fail(path, "import", error)
        module = self._module(path, digest)
        source = FileSource(self, path, digest, module)
        phase = "compile"
        token = loading_from.set(source)
        try:
            with _noticing_interrupts() as interrupts, self.registry.transaction(old):
                code = compile(content, str(path), "exec", dont_inherit=True)
                _remember_lines(path, content)
                phase = "import"
                sys.modules[module.__name__] = module
                exec(code, module.__dict__)  # noqa: S102  (this is what loading a plugin is)
                phase = "register"
        except BaseException as error:  # a plugin may raise SystemExit or anything else
            sys.modules.pop(module.__name__, None)
            if interrupts and type(error) is KeyboardInterrupt:
                raise
            if phase == "import" and issubclass(type(error), ContractViolationError):
                phase = "contract"
            return self._fail(path, phase, error)
        finally:
            loading_from.reset(token)
        self._sources[path.name] = source
        self.registry.failures.pop(path.name, None)
        self._changed = True
        return None

    def _read(self, path: Path) -> bytes:
        if (refusal := self._refusal(path)) is not None:
            raise refusal
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
        if len(content) > LARGEST_FILE_BYTES:
            raise OSError(f"larger than {LARGEST_FILE_BYTES:,} bytes")
        return content

    def _refusal(self, path: Path) -> OSError | None:
        """Why the file or directory is not to be trusted."""
        try:
            found = path.stat()
        except OSError as error:
            return OSError(f"cannot be read: {error.strerror}")
        if os.name == "posix" and found.st_mode & stat.S_IWOTH:
            return OSError("everybody may write to it: chmod o-w")
        if path != self.directory:
            if not stat.S_ISREG(found.st_mode):
                return OSError("no regular file")
            if not path.resolve().is_relative_to(self.directory.resolve()):
                return OSError("a link that leads out of the directory")
        return None

    def _module(self, path: Path, digest: str) -> ModuleType:
        if PACKAGE not in sys.modules:
            package = ModuleType(PACKAGE)
            package.__path__ = []
            sys.modules[PACKAGE] = package
        stem = re.sub(r"\W", "_", path.stem)
        name = f"{PACKAGE}.{stem}_{digest[:12]}"
        if name in sys.modules:  # the same content once more
            self._count += 1
            name = f"{name}_{self._count}"
        module = ModuleType(name)
        module.__file__ = str(path)
        return module

    def _fail(self, path: Path, phase: str, error: BaseException) -> Failure:
        failure = Failure(
            phase=phase,
            error=_text_of(error, self.directory),
            file=path.name,
            line=_line_of(error, str(path)),
        )
        self.registry.failures[path.name] = failure
        log.warning(
            "plugin_failed", file=path.name, phase=phase, line=failure.line, error=failure.error
        )
        return failure


@contextmanager
def _noticing_interrupts() -> Iterator[list[int]]:
    """Tell a Ctrl-C from a plugin that raises KeyboardInterrupt."""
    seen: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _remember_lines(path: Path, content: bytes) -> None:
    """Let tracebacks and violations show what was loaded, not what is in the file by then."""
    lines = content.decode("utf-8", "replace").splitlines(keepends=True)
    linecache.cache[str(path)] = (len(content), None, lines, str(path))


Described = TypeVar("Described")


def _careful(describe: Callable[[], Described], otherwise: Described) -> Described:
    """An exception of a plugin may fail to describe itself, in any way: it may exit, even."""
    try:
        return describe()
    except BaseException:  # noqa: BLE001
        return otherwise


def _text_of(error: BaseException, directory: Path) -> str:
    """The error without the place of the directory on this machine; it can be sent as JSON."""
    text = _careful(lambda: f"{error}", "its message cannot be read")
    text = text.replace(f"{directory}{os.sep}", "")[:LONGEST_ERROR]
    text = text.encode("utf-8", "replace").decode()
    if text and issubclass(type(error), (ContractViolationError, OSError, DoesNotLoad)):
        return text
    kind = _careful(lambda: f"{type(error).__name__}", "an exception")
    return f"{kind}: {text}" if text else kind


def _line_of(error: BaseException, file: str) -> int | None:
    line = _careful(lambda: _stated_line(error, file), None)
    return line if type(line) is int and 0 < line < MOST_LINES else None


def _stated_line(error: BaseException, file: str) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    if isinstance(error, DoesNotLoad):
        return error.line
    if isinstance(error, ContractViolationError):
        for violation in error.violations:
            if violation.file == file:
                return violation.line
    line = None
    for trace in _traces(error):
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
    return line


def _traces(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


# --- installed distributions ------------------------------------------------------------------


@dataclass(eq=False)
class DistributionSource:
    """An entry point of an installed distribution."""

    label: str
    module: str

    def reload(self) -> None:
        """Refused: installed code is exchanged by installing, and a restart."""
        raise RegistryError(
            f"It came with the distribution {self.label}: install the new one and restart."
        )

    def code_hash(self, cls: type) -> str:
        """SHA-256 of the file of its module."""
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        content = Path(file).read_bytes() if file else cls.__qualname__.encode()
        return hashlib.sha256(content).hexdigest()

    def owns(self, cls: type, frame: FrameType) -> bool:  # noqa: ARG002
        """Whether the class was defined by the package of the entry point."""
        return cls.__module__.partition(".")[0] == self.module.partition(".")[0]

    def dropped(self) -> None:
        """Installed modules stay imported."""


class EntryPoints:
    """Plugins of installed distributions, imported when they are first asked for."""

    def __init__(self, registry: Registry, group: str = GROUP) -> None:
        self.registry = registry
        self.group = group
        self.probe: Probe | None = None  # the app sets it while it runs
        self._pending: dict[tuple[str, str], importlib.metadata.EntryPoint] = {}
        self._known: set[tuple[str, str]] = set()
        self._scanned: tuple[Any, ...] | None = None
        self._lock = threading.RLock()

    def pending(self) -> list[str]:
        """Names that are known and not imported yet."""
        self._scan()
        return sorted(point.name for point in self._pending.values())

    def resolve(self, name: str) -> bool:
        """Import what is called so, or, when nothing is, all that is still to be imported."""
        with self._lock:
            self._scan()
            named = [k for k, p in self._pending.items() if name in (p.name, p.attr)]
            loaded = False
            for key in named or list(self._pending):
                loaded |= self._load(self._pending.pop(key))
            return loaded or (bool(named) and bool(self._pending) and self.resolve(name))

    def load_all(self) -> None:
        """Import all of them."""
        with self._lock:
            self._scan()
            for key in list(self._pending):
                self._load(self._pending.pop(key))

    def _scan(self) -> None:
        """Find them; again only when the path has changed, since a scan takes milliseconds."""
        seen = tuple((entry, _modified(entry)) for entry in sys.path)
        if seen == self._scanned:
            return
        self._scanned = seen
        for point in self._points():
            key = (point.name, _distribution_of(point.dist))
            if key in self._known:
                continue
            self._known.add(key)
            if point.pattern.match(point.value):
                self._pending[key] = point
            else:
                self._fail(*key, ValueError(f"{point.value!r:.80} is no module:attribute"))

    def _points(self) -> list[importlib.metadata.EntryPoint]:
        """All of the group; where the files of one distribution are broken, those of the others."""
        try:
            return list(importlib.metadata.entry_points(group=self.group))
        except Exception:  # noqa: BLE001  (it raises many kinds, and does not say for which one)
            log.warning("entry_points_unreadable", group=self.group)
        found: list[importlib.metadata.EntryPoint] = []
        for each in importlib.metadata.distributions():
            try:
                found += each.entry_points.select(group=self.group)
            except Exception as error:  # noqa: BLE001
                self._fail("entry_points.txt", _distribution_of(each), error)
        return found

    def _load(self, point: importlib.metadata.EntryPoint) -> bool:
        """Import one as one transaction; whether it registered anything."""
        label = _distribution_of(point.dist)
        try:
            if self.probe is not None and point.module not in sys.modules:
                self.probe.check_entry_point(point.value)
        except DoesNotLoad as error:
            return self._fail(point.name, label, error)
        token = loading_from.set(DistributionSource(label, point.module))
        try:
            with _noticing_interrupts() as interrupts, self.registry.transaction() as found:
                point.load()
        except BaseException as error:  # whatever an installed module does, the app stays up
            if interrupts and type(error) is KeyboardInterrupt:
                raise
            return self._fail(point.name, label, error, point.module)
        finally:
            loading_from.reset(token)
        return bool(found)

    def _fail(
        self, name: str, label: str, error: BaseException, module: str = ""
    ) -> Literal[False]:
        file = _careful(lambda: _file_of(error, module), "")
        failure = Failure(
            phase="entry point",
            error=f"{label}: {_text_of(error, Path(file).parent)}",
            name=name,
            line=_line_of(error, file),
        )
        self.registry.failures[f"{name} of {label}"] = failure
        log.warning(
            "plugin_failed", entry_point=name, distribution=label, line=failure.line,
            error=failure.error,
        )  # fmt: skip
        return False


def _file_of(error: BaseException, module: str) -> str:
    """The file of a module whose import failed; it may have left no other trace of it."""
    for trace in _traces(error):
        if trace.tb_frame.f_globals.get("__name__") == module:
            return trace.tb_frame.f_code.co_filename
    return f"{error.filename}" if isinstance(error, SyntaxError) else ""


def _distribution_of(found: importlib.metadata.Distribution | None) -> str:
    """Its name and version; files that somebody has damaged may have neither."""
    try:
        if found is not None and found.name:
            return f"{found.name} {found.version}"
    except Exception:  # noqa: BLE001, S110  (it is known by its entry points alone)
        pass
    return "an unknown distribution"


def _modified(entry: str) -> int:
    try:
        return os.stat(entry or ".").st_mtime_ns  # noqa: PTH116  (a path entry may be no path)
    except OSError:
        return 0
