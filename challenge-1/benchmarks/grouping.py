"""Parse and group in one process, beside DuckDB, orjson, the standard library and ijson.

    python benchmarks/grouping.py [--smoke] [--rounds N]

Every engine reads the same file and adds up the same groups (category and window of 10 s: count and
two sums), in turns, one thread; what counts is the processor time, so that what else the machine
does disturbs little, and ratios are medians of the ratios of the rounds. "Full windows" are
event-time windows with a watermark, lateness, and least and greatest as well. Memory is that of a
process of its own, from after the imports to its peak. The last rows upload a large body to a
server and watch its memory; what was stored has to be what was sent.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import psutil

FOLDER = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "benchmarks")]

from report import Row, table  # noqa: E402  (found by the line above)

from applier import FOLD_EVENTS  # noqa: E402
from builtin import webhook  # noqa: E402
from decoding import Decoder  # noqa: E402
from parsing import Form, Reader  # noqa: E402
from projection import Projection, compile_spec  # noqa: E402
from specs import PipelineSpec  # noqa: E402
from windows import Windows  # noqa: E402

READ_BYTES = 64 * 1024
Groups = dict[Any, tuple[int, float, float]]


# --- inputs -----------------------------------------------------------------------------------


def small(number: int) -> bytes:
    return b'{"data":{"category":"c%d","value":%d.5,"quantity":%d,"ts":%d}}' % (
        number % 20,
        number % 1000,
        number % 7,
        1_768_471_200 + number // 1000,
    )


def nested(number: int) -> bytes:
    return (
        b'{"id":"evt-%012d","meta":{"producer":"shop-frontend","version":[1,4,2],"trace":{"span":'
        b'"%016x","parent":null,"flags":["sampled","retry"]}},"user":{"id":%d,"name":"Ada",'
        b'"tags":["a","b","c"],"address":{"street":"12 Long Street","city":"Springfield",'
        b'"zip":"12345"}},"data":{"category":"c%d","value":%d.5,"quantity":%d,"ts":%d},'
        b'"notes":"a few words that everybody sends and nobody reads"}'
        % (
            number, number, number % 5000, number % 20, number % 1000, number % 7,
            1_768_471_200 + number // 1000,
        )
    )  # fmt: skip


def write_lines(path: Path, make: Callable[[int], bytes], events: int) -> Path:
    with path.open("wb") as file:
        for start in range(0, events, 1000):
            file.write(b"".join(make(n) + b"\n" for n in range(start, min(start + 1000, events))))
    return path


def write_array(path: Path, make: Callable[[int], bytes], events: int) -> Path:
    with path.open("wb") as file:
        file.write(b"[")
        for start in range(0, events, 1000):
            file.write(b"," if start else b"")
            file.write(b",".join(make(n) for n in range(start, min(start + 1000, events))))
        file.write(b"]")
    return path


# --- engines ----------------------------------------------------------------------------------


def grouped() -> Projection:
    """The group-by alone: category and ts // 10, as the other engines do it."""
    return webhook(10.0)


def full() -> Projection:
    """Event-time windows with everything: out-of-order bound, lateness, least and greatest."""
    spec = {
        "select": {"category": "data.category", "value": "data.value", "quantity": "data.quantity"},
        "event_time": "data.ts",
        "group_by": ["category"],
        "aggregates": [
            {"op": op, "field": name}
            for op in ("sum", "min", "max")
            for name in ("value", "quantity")
        ],
        "window": {"kind": "tumbling", "size_seconds": 10, "out_of_order_seconds": 5,
                   "allowed_lateness_seconds": 60},
    }  # fmt: skip
    return compile_spec("full", PipelineSpec.model_validate(spec), strict=True)


def ours(projection: Projection, path: Path, form: Form) -> Groups:
    """The parser and the loop of the service, without its log and its store."""
    reader = Reader(Decoder(projection), form, max_event_bytes=1024 * 1024)
    windows = Windows(projection.window, lambda _: None)
    groups: dict[Any, Any] = {}
    waiting: list[Any] = []

    def fold() -> None:
        for delta in projection.fold(waiting, windows).deltas:
            key = (delta.group[0], delta.window_start // 10_000_000)
            known = groups.get(key)
            if known is None:
                groups[key] = [delta.count, delta.measures]
                continue
            known[0] += delta.count
            for name, part in delta.measures.items():
                known[1][name] = known[1][name].plus(part)
        waiting.clear()

    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            for block in reader.feed(data):
                waiting += block.events
                if len(waiting) >= FOLD_EVENTS:
                    fold()
    for block in reader.finish():
        waiting += block.events
    fold()
    return {
        key: (count, m["value"].total + m["value"].rest, m["quantity"].total)
        for key, (count, m) in groups.items()
    }


@cache
def connection() -> Any:
    """One for all rounds: connecting is not what is compared."""
    made = importlib.import_module("duckdb").connect()
    made.execute("SET threads = 1")
    return made


def duckdb(path: Path, form: str) -> Groups:
    rows = (
        connection()
        .execute(
            "SELECT data.category, data.ts // 10, count(*), sum(data.value), sum(data.quantity) "
            f"FROM read_json('{path}', format = '{form}', columns = {{data: "
            "'STRUCT(category VARCHAR, value DOUBLE, quantity DOUBLE, ts BIGINT)'}) GROUP BY ALL"
        )
        .fetchall()
    )
    return {(row[0], row[1]): (row[2], row[3], row[4]) for row in rows}


def looped(documents: Iterator[Any]) -> Groups:
    groups: dict[Any, list[Any]] = {}
    for document in documents:
        data = document["data"]
        key = (data["category"], data["ts"] // 10)
        group = groups.get(key)
        if group is None:
            group = groups[key] = [0, 0.0, 0.0]
        group[0] += 1
        group[1] += data["value"]
        group[2] += data["quantity"]
    return {key: (count, one, two) for key, (count, one, two) in groups.items()}


def by_line(path: Path, loads: Callable[[bytes], Any]) -> Groups:
    with path.open("rb") as file:
        return looped(map(loads, file))


def by_ijson(path: Path) -> Groups:
    ijson = importlib.import_module("ijson")
    with path.open("rb") as file:
        return looped(ijson.items(file, "item", use_float=True))


def orjson_loads() -> Callable[[bytes], Any]:
    loads: Callable[[bytes], Any] = importlib.import_module("orjson").loads
    return loads


# --- measuring --------------------------------------------------------------------------------


class Bench:
    """Engines in turns over one input; all have to find the same groups."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.rows: list[Row] = []

    def compare(
        self,
        title: str,
        events: int,
        engines: dict[str, Callable[[], Groups]],
        goals: list[tuple[str, str, float]],
    ) -> None:
        """Run all, then one row per goal: (ours, peer, least ratio)."""
        rates: dict[str, list[float]] = defaultdict(list)
        expected: Groups | None = None
        for number in range(self.rounds):
            names = list(engines) if number % 2 == 0 else list(reversed(engines))
            for name in names:
                started = time.process_time()
                found = engines[name]()
                rates[name].append(events / (time.process_time() - started))
                rounded = {k: (c, round(a, 3), round(b, 3)) for k, (c, a, b) in found.items()}
                expected = rounded if expected is None else expected
                if rounded != expected:
                    raise RuntimeError(f"{name} finds other groups in {title}")
        for mine, peer, least in goals:
            ratio = median(a / b for a, b in zip(rates[mine], rates[peer], strict=True))
            self.rows.append(
                Row(f"{title}, {mine}", "/s", median(rates[mine]), rates[mine], peer,
                    median(rates[peer]), ratio, f">= {least:g}x", ratio >= least)
            )  # fmt: skip

    def memory(self, what: str, megabytes: float, most: float) -> None:
        """A row about memory."""
        self.rows.append(
            Row(what, "MB", megabytes, [megabytes], goal=f"<= {most:g} MB", met=megabytes <= most)
        )


PEAK = """
import sys, threading
sys.path[:0] = {paths!r}
import psutil
import grouping as bench
from pathlib import Path
process = psutil.Process()
projection = bench.{projection}()
before = process.memory_info().rss
peak = [before]
ended = threading.Event()
def watch():
    while not ended.wait(0.005):
        peak[0] = max(peak[0], process.memory_info().rss)
thread = threading.Thread(target=watch); thread.start()
groups = bench.ours(projection, Path({path!r}), {form!r})
peak[0] = max(peak[0], process.memory_info().rss)
ended.set(); thread.join()
print((peak[0] - before) / 1e6, sum(count for count, *_ in groups.values()))
"""


def peak_of(path: Path, form: str, events: int) -> float:
    """Megabytes a process of its own takes beyond what it has after the imports."""
    code = PEAK.format(
        paths=[str(FOLDER), str(FOLDER / "benchmarks")],
        projection="full",
        path=str(path),
        form=form,
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    megabytes, counted = done.stdout.split()
    if int(counted) != events:
        raise RuntimeError(f"{counted} of {events} events were counted")
    return float(megabytes)


def upload_growth(scratch: Path, megabytes: int) -> tuple[float, int]:
    """How much a server grows while one large body is uploaded and applied."""
    from servers import Server

    with Server("app:app", FOLDER, scratch / "server") as server:
        server.wait_until_up()
        warm = b"\n".join(nested(n) for n in range(20_000))
        sent = 20_000
        server.upload("/webhook", warm, "application/x-ndjson")
        server.drain()
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        server.peak = before
        per_piece = 200
        size = sum(len(nested(n)) + 1 for n in range(per_piece))
        pieces = megabytes * 1_000_000 // size

        def body() -> Iterator[bytes]:
            for number in range(pieces):
                first = number * per_piece
                yield b"".join(nested(n) + b"\n" for n in range(first, first + per_piece))

        accepted = server.upload_pieces("/webhook", body(), "application/x-ndjson")
        sent += pieces * per_piece
        server.drain()
        stats = server.stats()
        if accepted != pieces * per_piece or stats["applied"] != sent:
            raise RuntimeError(f"{sent} events were sent, {stats['applied']} are stored")
        return (server.peak - before) / 1e6, sent


def measure(scratch: Path, *, smoke: bool, rounds: int) -> list[Row]:
    bench = Bench(rounds)
    lines, deep, elements = (3_000, 2_000, 2_000) if smoke else (500_000, 200_000, 200_000)
    stdlib = json.loads
    path = write_lines(scratch / "small.ndjson", small, lines)
    base, windowed = grouped(), full()
    bench.compare(
        "small NDJSON",
        lines,
        {
            "group-by": lambda: ours(base, path, "ndjson"),
            "DuckDB, 1 thread": lambda: duckdb(path, "newline_delimited"),
            "full windows": lambda: ours(windowed, path, "ndjson"),
            "orjson loop": lambda: by_line(path, orjson_loads()),
            "json loop": lambda: by_line(path, stdlib),
        },
        [
            ("group-by", "DuckDB, 1 thread", 0.5), ("full windows", "DuckDB, 1 thread", 0.35),
            ("group-by", "orjson loop", 1.7), ("group-by", "json loop", 4),
        ],
    )  # fmt: skip
    many = write_lines(scratch / "nested.ndjson", nested, deep)
    bench.compare(
        "nested NDJSON",
        deep,
        {
            "group-by": lambda: ours(base, many, "ndjson"),
            "DuckDB, 1 thread": lambda: duckdb(many, "newline_delimited"),
            "full windows": lambda: ours(windowed, many, "ndjson"),
        },
        [("group-by", "DuckDB, 1 thread", 0.75), ("full windows", "DuckDB, 1 thread", 0.65)],
    )
    array = write_array(scratch / "nested.json", nested, elements)
    bench.compare(
        "nested array",
        elements,
        {
            "group-by": lambda: ours(base, array, "json"),
            "DuckDB, 1 thread": lambda: duckdb(array, "array"),
            "ijson": lambda: by_ijson(array),
        },
        [("group-by", "DuckDB, 1 thread", 1.0), ("group-by", "ijson", 5)],
    )
    bench.memory("peak beyond the imports, nested NDJSON", peak_of(many, "ndjson", deep), 24)
    bench.memory("peak beyond the imports, nested array", peak_of(array, "json", elements), 24)
    if not smoke:
        large = write_lines(scratch / "large.ndjson", nested, 4 * deep)
        bench.memory("the same, four times the NDJSON", peak_of(large, "ndjson", 4 * deep), 24)
        large.unlink()
    growth, sent = upload_growth(scratch, 3 if smoke else 1000)
    bench.memory(
        f"server growth, upload of {'3 MB' if smoke else '1 GB'} ({sent:,} events)", growth, 32
    )
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, which prove nothing")
    parser.add_argument("--rounds", type=int, help="5 unless told")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rounds = arguments.rounds or (1 if arguments.smoke else 5)
        rows = measure(Path(scratch), smoke=arguments.smoke, rounds=rounds)
    print(table(rows))
    print(
        f"\nPython {platform.python_version()}, {os.cpu_count()} cores, {rounds} rounds, "
        f"{time.monotonic() - started:.0f} s"
        + (", smoke only: these numbers prove nothing" if arguments.smoke else "")
    )


if __name__ == "__main__":
    main()
