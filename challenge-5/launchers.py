"""How worker processes come to life: forked by a zygote (Linux), or each started by itself.

Both give the engine messages of the same form: {"born": n, "pid": p}, {"died": n, "status": s}.
What is lost without the zygote: starts take 100 ms and more instead of 4, and nothing ends the
children of a task's children when the scheduler is killed.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

import psutil

from slots import SLOT_BYTES

FOLDER = Path(__file__).resolve().parent
STOP_SECONDS = 5.0
MESSAGE_BYTES = 64 * 1024


class Launcher(Protocol):
    """Starts and kills workers by number; `messages` tells what has happened."""

    def fileno(self) -> int:
        """Readable when there are messages."""

    def launch(self, number: int, result_limit: int) -> tuple[socket.socket, mmap]:
        """Begin to start a worker; our end of its channel, and the memory it shares."""

    def hung_up(self, number: int) -> None:
        """Our end saw the worker's end of the channel close."""

    def kill(self, number: int) -> None:
        """End a worker with all its descendants."""

    def messages(self) -> list[dict[str, Any]] | None:
        """What has happened since; None when the launcher itself is gone."""

    def close(self) -> None:
        """End all workers, and what starts them."""


def launcher(method: str) -> Launcher:
    """The zygote where it works ("auto" or "zygote"), else "spawn"."""
    if method == "spawn" or (method == "auto" and sys.platform != "linux"):
        return SpawnLauncher()
    return ZygoteLauncher()


def _import_path() -> list[str]:
    return [str(Path(entry or ".").absolute()) for entry in sys.path]


class ZygoteLauncher:
    """Asks a zygote process for forks; it also reaps them, so its word on a death is final."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(FOLDER / "zygote.py"), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is the scheduler's business
            )
        self._control.setblocking(False)
        self._pids: dict[int, int] = {}

    def fileno(self) -> int:
        """The control channel."""
        return self._control.fileno()

    def launch(self, number: int, result_limit: int) -> tuple[socket.socket, mmap]:
        """A socket pair and anonymous memory, passed to the zygote."""
        ours, theirs = socket.socketpair()
        memory_fd = os.memfd_create("slot", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory_fd, SLOT_BYTES)
            memory = mmap(memory_fd, SLOT_BYTES)
            order = {"fork": number, "path": _import_path(), "result_limit": result_limit}
            self._send(order, [theirs.fileno(), memory_fd])
        finally:
            theirs.close()
            os.close(memory_fd)
        ours.setblocking(False)
        return ours, memory

    def _send(self, order: dict[str, Any], fds: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # `messages` will say None
            self._control.setblocking(True)
            socket.send_fds(self._control, [json.dumps(order).encode()], fds)
        self._control.setblocking(False)

    def hung_up(self, number: int) -> None:
        """Nothing to do: the zygote tells."""

    def kill(self, number: int) -> None:
        """The zygote knows its process, also when it was just forked."""
        self._send({"kill": number}, [])

    def messages(self) -> list[dict[str, Any]] | None:
        """What the zygote told; None when it is gone itself."""
        found: list[dict[str, Any]] = []
        while True:
            try:
                data = self._control.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                self._end_groups()
                return None
            message = json.loads(data)
            if "born" in message:
                self._pids[message["born"]] = message["pid"]
            else:
                self._pids.pop(message["died"], None)
            found.append(message)

    def _end_groups(self) -> None:
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self._pids.clear()

    def close(self) -> None:
        """Closing the control channel is the order to end."""
        self._control.close()  # the zygote kills what is left and ends
        _wait(self._process)


class SpawnLauncher:
    """Starts each worker as a fresh interpreter; for systems without a zygote."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._told: list[dict[str, Any]] = []
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._directory = tempfile.TemporaryDirectory(prefix="scheduler-")

    def fileno(self) -> int:
        """The reading end of a pipe to ourselves."""
        return self._woken.fileno()

    def launch(self, number: int, result_limit: int) -> tuple[socket.socket, mmap]:
        """A fresh interpreter; the memory is a file that it maps, too."""
        ours, theirs = socket.socketpair()
        path = Path(self._directory.name) / f"slot-{number}"
        path.write_bytes(bytes(SLOT_BYTES))
        with path.open("r+b") as file:
            memory = mmap(file.fileno(), SLOT_BYTES)
        options: dict[str, Any] = {"path": _import_path(), "result_limit": result_limit}
        inherits = sys.platform != "win32"
        process = subprocess.Popen(
            [sys.executable, str(FOLDER / "worker.py"),
             str(theirs.fileno()) if inherits else "shared", str(path)],
            stdin=subprocess.PIPE,
            **_own_group(theirs),
        )  # fmt: skip
        assert process.stdin is not None
        share: Callable[[int], bytes] | None = getattr(theirs, "share", None)
        shared = share(process.pid) if share and not inherits else b""
        options["socket_bytes"] = len(shared)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(options).encode() + b"\n" + shared)
            process.stdin.close()
        theirs.close()
        ours.setblocking(False)
        self._processes[number] = process
        self._tell({"born": number, "pid": process.pid})
        return ours, memory

    def _tell(self, message: dict[str, Any]) -> None:
        self._told.append(message)
        self._wake.send(b"\0")

    def hung_up(self, number: int) -> None:
        """The worker's end of its channel is closed: it has ended, or is about to."""
        if (process := self._processes.pop(number, None)) is not None:
            _kill_tree(process.pid)
            status = process.wait()
            self._tell({"died": number, "status": status})

    def kill(self, number: int) -> None:
        """By the tree of processes: there is no guard here."""
        if process := self._processes.get(number):
            _kill_tree(process.pid)

    def messages(self) -> list[dict[str, Any]] | None:
        """What was noted when it was done."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        """End every process and remove the files of the memory."""
        for number in list(self._processes):
            self.hung_up(number)
        self._wake.close()
        self._woken.close()
        self._directory.cleanup()


def _own_group(channel: socket.socket) -> dict[str, Any]:
    if sys.platform == "win32":
        return {}
    return {"pass_fds": (channel.fileno(),), "process_group": 0}


def _kill_tree(pid: int) -> None:
    try:
        attached = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        attached = []
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    for process in (*attached, *([psutil.Process(pid)] if psutil.pid_exists(pid) else ())):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
