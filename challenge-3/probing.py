"""Runs plugins' files and modules in a process that may die, before the one that must not.

Whoever imports code cannot contain what never ends, calls `os._exit` or crashes. So a helper
process, which has imported `utils` and nothing else, forks for each file or entry point: the fork
runs it and dies. That costs milliseconds; starting the helper costs one import of `utils`. What
is raised is not told here: the loader finds that out by itself, with phase and line.
"""

import base64
import contextlib
import faulthandler
import importlib
import importlib.metadata
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import IO, Any

IDLE_SECONDS = 60.0  # the helper ends when nobody asked for so long
GRACE_SECONDS = 0.5  # for the file to say where it hangs
STEP_SECONDS = 0.002


class DoesNotLoad(Exception):
    """Running the file ends the process or never ends; `line` is where it hangs, if known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class Probe:
    """Asks the helper, which is started by the first question."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None

    def check(self, path: Path, content: bytes) -> None:
        """Return when running the file comes to an end; DoesNotLoad when it does not."""
        self._check({"path": str(path), "content": base64.b64encode(content).decode()})

    def check_entry_point(self, value: str) -> None:
        """Return when loading `module:attribute` comes to an end; DoesNotLoad when it does not."""
        self._check({"entry point": value})

    def _check(self, question: dict[str, Any]) -> None:
        if not hasattr(os, "fork"):
            return
        question["timeout"] = self.timeout_seconds
        question["sys.path"] = [str(entry) for entry in sys.path]
        with self._lock:
            answer = self._ask(question)
            if answer is None and self._helper is not None:  # it had left, since it was idle
                answer = self._ask(question)
        if answer is None:
            raise DoesNotLoad("was not tried: the process for that has ended")
        if answer["trouble"]:
            raise DoesNotLoad(answer["trouble"], answer["line"])

    def _ask(self, question: dict[str, Any]) -> Any:
        helper = self._helper
        if helper is None or helper.poll() is not None:
            self.close()
            helper = self._helper = subprocess.Popen(
                [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        assert helper.stdin is not None  # noqa: S101  (it is a pipe)
        assert helper.stdout is not None  # noqa: S101
        try:
            helper.stdin.write(json.dumps(question).encode() + b"\n")
            helper.stdin.flush()
            return json.loads(helper.stdout.readline() or b"null")
        except (OSError, ValueError):
            return None
        except BaseException:  # an interrupt: its answer would be taken for that of the next
            self.close()
            raise

    def close(self) -> None:
        """End the helper, and with it the file that is running."""
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.terminate()
            try:
                helper.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()
            for pipe in (helper.stdin, helper.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


# --- the helper -------------------------------------------------------------------------------


_running: set[int] = set()  # the fork, while there is one


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the other end closes, or is silent for too long."""
    import utils  # noqa: F401  (so that no fork has to)

    signal.signal(signal.SIGTERM, _leave)
    while select.select([questions], [], [], IDLE_SECONDS)[0] and (line := questions.readline()):
        trouble, number = run_apart(json.loads(line))
        answers.write(json.dumps({"trouble": trouble, "line": number}).encode() + b"\n")
        answers.flush()


def _leave(number: int, frame: Any) -> None:
    del number, frame
    for child in _running:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(OSError):  # it may have had no group of its own yet
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    sys.exit(0)


def run_apart(question: dict[str, Any]) -> tuple[str | None, int | None]:
    """Run the code in a fork; what became of it, if not an end, and the line where it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(question, writing)
    _running.add(child)
    os.close(writing)
    status = _wait(child, question["timeout"])
    if status is None:
        os.kill(child, signal.SIGUSR1)  # where are you?
        select.select([reading], [], [], GRACE_SECONDS)
        time.sleep(STEP_SECONDS)  # the rest of what it says
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with all that it has started
    told = _all_of(reading)
    if status is None:
        os.waitpid(child, 0)
    _running.discard(child)
    if status is None:
        return f"did not end within {question['timeout']:g} s", _line_in(told, question)
    if told.endswith(b"."):
        return None, None
    code = os.waitstatus_to_exitcode(status)
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return f"ends the process that imports it ({how})", None


def _line_in(told: bytes, question: dict[str, Any]) -> int | None:
    """The innermost line of the file, or of the module that the entry point made us import."""
    frames = [(os.fsdecode(file), int(line)) for file, line in _FRAME.findall(told)]
    imported = [file for file, _ in frames if not file.startswith(_MACHINERY)]
    own = question.get("path") or (imported[-1] if imported else None)
    return next((line for file, line in frames if file == own), None)


_FRAME = re.compile(rb'File "(.+)", line (\d+)')  # the innermost comes first
_MACHINERY = ("<frozen", __file__, importlib.__file__, importlib.metadata.__file__)


def _all_of(pipe: int) -> bytes:
    """What is in the pipe by now: somebody may still hold its other end."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 65536)
    except BlockingIOError:
        return b""
    finally:
        os.close(pipe)


def _wait(child: int, seconds: float) -> int | None:
    """The exit status, or None when it still runs."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(STEP_SECONDS)


def _run(question: dict[str, Any], writing: int) -> None:
    """In the fork: the code as the loader would run it, and nothing after it."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(int(question["timeout"] + GRACE_SECONDS) + 2)  # should the helper be killed
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        faulthandler.register(signal.SIGUSR1, file=writing)
        sys.path[:] = question["sys.path"]
        if "path" in question:
            _run_file(question["path"], base64.b64decode(question["content"]))
        else:
            importlib.invalidate_caches()
            importlib.metadata.EntryPoint("it", question["entry point"], "probed").load()
    except BaseException:  # noqa: BLE001, S110  (the loader tells what it raises)
        pass
    with contextlib.suppress(OSError):
        os.write(writing, b".")
    os._exit(0)


def _run_file(path: str, content: bytes) -> None:
    module = ModuleType("_c3_probed")
    module.__file__ = path
    sys.modules[module.__name__] = module
    code = compile(content, path, "exec", dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102  (this is what loading a plugin is)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
