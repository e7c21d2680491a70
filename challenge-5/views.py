"""What tasks and figures look like from outside: plain dictionaries, for Python and HTTP alike."""

import json
import math
import pickle
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import psutil
from pydantic_core import to_jsonable_python

from handles import error_of
from measures import Figures, percentile
from payloads import printable
from store import Store
from tasks import COMPLETED, FAILED, RUNNING, TaskPriority, TaskState

DEEPEST = 100  # levels of a result that are shown
LARGEST_BITS = 10_000  # of a number that is shown in decimal digits


def status_of(store: Store, row: dict[str, Any]) -> dict[str, Any]:
    """A task as `get_task_status` tells of it."""
    completed = row["state"] == COMPLETED
    data = store.result(row["seq"]) if completed else None
    error = json.loads(row["error"]) if row["error"] else None
    progress = json.loads(row["progress"]) if row["progress"] else None
    return {
        "id": row["id"],
        "name": row["name"],
        "state": TaskState(row["state"]),
        "priority": TaskPriority(row["priority"]),
        "kind": row["kind"],
        "dependencies": row["dependencies"],
        "attempts": row["attempts"],
        "crashes": row["crashes"],
        "run": row["run"] + 1,
        "result": None if data is None else pickle.loads(data),  # noqa: S301  (of our own worker)
        "error": None if error is None else f"{error['type']}: {error['message']}",
        "progress": None if progress is None else progress[0],
        "created": row["created"],
        "run_at": row["run_at"],
        "started": row["started"],
        "finished": row["finished"],
        "duration": duration_of(row),
        "timeout": row["timeout"],
        "log": [note["line"] for note in store.notes(row["seq"])],
    }


def shown(data: bytes) -> Any:
    """A result as JSON can have it; what JSON does not know is shown as text."""
    try:
        return _plain(pickle.loads(data), DEEPEST)  # noqa: S301  (of our own worker)
    except Exception as error:  # noqa: BLE001  (unpickling runs code of others)
        return f"(cannot be shown: {type(error).__name__})"


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if value.bit_length() <= LARGEST_BITS else hex(value)
    if kind is float:
        return value if math.isfinite(value) else str(value)
    if kind is str:
        return printable(value)
    if depth == 0:  # or it holds itself
        return "…"
    if kind is dict:
        return {_name(key): _plain(each, depth - 1) for key, each in value.items()}
    if kind in (list, tuple, set, frozenset):
        return [_plain(each, depth - 1) for each in value]
    return _plain(to_jsonable_python(value, fallback=repr), depth - 1)


def _name(key: Any) -> str:
    return printable(key if isinstance(key, str) else str(key))


def duration_of(row: dict[str, Any]) -> float | None:
    """Seconds of the last run that ended."""
    if row["started"] is None or row["finished"] is None:
        return None
    return max(0.0, float(row["finished"] - row["started"]))


def exception_of(store: Store, row: dict[str, Any]) -> BaseException | None:
    """What a task that has not completed raised."""
    if row["error"] is None:
        return None
    travelled = store.result(row["seq"]) if row["state"] == FAILED else None
    return error_of(row["error"], travelled)


def attempts_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each time a task was handed to a worker: when, to which process, and how that ended."""
    found: list[dict[str, Any]] = []
    for event in history:
        if event["to_state"] == RUNNING:
            found.append({
                "number": len(found) + 1, "worker": event["worker"], "started": event["ts"],
                "finished": None, "outcome": RUNNING, "reason": None,
            })  # fmt: skip
        elif event["from_state"] == RUNNING and found:
            found[-1].update(
                finished=event["ts"], outcome=event["to_state"], reason=event["reason"]
            )
    return found


def statistics_of(figures: Figures) -> dict[str, Any]:
    """Counts, rates, waits and workers, with CPU and memory as psutil sees them."""
    return {
        "states": {state.value: figures.counts.get(state, 0) for state in TaskState},
        "total": sum(figures.counts.values()),
        "queued_by_priority": figures.queued_by_priority,
        "throughput_per_second": figures.per_second,
        "utilisation": figures.utilisation,
        "queue_wait_seconds": {
            "count": len(figures.waits),
            **{f"p{n}": percentile(figures.waits, n / 100) for n in (50, 95, 99)},
        },
        "worker_deaths": figures.worker_deaths,
        "threads_abandoned": figures.threads_abandoned,
        "workers": [_worker_of(asdict(place)) for place in figures.places if place.kind == "cpu"],
        "slots": figures.slots,
        "busy_seconds": figures.busy_seconds,
        "commits": figures.commits,
        "system": _system(),
    }


def _worker_of(place: dict[str, Any]) -> dict[str, Any]:
    cpu = memory = None
    if place["pid"] is not None:
        try:
            process = psutil.Process(place["pid"])
            with process.oneshot():
                times = process.cpu_times()
                cpu, memory = times.user + times.system, process.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            pass
    return {**place, "cpu_seconds": cpu, "memory_bytes": memory}


def _system() -> dict[str, Any]:
    process = psutil.Process()
    with process.oneshot():
        times, memory = process.cpu_times(), process.memory_info().rss
    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_count": psutil.cpu_count(),
        "memory_available_bytes": psutil.virtual_memory().available,
        "scheduler_cpu_seconds": times.user + times.system,
        "scheduler_memory_bytes": memory,
    }


def utc(moment: float | None) -> str | None:
    """Epoch seconds as RFC 3339 in UTC."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
