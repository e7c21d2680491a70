"""What a crash leaves behind, at every durable step of one execution.

Each step (a file that is made, written, synced, cut or removed; a commit or checkpoint of the
database) waits until no other is under way, and is announced before it is done. So a copy of the
directory at that moment is what a process killed there leaves; and because it is known what was
synced, what a power cut leaves is known too. Nothing is left to chance: it is the same execution
whose every moment is looked at.
"""

import itertools
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

DATABASE = "aggregates.db"
KINDS = ("killed", "torn", "cut")  # the process alone; half of what is not synced; all of it


class Disk:
    """Watches a directory; `announce` is called before each step with what it is.

    `left` is what an earlier crash left: what is durable of it (by default: everything).
    """

    def __init__(self, root: Path, announce: Callable[[str], None], left: "Durable | None") -> None:
        self.root = root
        self.durable = left or Durable()
        self._announce = announce
        self._one_at_a_time = threading.RLock()
        self._opened: dict[int, Path] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Every durable step below the directory is a step from here on."""
        watched = (self._open, self._write, self._fsync, self._fdatasync, self._truncate,
                   self._unlink, self._replace, self._mkdir)  # fmt: skip
        functions = {each.__name__[1:]: each for each in watched}
        connect = mock.patch.object(sqlite3, "connect", self._connect)
        with connect, ExitStack() as patches:
            for name, function in functions.items():
                patches.enter_context(mock.patch.object(os, name, function))
            yield

    @contextmanager
    def _step(self, what: str, path: Path) -> Iterator[None]:
        with self._one_at_a_time:
            if self.root in path.parents:
                self._announce(f"{what} {path.relative_to(self.root)}")
            yield

    def _path(self, fd: int) -> Path:
        return self._opened.get(fd, Path("/"))

    def _open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        path = Path(path)
        makes = bool(flags & os.O_CREAT) and not path.exists()
        with self._step("make", path) if makes else self._one_at_a_time:
            fd = real.open(path, flags, mode, **options)
            self._opened[fd] = path
            if makes:
                self.durable.made(path)
            return fd

    def _write(self, fd: int, data: Any) -> int:
        with self._step("write", self._path(fd)):
            return real.write(fd, data)

    def _fsync(self, fd: int) -> None:
        with self._step("sync", self._path(fd)):
            real.fsync(fd)
            self.durable.synced(self._path(fd))

    def _fdatasync(self, fd: int) -> None:
        with self._step("sync", self._path(fd)):
            real.fdatasync(fd)
            self.durable.synced(self._path(fd))

    def _truncate(self, path: Any, length: int) -> None:
        if isinstance(path, int):
            return real.truncate(path, length)
        with self._step("cut", Path(path)):
            return real.truncate(path, length)

    def _unlink(self, path: Any, **options: Any) -> None:
        with self._step("remove", Path(path)):
            real.unlink(path, **options)
            self.durable.removed(Path(path))

    def _replace(self, source: Any, target: Any, **options: Any) -> None:
        with self._step("rename", Path(target)):
            real.replace(source, target, **options)
            self.durable.renamed(Path(source), Path(target))

    def _mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        if not Path(path).exists():
            with self._step("make", Path(path)):
                return real.mkdir(path, mode, **options)
        return real.mkdir(path, mode, **options)

    def _connect(self, path: Any, **options: Any) -> sqlite3.Connection:
        disk = self

        class Watched(sqlite3.Connection):
            """Statements that change what is durable are steps; the others exclude them."""

            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                lasting = sql.startswith(("COMMIT", "PRAGMA wal_checkpoint", "PRAGMA journal_mode"))
                with disk._step(sql, Path(path)) if lasting else disk._one_at_a_time:
                    cursor = super().execute(sql, *parameters)
                    if lasting and (sql != "COMMIT" or self.is_synced()):
                        disk.durable.database_synced(Path(path))
                    return cursor

            def executemany(self, *arguments: Any) -> sqlite3.Cursor:
                with disk._one_at_a_time:
                    return super().executemany(*arguments)

            def is_synced(self) -> bool:
                return bool(super().execute("PRAGMA synchronous").fetchone()[0] >= 2)

        return real.connect(path, factory=Watched, **options)

    def left(self, kind: str, into: Path) -> "Durable":
        """Write what a crash of this kind leaves now; return what is durable of that."""
        with self._one_at_a_time:
            if kind == "killed":
                shutil.copytree(self.root, into)
                return self.durable.moved(self.root, into)
            if kind == "torn":
                shutil.copytree(self.root, into)
                self.durable.tear(self.root, into)
            else:
                into.mkdir()
                self.durable.write(self.root, into)
            return Durable.of(into)


class Durable:
    """What of a tree of files would be there after a power cut: names, and contents by file."""

    def __init__(self) -> None:
        self.names: dict[Path, dict[str, int]] = {}  # of each synced directory
        self.files: dict[Path, int] = {}  # as they are now
        self.contents: dict[int, bytes] = {}
        self._numbers = itertools.count()

    @classmethod
    def of(cls, root: Path) -> "Durable":
        """Of a tree that is durable as it is."""
        durable = cls()
        for directory, _, files in os.walk(root):
            for name in files:
                durable.made(Path(directory, name))
                durable.synced(Path(directory, name))
            durable.synced(Path(directory))
        return durable

    def made(self, path: Path) -> None:
        self.files[path] = next(self._numbers)
        self.contents[self.files[path]] = b""

    def removed(self, path: Path) -> None:
        self.files.pop(path, None)

    def renamed(self, source: Path, target: Path) -> None:
        self.files[target] = self.files.pop(source)

    def synced(self, path: Path) -> None:
        if path.is_dir():
            self.names[path] = {
                each.name: -1 if each.is_dir() else self.files[each]
                for each in path.iterdir()
                if each.is_dir() or each in self.files
            }
        elif path in self.files:
            self.contents[self.files[path]] = path.read_bytes()

    def database_synced(self, path: Path) -> None:
        """The database syncs its own files, and where they are named."""
        for each in (path, path.with_name(f"{path.name}-wal")):
            if each.exists():
                if each not in self.files:
                    self.made(each)
                self.synced(each)
                self.names.setdefault(path.parent, {})[each.name] = self.files[each]

    def moved(self, source: Path, target: Path) -> "Durable":
        """The same, of a copy of the tree."""

        def there(path: Path) -> Path:
            return target / path.relative_to(source)

        copy = Durable()
        copy.names = {there(p): dict(names) for p, names in self.names.items()}
        copy.files = {there(p): number for p, number in self.files.items()}
        copy.contents = dict(self.contents)
        copy._numbers = itertools.count(next(self._numbers))
        return copy

    def write(self, source: Path, target: Path) -> None:
        """Write what would be there."""
        for name, number in self.names.get(source, {}).items():
            if number >= 0:
                (target / name).write_bytes(self.contents[number])
            else:
                (target / name).mkdir(0o700)
                self.write(source / name, target / name)

    def tear(self, source: Path, target: Path) -> None:
        """Cut appended files in the middle of what is not synced."""
        for path, number in self.files.items():
            copy = target / path.relative_to(source)
            if copy.exists() and not path.name.startswith(DATABASE):
                least, most = len(self.contents[number]), copy.stat().st_size
                if least < most:
                    os.truncate(copy, (least + most) // 2)


def files_of(root: Path) -> dict[Path, bytes]:
    """What lies below a directory, without what dies with a process."""
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(("-shm", ".lock", "holder"))
    }


class real:
    """The functions as they were."""

    open, write, fsync, fdatasync = os.open, os.write, os.fsync, os.fdatasync
    truncate, unlink, replace, mkdir = os.truncate, os.unlink, os.replace, os.mkdir
    connect = sqlite3.connect
