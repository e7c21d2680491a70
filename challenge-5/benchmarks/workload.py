"""What the schedulers are given to do; importable by the workers of all of them."""

import time
from pathlib import Path


def noop() -> None:
    return None


def nap(seconds: float) -> None:
    time.sleep(seconds)


def stamp(path: str) -> None:
    """Leave the moment of the start in a file."""
    Path(path).write_text(repr(time.monotonic()))


def count(number: int) -> int:
    """Work for one core."""
    total = 0
    for n in range(number):
        total += n * n % 7
    return total


def spin() -> None:
    while True:
        pass
