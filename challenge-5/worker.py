"""The loop of a worker process: frames of calls in, records out.

    frame  = length, pickled list of (index, function, arguments, parents, id, attempt, run)
    answer = a record in the slot and, when the engine may be asleep, one byte to wake it

Single-threaded, so that a task may fork; threads of a task may tell of it. The engine is woken at
the end of what was sent, or every 200 µs of short tasks: by itself this makes groups that share a
commit.
"""

import asyncio
import inspect
import json
import os
import pickle
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from mmap import mmap
from typing import Any

import context
from payloads import NONE, Parents, dump_error, dump_result, load_call
from slots import DONE, FAILED, GIVEN_BACK, NOTE, RECORD, Slot

WAKE_SECONDS = 0.0002  # of short tasks, before the engine is told
READ_BYTES = 256 * 1024
FUNCTIONS = 1000  # whose bytes are remembered
LENGTH = struct.Struct("<Q")
WAKE, LARGE = b"\0", b"\1"

Call = tuple[int, bytes, bytes, Parents | None, str, int, int]


def main(channel: socket.socket, memory: mmap, result_limit: int) -> None:
    """Serve until the engine closes the channel."""
    _Worker(channel, Slot(memory), result_limit).serve()


class _Worker:
    def __init__(self, channel: socket.socket, slot: Slot, result_limit: int) -> None:
        self.channel = channel
        self.slot = slot
        self.result_limit = result_limit
        self.buffer = bytearray()
        self.functions: dict[bytes, Callable[..., Any]] = {}
        self.unsaid = False  # there are records of which the engine was not told
        self.said = 0.0
        self.pid = os.getpid()
        self.reporting = threading.Lock()  # the ring has one writer at a time

    def serve(self) -> None:
        self.channel.sendall(WAKE)  # ready
        while (frame := self.next_frame()) is not None:
            for call in pickle.loads(frame):  # noqa: S301  (by the engine, over a socket pair)
                self.run(call)

    def next_frame(self) -> bytes | None:
        """The next frame; the engine is woken before this waits."""
        buffer = self.buffer
        while True:
            if len(buffer) >= LENGTH.size:
                (size,) = LENGTH.unpack_from(buffer)
                end = LENGTH.size + size
                if len(buffer) >= end:
                    frame = bytes(buffer[LENGTH.size : end])
                    del buffer[:end]
                    return frame
            data: bytes | None = None
            if self.unsaid:
                try:
                    data = self.channel.recv(READ_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    self.wake()
            if data is None:
                data = self.channel.recv(READ_BYTES)
            if not data:
                return None
            buffer += data

    def wake(self) -> None:
        self.unsaid = False
        self.said = time.monotonic()
        self.channel.sendall(WAKE)

    def run(self, call: Call) -> None:
        index, function_bytes, arguments, parents, task_id, attempt, run = call
        if not self.slot.claim(index, time.monotonic()):
            self.report(GIVEN_BACK, index, 0.0, 0.0, b"")
            return
        say = partial(self.say, index)
        context.running.set(context.TaskContext(task_id, attempt, run, say))
        started = time.monotonic()
        kind = DONE
        try:
            function = self.functions.get(function_bytes) or self.load(function_bytes)
            if arguments or parents:
                args, kwargs = load_call(arguments, parents)
                value = function(*args, **kwargs)
                del args, kwargs
            else:
                value = function()
            if value is None:
                payload = NONE
            else:
                if inspect.iscoroutine(value):
                    value = asyncio.run(value)
                payload = dump_result(value, self.result_limit)
                del value
        except BaseException as error:  # noqa: BLE001  (SystemExit of a task is its failure)
            if os.getpid() != self.pid:  # a child that the task forked came out of it
                os._exit(1)
            kind, payload = FAILED, dump_error(error, self.result_limit)
        if os.getpid() != self.pid:
            os._exit(0)
        now = time.monotonic()
        self.report(kind, index, started, now - started, payload)
        if now - self.said > WAKE_SECONDS:
            self.wake()

    def load(self, data: bytes) -> Callable[..., Any]:
        function: Callable[..., Any] = pickle.loads(data)  # noqa: S301  (by the engine)
        if b"cloudpickle" not in data:  # one by value has its own globals, afresh for each call
            if len(self.functions) >= FUNCTIONS:
                self.functions.clear()
            self.functions[data] = function
        return function

    def report(self, kind: int, index: int, started: float, elapsed: float, payload: bytes) -> None:
        with self.reporting:
            if self.slot.put(kind, index, started, elapsed, payload):
                self.unsaid = True
            else:  # larger than the room in the ring: through the channel, which has no limit
                head = RECORD.pack(len(payload), kind, index, started, elapsed)
                self.channel.sendall(LARGE + head + payload)

    def say(self, index: int, what: str, value: Any) -> None:
        """Tell of a task; what a thread of it says after its end, the engine drops."""
        if os.getpid() != self.pid:  # its memory is shared with this process
            raise RuntimeError(
                "Only the process of a task can tell of it; this one was forked by the task. "
                "Return what there is to say, and tell it there."
            )
        self.report(NOTE, index, 0.0, 0.0, json.dumps([what, value]).encode())
        self.wake()


def start_alone() -> None:
    """Be a worker that was not forked: `worker.py CHANNEL MEMORY`, with JSON on stdin.

    CHANNEL is an inherited descriptor, or `shared` where the socket follows on stdin (Windows).
    """
    options = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = options["path"]
    if sys.argv[1] == "shared":
        data = sys.stdin.buffer.read(options["socket_bytes"])
        channel = socket.fromshare(data)  # type: ignore[attr-defined]
    else:
        channel = socket.socket(fileno=int(sys.argv[1]))
    with open(sys.argv[2], "r+b") as file:  # noqa: PTH123
        memory = mmap(file.fileno(), 0)
    main(channel, memory, options["result_limit"])


if __name__ == "__main__":
    start_alone()
