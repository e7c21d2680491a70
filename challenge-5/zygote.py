"""The process that forks workers, and the guard that leaves none behind.

It is started once as a fresh interpreter, has one thread and holds no socket of another worker, so
forking it is cheap (4 ms) and safe whatever the scheduler's process does with threads. Every worker
leads a process group. When one ends, the rest of its group is killed before its number can be used
again; when the scheduler goes, by SIGKILL too, its end of the control channel closes, and every
group is killed here: dying with the parent would not reach grandchildren.

    scheduler -> {"fork": n, "path": …} + [channel, memory]   {"kill": n}
    zygote    -> {"born": n, "pid": …}                         {"died": n, "status": …}
"""

import ctypes
import json
import mmap
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, cast

import psutil

import worker

PR_SET_PDEATHSIG = 1
MESSAGE_BYTES = 256 * 1024


class Zygote:
    """Forks, watches and kills workers, until the scheduler goes."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.workers: dict[int, int] = {}  # pid -> number
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.woken, wake = os.pipe()
        for end in (self.woken, wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Obey and bury until the scheduler goes, then kill what is left."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            selector.register(self.woken, selectors.EVENT_READ)
            going_on = True
            while going_on:
                for key, _ in selector.select():
                    if key.fileobj is self.control:
                        going_on = self.obey()
                    else:
                        with suppress(BlockingIOError):
                            os.read(self.woken, 4096)
                self.bury()
        for pid in list(self.workers):
            self.kill(pid)

    def obey(self) -> bool:
        """Do what the scheduler asks; False when it has gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 2)
        except OSError:
            return False
        if not data:
            return False
        order = json.loads(data)
        if "fork" in order:
            try:
                self.fork(order, *fds)
            except (OSError, TypeError):  # no memory or no process left; descriptors got lost
                self.tell({"died": order["fork"], "status": 1})
            finally:
                for fd in fds:
                    os.close(fd)
        else:
            for pid, number in self.workers.items():
                if number == order["kill"]:
                    self.kill(pid)
        return True

    def fork(self, order: dict[str, Any], channel: int, memory: int) -> None:
        """Fork a worker; in the child this never returns."""
        pid = os.fork()
        if pid == 0:
            self.become_worker(order, channel, memory)
        with suppress(OSError):  # both sides set it: whoever comes first
            os.setpgid(pid, pid)
        self.workers[pid] = order["fork"]
        self.tell({"born": order["fork"], "pid": pid})

    def become_worker(self, order: dict[str, Any], channel: int, memory: int) -> None:
        """Be a worker in a group of its own, which dies with the zygote."""
        code = 1
        try:
            os.setpgid(0, 0)
            self.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == 1:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for stream in (sys.stdout, sys.stderr):
                cast("TextIOWrapper", stream).reconfigure(line_buffering=True)
            self.control.close()
            sys.path[:] = order["path"]
            with socket.socket(fileno=channel) as connected:
                shared = mmap.mmap(memory, 0)
                os.close(memory)
                worker.main(connected, shared, order["result_limit"])
            code = 0
        except (ConnectionError, KeyboardInterrupt):
            code = 0
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def bury(self) -> None:
        """Report workers that have ended; kill what is left of their groups first."""
        for pid, number in list(self.workers.items()):
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # the zombie still holds its number
            _, status = os.waitpid(pid, 0)
            del self.workers[pid]
            self.tell({"died": number, "status": os.waitstatus_to_exitcode(status)})

    def kill(self, pid: int) -> None:
        """End a worker with its group, and descendants that left the group but are attached."""
        try:
            attached = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            attached = []
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for process in attached:
            with suppress(psutil.Error):
                process.kill()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the scheduler."""
        with suppress(OSError):  # the scheduler has gone: the next look at the channel shows it
            self.control.send(json.dumps(message).encode())


def main() -> None:
    """`zygote.py CONTROL`: the number of an inherited descriptor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when the scheduler does
    with socket.socket(fileno=int(sys.argv[1])) as control:
        Zygote(control).serve()


if __name__ == "__main__":
    main()
