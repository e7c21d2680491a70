"""What contracts, metrics, look-ups and many plugins cost, beside what one would use instead.

    python benchmarks/speed.py [--smoke] [--json]

Everything that is compared runs interleaved in this one process, in turns of changing order;
figures are medians, ratios are those of the medians. Goals are printed beside them.
"""

# mypy: disable-error-code="empty-body, import-untyped"

import argparse
import asyncio
import functools
import gc
import importlib.util
import itertools
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "benchmarks")]

from report import Row, table  # noqa: E402  (found by the line above)

from loading import PluginLoader  # noqa: E402
from utils import (  # noqa: E402
    Contract,
    PluginBase,
    Processor,
    Registry,
    registry,
)

Run = Callable[[], float]  # seconds for one unit


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Samples of each, in turns; every other turn backwards."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        gc.collect()
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(runs[name]())
    return samples


def timed(function: Callable[[], Any], times: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def compared(
    what: str, unit: float, label: str, samples: list[float], beside: str, others: list[float],
    limit: float, strict: bool = False,
) -> Row:  # fmt: skip
    """A row: the figure, what it is compared with, and whether the ratio keeps the goal."""
    figure, reference = median(samples), median(others)
    ratio = figure / reference
    met = ratio < limit if strict else ratio <= limit
    return Row(
        what, label, figure / unit, [each / unit for each in samples], beside, reference / unit,
        ratio, f"{'<' if strict else '<='} {limit:g}x", met,
    )  # fmt: skip


# --- classes ----------------------------------------------------------------------------------


def _nothing(_: dict[str, Any]) -> None:
    """Nothing follows the class statement."""


def class_creation(rounds: int, times: int) -> list[Row]:
    """A class with three methods and three attributes."""

    class K(Contract):
        def process(self, data: dict[str, Any]) -> dict[str, Any]: ...

        def validate(self, data: dict[str, Any], *, strict: bool = False) -> bool: ...

        def merge(self, left: int, right: int) -> int: ...

    text = (
        "class P({base}):\n"
        "    version = '1.0.0'\n"
        "    description = 'd'\n"
        "    author = 'a'\n"
        "    def process(self, data: dict[str, Any]) -> dict[str, Any]:\n        return data\n"
        "    def validate(self, data: dict[str, Any], *, strict: bool = False) -> bool:\n"
        "        return True\n"
        "    def merge(self, left: int, right: int) -> int:\n        return left\n"
    )
    model = (
        "class P(BaseModel):\n"
        "    version: str = '1.0.0'\n    description: str = 'd'\n    author: str = 'a'\n"
    )

    def making(source: str, after: Callable[[dict[str, Any]], None], **names: Any) -> Run:
        code = compile(source, "<class>", "exec")
        space = {"Any": Any, "__name__": "bench", **names}

        def one() -> None:
            exec(code, space)
            after(space)

        def run() -> float:
            taken = timed(one, times)
            for plugin in registry.snapshot():
                registry.withdraw(plugin)
            return taken

        return run

    from pydantic import BaseModel

    other = text.replace("(self, data: dict[str, Any]) ->", "(self, data: Mapping[str, Any]) ->")
    other = other.replace("strict: bool = False)", "strict: bool = False, deep: bool = False)")
    other = other.replace("left: int, right: int", "left: float, right: float, more: int = 0")
    base = "K, name=f'P{next(number)}'"
    names = {"K": K, "number": itertools.count(), "Mapping": Mapping}
    runs: dict[str, Run] = {
        "plain": making(text.format(base="object"), _nothing),
        "ours": making(text.format(base=base), _nothing, **names),
        "other": making(other.format(base=base), _nothing, **names),
        "pydantic": making(model, _nothing, BaseModel=BaseModel),
    }
    if importlib.util.find_spec("zope.interface"):
        from zope.interface import Interface, implementer
        from zope.interface.verify import verifyClass

        space: dict[str, Any] = {"Interface": Interface}
        exec(
            "class I(Interface):\n"
            "    def process(data): ...\n"
            "    def validate(data, strict=False): ...\n"
            "    def merge(left, right): ...\n",
            space,
        )
        interface = space["I"]
        zope_text = text.replace("*, strict", "strict").format(base="object")
        runs["zope"] = making(
            "@implementer(I)\n" + zope_text, lambda made: verifyClass(interface, made["P"]),
            implementer=implementer, I=interface,
        )  # fmt: skip
    samples = interleaved(runs, rounds)
    rows = [
        compared("class creation, checked and measured", 1e-6, "µs", samples["ours"],
                 "pydantic model, 3 fields", samples["pydantic"], 1.0, strict=True)
    ]  # fmt: skip
    if "zope" in samples:
        rows.append(
            compared("class creation, checked and measured", 1e-6, "µs", samples["ours"],
                     "zope.interface verifyClass", samples["zope"], 2.0)
        )  # fmt: skip
    alike = "the same, nothing repeated word for word"
    rows.append(Row(alike, "µs", median(samples["other"]) / 1e-6))
    if "zope" in samples:
        rows[-1] = replace(
            compared(alike, 1e-6, "µs", samples["other"], "zope.interface verifyClass",
                     samples["zope"], 2.0), goal="", met=None,
        )  # fmt: skip
    return rows


# --- calls ------------------------------------------------------------------------------------


def calls(rounds: int, times: int) -> list[Row]:
    """What measuring adds to a call, and the whole call beside one through pluggy."""
    clock = time.perf_counter_ns

    class Bare:
        def process(self, data: int) -> int:
            return data

    def inner(_: Any, data: int) -> int:
        return data

    class Clocked:
        def process(self, data: int) -> int:
            start = clock()
            result = inner(self, data)
            clock() - start
            return result

    class Measured(Processor[int, int], name="benchmark-measured"):
        def process(self, data: int) -> int:
            return data

    def loop(target: Any) -> Run:
        def run() -> float:
            process = target.process
            numbers = range(times)
            start = time.perf_counter()
            for number in numbers:
                process(number)
            return (time.perf_counter() - start) / times

        return run

    runs = {
        "bare": loop(Bare()), "clocked": loop(Clocked()), "measured": loop(Measured()),
    }  # fmt: skip
    if importlib.util.find_spec("pluggy"):
        import pluggy

        spec, impl = pluggy.HookspecMarker("b"), pluggy.HookimplMarker("b")

        class Spec:
            @spec(firstresult=True)
            def process(self, data: int) -> int: ...

        class Plugin:
            @impl
            def process(self, data: int) -> int:
                return data

        manager = pluggy.PluginManager("b")
        manager.add_hookspecs(Spec)
        manager.register(Plugin())
        hook = manager.hook.process

        def through_pluggy() -> float:
            numbers = range(times)
            start = time.perf_counter()
            for number in numbers:
                hook(data=number)
            return (time.perf_counter() - start) / times

        runs["pluggy"] = through_pluggy
    samples = interleaved(runs, rounds)
    registry.unregister("benchmark-measured")
    bare = median(samples["bare"])
    added = [each - bare for each in samples["measured"]]
    floor = [each - bare for each in samples["clocked"]]
    rows = [compared("metrics add to a call", 1e-9, "ns", added, "two clock reads add", floor, 2.2)]
    if "pluggy" in samples:
        rows.append(
            compared("a whole measured call", 1e-9, "ns", samples["measured"],
                     "a pluggy hook, 1 implementation", samples["pluggy"], 0.40)
        )  # fmt: skip
    return rows


# --- look-up ----------------------------------------------------------------------------------


def filled(count: int) -> Registry:
    """A registry with so many plugins."""
    from registry import IN_PROCESS, Plugin
    from versions import parse_version

    full = Registry()
    version = parse_version("1.0.0")
    assert version is not None
    for number in range(count):
        full.register(
            Plugin(f"P{number}", version, int, (), frozenset(), IN_PROCESS, "", {}, lambda: None)
        )
    return full


def lookups(rounds: int, times: int) -> list[Row]:
    """The last of 10,000 beside the last of 10; and registering there."""
    few, many = filled(10), filled(10_000)

    def getting(full: Registry, name: str) -> Run:
        def run() -> float:
            get = full.get
            start = time.perf_counter()
            for _ in range(times):
                get(name)
            return (time.perf_counter() - start) / times

        return run

    samples = interleaved({"few": getting(few, "P9"), "many": getting(many, "P9999")}, rounds)
    return [
        compared(
            "look-up among 10,000", 1e-9, "ns", samples["many"], "among 10", samples["few"], 1.3
        )
    ]


# --- requests ---------------------------------------------------------------------------------

ONE = """
from pydantic import BaseModel
from utils import Processor

class Input(BaseModel):
    x: int

class {name}(Processor[Input, int], name="{name}"):
    version = "1.0.0"

    def process(self, data: Input) -> int:
        return data.x
"""


def requests(rounds: int, times: int, many: int) -> list[Row]:
    """The last of many plugins over HTTP, in process, beside the last of 10."""
    from app import build
    from settings import Settings

    async def one(app: Any, path: str, body: bytes) -> int:
        status = 0
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.sleep(60)
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await app(scope, receive, send)
        return status

    async def measure() -> dict[str, list[float]]:
        with tempfile.TemporaryDirectory() as scratch:
            groups = {"few": 10, "many": many}
            space: dict[str, Any] = {"__name__": "bench_requests"}
            settings = Settings(plugins_dir=Path(scratch), log_level="ERROR")
            app = build(settings)
            samples: dict[str, list[float]] = {name: [] for name in groups}

            async def loop(name: str) -> float:
                start = time.perf_counter()
                for _ in range(times):
                    assert await one(app, f"/plugins/{name}/process", b'{"x": 1}') == 200
                return (time.perf_counter() - start) / times

            for number in range(rounds):
                for group in ("few", "many") if number % 2 == 0 else ("many", "few"):
                    for index in range(groups[group]):
                        exec(ONE.format(name=f"R{index}"), space)
                    last = f"R{groups[group] - 1}"
                    await loop(last)  # warm
                    gc.collect()
                    samples[group].append(await loop(last))
                    for index in range(groups[group]):
                        registry.unregister(f"R{index}")
            return samples

    samples = asyncio.run(measure())
    return [
        compared(f"a request with {many:,} plugins", 1e-6, "µs", samples["many"], "with 10",
                 samples["few"], 1.4)
    ]  # fmt: skip


# --- exactness --------------------------------------------------------------------------------


def exactness(times: int, reloads: int) -> list[Row]:
    """Eight threads count exactly; reloads under load fail no call."""

    class Counted(Processor[int, int], name="benchmark-counted"):
        def process(self, data: int) -> int:
            return data

    def work() -> None:
        plugin = Counted()
        for number in range(times):
            plugin.process(number)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switching)
    counted = registry.plugin("benchmark-counted").figures()["process"].calls
    registry.unregister("benchmark-counted")
    rows = [
        Row(f"8 threads x {times:,} calls", "counted", counted, goal=f"= {8 * times:,}",
            met=counted == 8 * times)
    ]  # fmt: skip
    failed, made, served = under_reload(reloads)
    rows.append(
        Row(f"{reloads} reloads under load, {made:,} calls", "failed", failed, goal="= 0",
            met=failed == 0 and served == reloads)
    )  # fmt: skip
    return rows


def under_reload(reloads: int) -> tuple[int, int, int]:
    """Calls that failed, calls made, and what the last version answers."""
    text = (
        "from utils import PluginBase\n"
        "class Swapped(PluginBase):\n"
        "    def process(self, data: int) -> int:\n"
        "        return {}\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "swapped.py"
        path.write_text(text.format(0))
        loader = PluginLoader(registry, Path(scratch))
        loader.load()
        stop = threading.Event()
        failed, made = [0], [0] * 4

        def call(number: int) -> None:
            while not stop.is_set():
                try:
                    plugin = registry.create("Swapped", PluginBase)
                    if plugin.process(0) != plugin.process(0):
                        failed[0] += 1
                    made[number] += 2
                except Exception:
                    failed[0] += 1

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for step in range(1, reloads + 1):
            path.write_text(text.format(step))
            registry.reload("Swapped")
        stop.set()
        for thread in threads:
            thread.join()
        last: Any = registry.create("Swapped", PluginBase).process(0)
        loader.close()
    return failed[0], sum(made), last


def main() -> int:
    """Measure everything and print it with goals."""
    parser = argparse.ArgumentParser(description="Measure against peers.")
    parser.add_argument("--smoke", action="store_true", help="few rounds: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    steps: list[Callable[[], list[Row]]] = [
        functools.partial(class_creation, 3 if smoke else 21, 20 if smoke else 200),
        functools.partial(calls, 3 if smoke else 21, 2_000 if smoke else 100_000),
        functools.partial(lookups, 3 if smoke else 21, 2_000 if smoke else 100_000),
        functools.partial(requests, 1 if smoke else 9, 20 if smoke else 500, 50 if smoke else 1000),
        functools.partial(exactness, 1_000 if smoke else 100_000, 5 if smoke else 50),
    ]
    rows = []
    for step in steps:
        rows += step()
        if not arguments.json:
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print(f"Python {platform.python_version()}, {platform.machine()}")
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
