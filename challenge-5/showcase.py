"""What this folder can do, as claims with figures: `python showcase.py scheduler`.

Progress goes to stderr; stdout has one JSON object per claim, for the repository's `demo.py`.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from utils import Task, TaskPriority, TaskScheduler, current_task


def say(text: str) -> None:
    """A line of progress."""
    print(f"    {text}", file=sys.stderr, flush=True)


def claim(text: str, figure: Any, passed: bool) -> None:
    """One claim, its figure, and whether it holds."""
    print(json.dumps({"claim": text, "figure": str(figure), "passed": bool(passed)}), flush=True)


def list_group(root: str, number: int, groups: int, limit: int) -> list[str]:
    """Every so-manieth file of the standard library."""
    skipped = ("site-packages", "__pycache__")
    files = sorted(
        str(path)
        for path in Path(root).rglob("*.py")
        if not any(part in skipped for part in path.parts)
    )[:limit]
    return files[number::groups]


def checksums(files: list[str]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files}


def checksums_with_accident(files: list[str], marker: str) -> dict[str, str]:
    """The same, but the first attempt waits to be killed."""
    if not Path(marker).exists():
        Path(marker).write_text(str(os.getpid()))
        time.sleep(60)
    return checksums(files)


def merge(*parts: dict[str, str]) -> dict[str, str]:
    """One mapping of all."""
    return {name: sum_ for part in parts for name, sum_ in part.items()}


def report(sums: dict[str, str]) -> tuple[int, str]:
    """How many files, and one checksum over all."""
    current_task().log(f"{len(sums)} files")
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return len(sums), hashlib.sha256(lines.encode()).hexdigest()


def scheduler(*, quick: bool, seed: int) -> None:
    """The files of the standard library as a graph of tasks, with one worker killed on the way."""
    root, limit = sysconfig.get_path("stdlib"), 200 if quick else 100_000
    groups = 8
    marker = str(Path("victim").absolute())
    killed = seed % groups
    with TaskScheduler(4, store="showcase.db") as tasks:
        began = time.monotonic()
        work = [Task(f"list-{n}", list_group, (root, n, groups, limit)) for n in range(groups)]
        for n in range(groups):
            if n == killed:
                work.append(Task(f"sums-{n}", checksums_with_accident, kwargs=_accident(n, marker)))
            else:
                work.append(Task(f"sums-{n}", checksums, dependencies=[f"list-{n}"]))
        work.append(Task("merge", merge, dependencies=[f"sums-{n}" for n in range(groups)]))
        work.append(Task("report", report, dependencies=["merge"], priority=TaskPriority.HIGH))
        tasks.submit_many(work)
        while not (Path(marker).exists() and Path(marker).read_text()):
            time.sleep(0.005)
        os.kill(int(Path(marker).read_text()), signal.SIGKILL)
        say("one worker was killed with SIGKILL while it computed checksums")
        number, total = tasks.handle("report").result(60)
        took = time.monotonic() - began
        victim = tasks.get_task_status(f"sums-{killed}")
        others = [tasks.get_task_status(f"sums-{n}") for n in range(groups) if n != killed]
        statistics = tasks.get_statistics()
    plain = checksums(list_group(root, 0, 1, limit))
    expected = report_plain(plain)
    say(f"{number:,} files in {took:.2f} s")
    claim("checksums of the standard library equal one plain loop", f"{number:,} files",
          (number, total) == expected)  # fmt: skip
    claim("the killed worker cost its task one crash and no further attempt",
          f"{victim['crashes']} crash, {victim['attempts']} attempt",
          (victim["crashes"], victim["attempts"]) == (1, 1))  # fmt: skip
    claim("bystanders ran once", f"{len(others)} tasks",
          all((s["attempts"], s["crashes"]) == (1, 0) for s in others))  # fmt: skip
    claim("every task completed", statistics["states"]["completed"],
          statistics["states"]["completed"] == len(work))  # fmt: skip


def _accident(number: int, marker: str) -> dict[str, Any]:
    from utils import Result

    return {"files": Result(f"list-{number}"), "marker": marker}


def report_plain(sums: dict[str, str]) -> tuple[int, str]:
    """The report without a scheduler."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return len(sums), hashlib.sha256(lines.encode()).hexdigest()


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("mode", choices=("scheduler",))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    scheduler(quick=arguments.quick, seed=arguments.seed)


if __name__ == "__main__":
    main()
