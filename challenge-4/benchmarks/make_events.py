"""Makes the bundled SQLite file: `python benchmarks/make_events.py [FILE]`. Same rows each time."""

import datetime as dt
import json
import random
import sqlite3
import sys
from pathlib import Path

BUNDLED = Path(__file__).resolve().parent.parent / "processed_events.sqlite"
ROWS = 1000
START = dt.datetime(2026, 1, 15, tzinfo=dt.UTC)


def make(path: Path) -> None:
    draw = random.Random(4)
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE processed_events (event_id TEXT PRIMARY KEY, source TEXT NOT NULL, "
            "event_type TEXT NOT NULL, data JSON NOT NULL, timestamp TEXT NOT NULL)"
        )
        for number in range(ROWS):
            data = {
                "amount": round(draw.uniform(1, 500), 2) if number % 50 else None,
                "currency": draw.choice(["EUR", "USD", "CHF"]),
                "items": draw.randint(1, 9),
            }
            moment = START + dt.timedelta(seconds=97 * number)
            connection.execute(
                "INSERT INTO processed_events VALUES (?, ?, ?, ?, ?)",
                (f"evt-{number:05}", draw.choice(["shop", "app", "partner"]),
                 draw.choice(["order", "refund", "view", "signup"]),
                 json.dumps(data), moment.strftime("%Y-%m-%dT%H:%M:%SZ")),
            )  # fmt: skip
    connection.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else BUNDLED)
