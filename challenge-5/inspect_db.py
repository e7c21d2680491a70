"""Look into a database of tasks, while a scheduler works on it or when none does.

python inspect_db.py list scheduler.db --state failed
python inspect_db.py show scheduler.db ID
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from journal import SQLiteStore
from store import Filter
from tasks import TaskPriority, TaskState
from utils import StoreUnavailable
from views import attempts_of, duration_of, utc


def main(arguments: Sequence[str] | None = None) -> int:
    """List tasks, or show one; 1 when there is no such task or database."""
    parser = argparse.ArgumentParser(
        description="Look into a database of tasks.",
        epilog="Examples: inspect_db.py list scheduler.db --state failed   "
        "inspect_db.py show scheduler.db ID",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="tasks, newest first")
    listing.add_argument("database", type=Path)
    listing.add_argument("--state", action="append", choices=list(TaskState), default=[])
    listing.add_argument("--name", help="only tasks of this name")
    listing.add_argument("--limit", type=int, default=20, help="at most so many (default: 20)")
    showing = commands.add_parser("show", help="one task, its attempts and log")
    showing.add_argument("database", type=Path)
    showing.add_argument("id")
    chosen = parser.parse_args(arguments)
    try:
        return list_tasks(chosen) if chosen.command == "list" else show_task(chosen)
    except StoreUnavailable as error:
        print(error, file=sys.stderr)
        return 1


def list_tasks(chosen: argparse.Namespace) -> int:
    """A line for each task, and the counts."""
    store = SQLiteStore(chosen.database)
    wanted = Filter(states=chosen.state, name=chosen.name, limit=max(1, chosen.limit))
    for row in store.page(wanted):
        error = json.loads(row["error"])["message"] if row["error"] else ""
        print(
            f"{row['id']:24} {row['state']:10} {TaskPriority(row['priority']).name:8} "
            f"{utc(row['created'])} {row['name']} {error[:80]}".rstrip()
        )
    counts = store.counts()
    print(
        ", ".join(f"{number:,} {state}" for state, number in sorted(counts.items())) or "no tasks"
    )
    return 0


def show_task(chosen: argparse.Namespace) -> int:
    """All that is stored of it, without running any code of it."""
    store = SQLiteStore(chosen.database)
    row = store.find(chosen.id)
    if row is None:
        print(f"There is no task {chosen.id!r} in {chosen.database}.", file=sys.stderr)
        return 1
    for name in ("id", "name", "state", "kind", "attempts", "crashes", "timeout"):
        print(f"{name:12} {row[name]}")
    print(f"{'priority':12} {TaskPriority(row['priority']).name}")
    for name in ("created", "started", "finished", "run_at"):
        print(f"{name:12} {utc(row[name]) or '-'}")
    if (duration := duration_of(row)) is not None:
        print(f"{'duration':12} {duration:.6f} s")
    print(f"{'parents':12} {', '.join(row['dependencies']) or '-'}")
    if row["error"]:
        error = json.loads(row["error"])
        print(f"{'error':12} {error['type']}: {error['message']}")
    for attempt in attempts_of(store.history(row["seq"])):
        print(
            f"attempt {attempt['number']:<4} {utc(attempt['started'])} process "
            f"{attempt['worker']} -> {attempt['outcome']} {attempt['reason'] or ''}".rstrip()
        )
    for note in store.notes(row["seq"]):
        print(f"log          {utc(note['ts'])} {note['line']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
