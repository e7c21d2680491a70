"""Collect products from several unreliable APIs into out/summary.json.

    python fetch.py --mock              with its own failing servers, nothing else needed
    python fetch.py                     the sources of config.yaml
    python fetch.py --resume            go on with a run that was cut
    python fetch.py --pipeline events   also send them through the durable pipeline
    python fetch.py --print-config      every key, its value, and where it came from

Exit status: 0 the run went to its end (`partial` in the summary says whether something is missing),
1 it was cut by --timeout or brought nothing, 2 it could not start, 130 and 143 it was ended by
Ctrl-C or SIGTERM.
"""

from stopping import EXIT_CODES, on_stop_signals, remember_stop_signals

if __name__ == "__main__":  # the imports below take half a second
    remember_stop_signals()

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from commands import configure_logs, service_settings
from doors import PipelineDoor
from fetch_settings import ConfigurationError, Loaded, Source, add_flags, load, origin
from fetching import FetchRun
from holder import Held, Holder
from journal import NothingToResume
from utils import Pipeline, PipelineUnknown, QueueError, StoreError

PLAIN_SECONDS: Final = 2.0  # between lines of progress when piped
LIVE_PER_SECOND: Final = 8
MOCK_START_SECONDS: Final = 20.0
# The third source breaks down for good after its first answers: a run has to cope with that.
MOCK_DEAD: Final = "corner:40"


class CannotStart(Exception):
    """The command cannot do what it was asked for; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = _parser().parse_args(arguments)
    flags = {key: getattr(options, key) for key in ("timeout", "rate_limit_rps",
                                                    "worker_pool_size", "pipeline")}  # fmt: skip
    try:
        loaded = load(flags, options.config)
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if options.print_config:
            print("\n".join(loaded.lines()))
            return 0
        configure_logs("ERROR" if options.quiet else service_settings().log_level)
        return asyncio.run(_fetch(loaded, options))
    except ConfigurationError as error:
        print(f"The configuration cannot be used:\n{error}", file=sys.stderr)
    except (CannotStart, NothingToResume, PipelineUnknown) as error:
        print(error, file=sys.stderr)
    except (Held, StoreError, QueueError) as error:
        print(f"{error} To send into a pipeline that is being served, POST /fetch/runs there.",
              file=sys.stderr)  # fmt: skip
    except BrokenPipeError:  # who reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(
            f"{error.filename2 or error.filename or 'A file'} cannot be used: {error.strerror}.",
            file=sys.stderr,
        )
    return 2


def _parser() -> argparse.ArgumentParser:
    summary, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of config.yaml")
    parser.add_argument("--mock", action="store_true", help="start failing servers, and ask those")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was cut")
    parser.add_argument("--quiet", action="store_true", help="no progress, no result; only errors")
    parser.add_argument("--print-config", action="store_true", help="show the settings, and end")
    return parser


async def _fetch(loaded: Loaded, options: argparse.Namespace) -> int:
    settings = loaded.settings
    if not settings.sources and not options.mock:
        raise CannotStart("There are no sources; name them in config.yaml, or use --mock.")
    async with contextlib.AsyncExitStack() as stack:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        stack.callback(_one_at_a_time(settings.output_dir).release)
        stopped_by: list[signal.Signals] = []
        run: FetchRun | None = None

        def stop(number: signal.Signals) -> None:
            stopped_by.append(number)
            if run is not None:
                run.cut(number.name)

        on_stop_signals(stop)
        if options.mock:
            nobody = "http://127.0.0.1"  # is asked when the run is over already
            url = nobody if stopped_by else stack.enter_context(mock_servers())
            settings = settings.model_copy(update={"sources": mock_sources(url)})
        door = None
        if settings.pipeline is not None:
            door = PipelineDoor(await stack.enter_async_context(_pipeline()), settings.pipeline)
        run = FetchRun(settings, resume=options.resume, door=door)
        if stopped_by:
            run.cut(stopped_by[0].name)
        async with _shown(run, quiet=options.quiet):
            summary = await run.run()
        if not options.quiet:
            _print_result(summary, settings.output_dir / "summary.json")
            if stopped_by and summary["partial"]:
                print(f"Ended by {stopped_by[0].name}; --resume goes on.")
    if stopped_by:
        return EXIT_CODES[stopped_by[0]]
    if summary["partial"] and not summary["products"]:
        print("No source gave anything; are they running? `make mock-apis` starts those of the "
              "shipped config.yaml, --mock starts its own.", file=sys.stderr)  # fmt: skip
        return 1
    return 0 if summary["ended"] == "finished" else 1


def _one_at_a_time(directory: Path) -> Holder:
    try:
        return Holder(directory / "fetch.lock")
    except Held:
        raise CannotStart(
            f"Another run is writing into {directory}; wait for it, or set PIPELINE_OUTPUT_DIR."
        ) from None


@contextlib.asynccontextmanager
async def _pipeline() -> AsyncIterator[Pipeline]:
    """The pipeline of the service, on the same data: DB_PATH and QUEUE_DIR."""
    async with Pipeline.configured(service_settings()) as pipeline:
        await pipeline.start_workers()
        yield pipeline


# --- mock servers -----------------------------------------------------------------------------


@contextlib.contextmanager
def mock_servers(*options: str) -> Iterator[str]:
    """`python simulators.py` on a free port, as a process that ends with this one; its URL."""
    options = options or ("--dead", MOCK_DEAD)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("simulators.py")), "--port", "0",
         "--with-parent", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us: the servers stay until the summary is written
    )  # fmt: skip
    try:
        assert process.stdout is not None  # noqa: S101  (asked for above)
        line = process.stdout.readline()
        if not line:
            raise CannotStart("The mock servers did not start.")
        url: str = json.loads(line)["url"]
        _wait_for(url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _wait_for(url: str) -> None:
    _, host, port = origin(url)
    deadline = time.monotonic() + MOCK_START_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise CannotStart("The mock servers did not start.") from None
            time.sleep(0.05)
        else:
            return


def mock_sources(url: str) -> list[Source]:
    """The shipped sources, at another place."""
    shipped = load(config=Path(__file__).with_name("config.yaml")).settings.sources
    return [
        source.model_copy(
            update={
                "url": _moved(source.url, url),
                "item_url": _moved(source.item_url, url) if source.item_url else None,
            }
        )
        for source in shipped
    ]


def _moved(address: str, url: str) -> str:
    scheme, host, port = origin(address)
    return address.replace(f"{scheme}://{host}:{port}", url)


# --- showing ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _shown(run: FetchRun, *, quiet: bool) -> AsyncIterator[None]:
    """A live table on a terminal, a line every few seconds when piped, nothing when quiet."""
    if quiet:
        yield
        return
    console = Console()
    if console.is_terminal:
        with Live(get_renderable=lambda: _table(run), console=console,
                  refresh_per_second=LIVE_PER_SECOND):  # fmt: skip
            yield
        return
    lines = asyncio.create_task(_lines(run))
    try:
        yield
    finally:
        lines.cancel()


def _table(run: FetchRun) -> Table:
    table = Table(title=f"fetch {run.id}  {run.seconds:.0f} of {run.settings.timeout:g} s")
    for column in ("source", "products", "requests", "errors", "retries", "429", "breaker", "rate"):
        table.add_column(column, justify="left" if column in ("source", "breaker") else "right")
    for each in run.progress():
        color = {"closed": "green", "open": "red"}.get(each["breaker"], "yellow")
        expected = each["requests_expected"]
        table.add_row(
            each["source"], str(each["items"]),
            f"{each['requests_done']}/{'?' if expected is None else expected}",
            str(sum(each["errors"].values())), str(each["retries"]), str(each["paused"]),
            f"[{color}]{each['breaker']}[/]" + (" done" if each["finished"] else ""),
            "" if each["rate"] is None else f"{each['rate']:.2f}/s",
        )  # fmt: skip
    return table


async def _lines(run: FetchRun) -> None:
    while True:
        await asyncio.sleep(PLAIN_SECONDS)
        parts = [
            f"{each['source']} {each['items']} products, {sum(each['errors'].values())} errors, "
            f"breaker {each['breaker']}"
            for each in run.progress()
        ]
        print(f"{run.seconds:5.1f} s  " + "; ".join(parts), flush=True)


def _print_result(summary: dict[str, Any], path: Path) -> None:
    for name, source in summary["sources"].items():
        errors = ", ".join(f"{kind} {count}" for kind, count in source["errors"].items())
        print(
            f"{name}: {source['items']} products at {source['rate'] or 0:.2f} requests/s, "
            f"{source['retries']} retries, {source['breaker_openings']} breaker openings"
            + (f"; errors: {errors}" if errors else "")
            + ("" if source["complete"] else "; INCOMPLETE")
        )
    figures = summary["summary"]
    missing = f", PARTIAL: {figures['requests_missing']} requests or more are missing"
    print(
        f"{figures['total']} products in {figures['duration_seconds']:.1f} s"
        + (missing if summary["partial"] else ", complete")
        + f" -> {path}"
    )


if __name__ == "__main__":
    sys.exit(main())
