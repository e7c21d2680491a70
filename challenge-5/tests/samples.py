"""Functions that workers import; they talk to the tests through files."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def noop() -> None:
    return None


def add(a: int, b: int) -> int:
    return a + b


def echo(value: Any) -> Any:
    return value


def together(*values: Any) -> list[Any]:
    return list(values)


def pid() -> int:
    return os.getpid()


def boom(message: str = "boom") -> None:
    raise ValueError(message)


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def spin(marker: str | None = None) -> None:
    if marker:
        Path(marker).write_text(str(os.getpid()))
    while True:
        pass


def wait_for(path: str, marker: str | None = None) -> str:
    """Run until a file appears."""
    if marker:
        Path(marker).write_text(str(os.getpid()))
    while not Path(path).exists():
        time.sleep(0.001)
    return path


def stubborn(marker: str) -> None:
    """Ignores signals, and catches whatever it can."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Path(marker).write_text(str(os.getpid()))
    while True:
        try:
            while True:
                pass
        except:  # noqa: E722
            pass


def long_c_loop() -> int:
    return sum(range(10**10))


def long_sleep() -> None:
    time.sleep(600)


def append(path: str, line: str) -> str:
    with Path(path).open("a") as file:
        file.write(line + "\n")
    return line


def die(path: str) -> None:
    append(path, "died")
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(path: str) -> str:
    if not Path(path).exists():
        append(path, "died")
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def exit_now() -> None:
    os._exit(3)


def leave() -> None:
    sys.exit(4)


def fail_times(path: str, times: int) -> int:
    """Fails that often, then returns how often it ran."""
    append(path, "x")
    runs = len(Path(path).read_text().splitlines())
    if runs <= times:
        raise RuntimeError(f"failure {runs}")
    return runs


def grandchildren(marker: str) -> None:
    """A child of the same process group, one of its own, then wait for ever."""
    same = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    Path(marker).write_text(f"{os.getpid()} {same.pid} {other.pid}")
    time.sleep(600)


def fork_and_return() -> str:
    """A child that comes out of the function must not become a second worker."""
    child = os.fork()
    if child == 0:
        return "child"
    os.waitpid(child, 0)
    return "parent"


def close_descriptors(then: Any, marker: str | None = None) -> Any:
    """Nothing is open any more; then it returns, or goes on for ever."""
    os.closerange(3, 256)
    if marker:
        Path(marker).touch()
    while then is None:
        pass
    return then


def tell(marker: str) -> int:
    from context import current_task

    task = current_task()
    task.progress(0.5, "half")
    task.log("one")
    task.log("two")
    Path(marker).write_text("told")
    return task.attempt


def sized(number: int) -> bytes:
    return bytes(number)


def many_then_wait(path: str, number: int) -> str:
    return wait_for(path) if number == 0 else str(number)


def use_c_stack() -> None:
    ctypes.string_at(0)


class TwoArguments(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_two() -> None:
    raise TwoArguments(1, 2)


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("never")


def raise_unpicklable() -> None:
    raise Unpicklable("stays here")


class ExplodesInParent:
    def __init__(self, home: int) -> None:
        self.home = home

    def __reduce__(self) -> Any:
        return _explode, (os.getpid(),)


def _explode(home: int) -> None:
    if os.getpid() != home:
        raise RuntimeError("unpickled elsewhere")


def return_explosive() -> Any:
    return ExplodesInParent(os.getpid())


def return_lock() -> Any:
    import threading

    return threading.Lock()


class Acts:
    """Does something while it is pickled or unpickled in another process than its own."""

    def __init__(self, what: str, *, when_pickled: bool = False) -> None:
        self.what, self.when_pickled, self.home = what, when_pickled, os.getpid()

    def __reduce__(self) -> Any:
        if self.when_pickled and os.getpid() == self.home:
            act(self.what)
        return _unpickle, (self.what, self.home)


def _unpickle(what: str, home: int) -> str:
    if os.getpid() != home:
        act(what)
    return what


def act(what: str) -> None:
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        sys.exit(5)
    raise OSError("while pickling")


def return_acting(what: str) -> Acts:
    return Acts(what, when_pickled=True)
