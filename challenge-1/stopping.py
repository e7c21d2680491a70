"""Ctrl-C and SIGTERM end a command in order, from its first line on.

A command imports for half a second before it can do anything: what comes meanwhile is remembered,
and handed over as soon as there is somebody to stop. So this module imports next to nothing.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

EXIT_CODES: Final = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as a shell reports them
_early: list[signal.Signals] = []


def remember_stop_signals() -> None:
    """From now on they are remembered for `on_stop_signals` instead of ending the process."""
    for number in EXIT_CODES:
        signal.signal(number, _remember)


def _remember(number: int, _: FrameType | None) -> None:
    _early.append(signal.Signals(number))


def on_stop_signals(stop: Callable[[signal.Signals], None]) -> None:
    """Call `stop` in the running loop at Ctrl-C and SIGTERM, and at once for remembered ones."""
    import asyncio

    loop = asyncio.get_running_loop()
    for number in EXIT_CODES:
        try:
            loop.add_signal_handler(number, stop, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda n, _: loop.call_soon_threadsafe(stop, signal.Signals(n)))
    while _early:
        stop(_early.pop(0))
