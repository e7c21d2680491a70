"""Product APIs that fail, limit and stall on purpose: three endpoints with three schemas.

    python simulators.py [--port 9101] [--seed 7] [--failure-rate 0.05] [--dead corner:30] ...

`/atlas/products` has nested objects and numbered pages, `/bazar/items` cursors and prices such as
"1.299,00 €", `/corner/index` ids whose products are asked for one by one and lack fields. What an
endpoint does is decided by the seed and the number of the request. `GET /seen` tells how often each
was asked, and how many requests the worst second held; `/downstream/records` is somebody to
deliver to.
"""

import argparse
import asyncio
import bisect
import json
import os
import random
import socket
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T", int, float)

DEFAULT_PORT: Final = 9101
HANG_SECONDS: Final = 3600.0
PAGE_SIZE: Final = 20
NAMES: Final = ("atlas", "bazar", "corner")
WORDS: Final = ("Lamp", "Chair", "Kettle", "Rug", "Mirror", "Clock", "Shelf", "Vase", "Desk", "Pan")
KINDS: Final = ("kitchen", "office", "living", "garden")


@dataclass(frozen=True)
class Behaviour:
    """How one endpoint misbehaves; the rates are shares of its requests."""

    products: int = 160
    latency_seconds: tuple[float, float] = (0.01, 0.06)
    failure_rate: float = 0.05  # a 500
    limited_rate: float = 0.02  # a 429, with Retry-After
    malformed_rate: float = 0.01  # half a document
    lost_rate: float = 0.0  # done, but answered 500: the answer got lost
    hang_rate: float = 0.0  # no answer at all
    retry_after: str = "1"
    limit_per_second: int = 0  # enforced: a request beyond it is answered 429; 0: no limit
    dead_from: int | None = None  # requests with this number and above get no good answer,
    dead_until: int | None = None  # until that one


@dataclass
class Simulation:
    """The endpoints, their behaviour, and what they have seen."""

    seed: int = 7
    behaviours: dict[str, Behaviour] = field(
        default_factory=lambda: {
            "atlas": Behaviour(),
            "bazar": Behaviour(),
            "corner": Behaviour(products=120),
        }
    )
    downstream: Behaviour = field(
        default_factory=lambda: Behaviour(
            failure_rate=0.1, lost_rate=0.05, limited_rate=0, malformed_rate=0, limit_per_second=10
        )
    )
    clock: Callable[[], float] = time.monotonic
    arrivals: dict[str, list[float]] = field(default_factory=dict)
    admitted: list[float] = field(default_factory=list)
    accepted: dict[str, int] = field(default_factory=dict)  # downstream: deliveries by key

    def seen(self, name: str) -> dict[str, Any]:
        """How often an endpoint was asked, and the fullest closed second."""
        times = self.arrivals.get(name, [])
        span = times[-1] - times[0] if len(times) > 1 else 0.0
        return {
            "requests": len(times),
            "worst_second": worst_window(times),
            "per_second": round((len(times) - 1) / span, 3) if span else None,
        }


def worst_window(times: Sequence[float], seconds: float = 1.0) -> int:
    """The most requests in any closed window."""
    ordered = sorted(times)
    return max(
        (
            bisect.bisect_right(ordered, at + seconds) - number
            for number, at in enumerate(ordered)
        ),
        default=0,
    )  # fmt: skip


def create_app(simulation: Simulation | None = None) -> FastAPI:
    """The endpoints as an application."""
    simulation = simulation or Simulation()
    app = FastAPI(title="Product APIs that fail", docs_url=None, redoc_url=None)
    app.state.simulation = simulation
    app.add_middleware(Misbehaving, simulation=simulation)

    @app.get("/atlas/products")
    async def atlas(page: int = 1, per_page: int = PAGE_SIZE) -> dict[str, Any]:
        count = simulation.behaviours["atlas"].products
        numbers = range(1, count + 1)[(page - 1) * per_page : page * per_page]
        return {
            "meta": {"page": page, "pages": -(-count // per_page), "total": count},
            "items": [atlas_product(simulation.seed, number) for number in numbers],
        }

    @app.get("/atlas/products/{number}")
    async def one_of_atlas(number: int) -> Any:
        return _one(simulation, "atlas", atlas_product, number)

    @app.get("/bazar/items")
    async def bazar(after: str = "0", limit: int = PAGE_SIZE) -> dict[str, Any]:
        count = simulation.behaviours["bazar"].products
        start = int(after, 36)
        numbers = range(start + 1, min(start + limit, count) + 1)
        following = _base36(numbers[-1]) if numbers and numbers[-1] < count else None
        return {
            "data": [bazar_product(simulation.seed, number) for number in numbers],
            "paging": {"next": following},
        }

    @app.get("/bazar/items/{number}")
    async def one_of_bazar(number: int) -> Any:
        return _one(simulation, "bazar", bazar_product, number)

    @app.get("/corner/index")
    async def index() -> dict[str, Any]:
        count = simulation.behaviours["corner"].products
        return {"ids": list(range(1, count + 1))}

    @app.get("/corner/items/{number}")
    async def one_of_corner(number: int) -> Any:
        return _one(simulation, "corner", corner_product, number)

    @app.get("/seen")
    async def seen() -> dict[str, Any]:
        return {name: simulation.seen(name) for name in (*NAMES, "downstream")}

    @app.get("/downstream/accepted", include_in_schema=False)
    async def accepted() -> dict[str, int]:
        return simulation.accepted

    @app.post("/downstream/records")
    async def downstream(request: Request) -> Response:
        key = request.headers.get("idempotency-key", "")
        known = key in simulation.accepted
        simulation.accepted[key] = simulation.accepted.get(key, 0) + 1
        return JSONResponse({"accepted": not known, "duplicate": known}, 200 if known else 201)

    return app


def _one(
    simulation: Simulation, name: str, make: Callable[[int, int], dict[str, Any]], number: int
) -> Any:
    if 1 <= number <= simulation.behaviours[name].products:
        return make(simulation.seed, number)
    return JSONResponse({"error": "no such product"}, 404)


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


# --- three schemas ----------------------------------------------------------------------------


def _chance(seed: int, name: str, number: int) -> random.Random:
    return random.Random(f"{seed}:{name}:{number}")  # noqa: S311  (reproducible test data)


def price_of(seed: int, name: str, number: int) -> float:
    """The price of a product, from 1 to 4,000."""
    return round(_chance(seed, name, number).lognormvariate(4, 1.2) % 4000 + 1, 2)


def atlas_product(seed: int, number: int) -> dict[str, Any]:
    """Nested objects, the price as text without a sign."""
    return {
        "id": number,
        "title": f"{WORDS[number % 10]} No. {number}",
        "price": {"amount": f"{price_of(seed, 'atlas', number):.2f}", "currency": "USD"},
        "category": {"id": number % 4, "name": KINDS[number % 4]},
        "inventory": {"available": number % 17},
    }


def bazar_product(seed: int, number: int) -> dict[str, Any]:
    """German prices: "1.299,00 €"."""
    text = f"{price_of(seed, 'bazar', number):,.2f}".translate(str.maketrans(",.", ".,"))
    return {
        "sku": f"BZ-{number:05}",
        "name": f"{WORDS[number % 10]} {number}",
        "price": f"{text} €",
        "group": KINDS[number % 4],
        "stock": str(number % 23),
    }


def corner_product(seed: int, number: int) -> dict[str, Any]:
    """American prices: "$1,299.00"; every seventh product lacks something."""
    product: dict[str, Any] = {
        "productId": f"c{number}",
        "label": f"{WORDS[number % 10]} ({number})",
        "cost": f"${price_of(seed, 'corner', number):,.2f}",
        "tags": [KINDS[number % 4], "sale"],
        "qty": number % 9,
    }
    if number % 7 == 0:
        del product["qty"]
        del product["tags"]
    if number % 49 == 0:
        product["cost"] = None
    return product


# --- how they misbehave -----------------------------------------------------------------------


class Misbehaving:
    """Notes when a request arrived, then lets it through, late, or not at all."""

    def __init__(self, app: Any, simulation: Simulation) -> None:
        self.app = app
        self.simulation = simulation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        name = scope.get("path", "").split("/")[1] if scope["type"] == "http" else ""
        simulation = self.simulation
        behaviour = simulation.behaviours.get(name)
        if name == "downstream" and scope["method"] == "POST":
            behaviour = simulation.downstream
        if behaviour is None:
            await self.app(scope, receive, send)
            return
        times = simulation.arrivals.setdefault(name, [])
        now = simulation.clock()
        times.append(now)
        number = len(times)
        chance = _chance(simulation.seed, f"{name} request", number)
        if _is_over_limit(simulation, name, behaviour, now):
            await _refuse(429, {"Retry-After": "1"})(scope, receive, send)
            return
        await asyncio.sleep(chance.uniform(*behaviour.latency_seconds))
        is_dead = behaviour.dead_from is not None and (
            behaviour.dead_from <= number < (behaviour.dead_until or number + 1)
        )
        fate = chance.random()
        for share, what in (
            (1.0 if is_dead else behaviour.failure_rate, "fail"),
            (behaviour.limited_rate, "limit"),
            (behaviour.lost_rate, "lose"),
            (behaviour.malformed_rate, "cut"),
            (behaviour.hang_rate, "hang"),
        ):
            if fate < share:
                await self._misbehave(what, behaviour, scope, receive, send)
                return
            fate -= share
        await self.app(scope, receive, send)

    async def _misbehave(
        self, what: str, behaviour: Behaviour, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if what == "fail":
            await _refuse(500, {})(scope, receive, send)
        elif what == "limit":
            headers = {"Retry-After": behaviour.retry_after}
            await _refuse(429, headers)(scope, receive, send)
        elif what == "hang":
            await asyncio.sleep(HANG_SECONDS)
        elif what == "lose":
            await self.app(scope, receive, _swallow)
            await _refuse(500, {})(scope, receive, send)
        else:
            await self.app(scope, receive, _halving(send))


def _is_over_limit(simulation: Simulation, name: str, behaviour: Behaviour, now: float) -> bool:
    if not behaviour.limit_per_second:
        return False
    times = simulation.admitted if name == "downstream" else simulation.arrivals[name][:-1]
    if len(times) - bisect.bisect_left(times, now - 1) >= behaviour.limit_per_second:
        return True
    if name == "downstream":
        times.append(now)
    return False


def _refuse(status: int, headers: dict[str, str]) -> Response:
    return JSONResponse({"error": "on purpose"}, status, headers)


def _halving(send: Send) -> Send:
    """Send a whole answer with half a document in it."""

    async def halved(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0] != b"content-length"]
            message = {**message, "headers": kept}
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            message = {**message, "body": body[: len(body) // 2]}
        await send(message)

    return halved


async def _swallow(message: Message) -> None:
    del message


def hostile(kind: str) -> Response:
    """An answer no client should believe: endless, trickle, bomb, redirect, html."""
    json_type = "application/json"
    if kind == "endless":
        return StreamingResponse(_endless(), media_type=json_type)
    if kind == "trickle":
        return StreamingResponse(_trickle(), media_type=json_type)
    if kind == "bomb":
        return Response(_bomb(), media_type=json_type, headers={"Content-Encoding": "gzip"})
    if kind == "html":
        return Response("<p>maintenance</p>", media_type="text/html")
    return Response(status_code=302, headers={"Location": kind})


@cache
def _bomb() -> bytes:
    """256 MiB of zeros, gzipped."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(256)), packer.flush()])


async def _endless() -> AsyncIterator[bytes]:
    yield b"["
    while True:
        yield b'{"id": 1, "title": "again"},' * 1000
        await asyncio.sleep(0)


async def _trickle() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.05)


# --- the command ------------------------------------------------------------------------------

app = create_app()


def simulation_of(arguments: argparse.Namespace) -> Simulation:
    """The simulation the command line describes."""
    common = Behaviour(
        latency_seconds=arguments.latency_ms,
        failure_rate=arguments.failure_rate,
        limited_rate=arguments.limited_rate,
        malformed_rate=arguments.malformed_rate,
        hang_rate=arguments.hang_rate,
        retry_after=arguments.retry_after,
        limit_per_second=arguments.limit_rps,
    )
    simulation = Simulation(seed=arguments.seed)
    simulation.downstream = replace(
        simulation.downstream,
        limit_per_second=arguments.downstream_rps,
        failure_rate=arguments.downstream_failure_rate * 2 / 3,
        lost_rate=arguments.downstream_failure_rate / 3,
    )
    for name in NAMES:
        count = arguments.products or simulation.behaviours[name].products
        simulation.behaviours[name] = replace(common, products=count)
    for name, first, last in arguments.dead:
        simulation.behaviours[name] = replace(
            simulation.behaviours[name], dead_from=first, dead_until=last
        )
    return simulation


def _within(number: T, least: T, most: T) -> T:
    if least <= number <= most:  # not so for NaN
        return number
    raise argparse.ArgumentTypeError(f"it has to lie between {least} and {most}")


def port_number(text: str) -> int:
    """0 to 65,535."""
    return _within(int(text), 0, 65_535)


def whole_number(text: str) -> int:
    """0 to a million."""
    return _within(int(text), 0, 1_000_000)


def fraction(text: str) -> float:
    """0 to 1."""
    return _within(float(text), 0.0, 1.0)


def milliseconds(text: str) -> tuple[float, float]:
    """LOW-HIGH, or one number, as seconds."""
    low, _, high = text.partition("-")
    least = _within(float(low), 0.0, 1000 * HANG_SECONDS)
    return least / 1000, _within(float(high or low), least, 1000 * HANG_SECONDS) / 1000


def dead_endpoint(text: str) -> tuple[str, int, int | None]:
    """NAME[:FIRST[-LAST]]."""
    name, _, numbers = text.partition(":")
    first, _, last = numbers.partition("-")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(
            f"there is no endpoint {name!r}; there are {', '.join(NAMES)}"
        )
    return name, whole_number(first or "1"), whole_number(last) if last else None


def main() -> None:
    """Serve them on loopback until told to stop."""
    parser = argparse.ArgumentParser(
        description="Product APIs that fail, limit and stall on purpose, on loopback.",
        epilog="Example: python simulators.py --dead corner:30 --hang-rate 0.02",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=port_number, default=DEFAULT_PORT, help="0 takes a free one")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--products", type=whole_number, default=0, help="per endpoint (default 160, 120)"
    )
    parser.add_argument("--latency-ms", type=milliseconds, default="10-60", metavar="LOW-HIGH")
    parser.add_argument("--failure-rate", type=fraction, default=0.05, help="share of 500")
    parser.add_argument("--limited-rate", type=fraction, default=0.02, help="share of 429")
    parser.add_argument(
        "--malformed-rate", type=fraction, default=0.01, help="share of half bodies"
    )
    parser.add_argument("--hang-rate", type=fraction, default=0.0, help="share without an answer")
    parser.add_argument("--retry-after", default="1", help="what a 429 says")
    parser.add_argument("--limit-rps", type=whole_number, default=0, help="enforced per endpoint")
    parser.add_argument(
        "--downstream-rps", type=whole_number, default=10, help="of /downstream/records"
    )
    parser.add_argument("--downstream-failure-rate", type=fraction, default=0.15,
                        help="of it; a third of them after it accepted")  # fmt: skip
    parser.add_argument("--dead", type=dead_endpoint, action="append", default=[],
                        metavar="NAME[:FIRST[-LAST]]",
                        help="answers 500 from its FIRST request on (to its LAST)")  # fmt: skip
    parser.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    arguments = parser.parse_args()
    simulation = simulation_of(arguments)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", arguments.port))
    except OSError as error:
        sys.exit(
            f"Port {arguments.port} cannot be used: {error.strerror}. Choose another with --port."
        )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    told = {"url": url, "endpoints": ["/atlas/products", "/bazar/items", "/corner/index", "/seen"]}
    print(json.dumps(told), flush=True)
    server = uvicorn.Server(
        uvicorn.Config(create_app(simulation), log_level="warning", timeout_graceful_shutdown=1)
    )
    if arguments.with_parent:
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    server.run(sockets=[listener])


def _end_with_stdin(server: uvicorn.Server) -> None:
    while os.read(0, 1024):
        pass
    server.should_exit = True


if __name__ == "__main__":
    main()
