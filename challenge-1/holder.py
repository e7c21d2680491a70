"""One process at a time on the same data: a lock that dies with its holder and names it."""

import os
from pathlib import Path
from typing import Any

from spool import SAFE_FLAGS


class Held(RuntimeError):
    """Another process works on this data."""


class Holder:
    """Holds the lock beside the data until `release`, or until the process ends in any way."""

    def __init__(self, path: Path) -> None:
        """Take the lock; raise Held naming the process that has it."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | SAFE_FLAGS, 0o600)
        try:
            _lock(self._fd)
        except OSError:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise Held(
                f"The data is in use by process {holder}. Stop that process, or set DB_PATH and "
                "QUEUE_DIR to other places."
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, b"%d\n" % os.getpid())

    def release(self) -> None:
        """Let the next one in; idempotent."""
        if self._fd >= 0:
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
