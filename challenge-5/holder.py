"""One scheduler at a time on a database: a lock that dies with its holder and names it."""

import os
from pathlib import Path
from typing import Any

from errors import StoreLocked


class Holder:
    """Holds the lock beside the database until `release`, or until the process ends in any way."""

    def __init__(self, database: Path) -> None:
        """Take the lock; raise StoreLocked naming the process that has it."""
        self._path = Path(f"{database}.lock")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(self._path, flags, 0o600)
        try:
            _lock(self._fd)
        except OSError:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreLocked(
                f"The database {database.name} is in use by the scheduler of process {holder}. "
                "Stop that one, or give this one another path."
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, b"%d\n" % os.getpid())

    def release(self, *, remove: bool = False) -> None:
        """Let the next one in; idempotent."""
        if self._fd >= 0:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _lock(fd: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        windows: Any = msvcrt
        os.lseek(fd, 64, os.SEEK_SET)  # past the holder's number, which stays readable
        windows.locking(fd, windows.LK_NBLCK, 1)
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
