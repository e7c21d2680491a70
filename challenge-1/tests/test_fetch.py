"""The command and the routes against real servers on loopback."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import structlog
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fetch import main, mock_servers
from fetch_settings import FetchSettings, Source
from fetching import FetchRun
from simulators import hostile

FOLDER = Path(__file__).resolve().parent.parent
SPIN = "while True: pass"


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Serve an application from a thread on a spare loopback port; returns its URL."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(application: Any) -> str:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def mock_apis() -> Iterator[Callable[..., str]]:
    """`python simulators.py` as a process; returns its URL."""
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(mock_servers(*options))


def configure(url: str, **keys: Any) -> None:
    """A config.yaml here, with the shipped sources at this place."""
    given = yaml.safe_load((FOLDER / "config.yaml").read_text())
    text = yaml.safe_dump({**given, **keys})
    Path("config.yaml").write_text(text.replace("http://127.0.0.1:9101", url))


def command(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "fetch.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def fetch(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = command(*arguments, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out/summary.json").read_text())
    return found


TAME = ("--failure-rate", "0", "--limited-rate", "0", "--malformed-rate", "0")
SMALL = (*TAME, "--products", "60")


class TestCommand:
    @pytest.mark.webhook
    def test_with_its_own_servers_it_brings_300_products_while_one_source_fails(self) -> None:
        started = time.monotonic()
        code, out, err = fetch(
            "--mock", "--rate-limit", "40", PIPELINE_BREAKER_RECOVERY_SECONDS="0.1"
        )

        assert code == 0, err
        assert time.monotonic() - started < 60
        found = summary()
        assert found["summary"]["total"] == len(found["products"]) >= 300
        assert found["partial"] is True
        assert [n for n, s in found["sources"].items() if not s["complete"]] == ["corner"]
        assert "PARTIAL" in out
        assert " s  atlas 160 products" in out  # a plain line every few seconds
        events = [json.loads(line) for line in err.splitlines()]
        assert {event["run_id"] for event in events} == {found["run_id"]}
        assert {"run_started", "breaker", "source_given_up", "run_ended"} <= {
            event["event"] for event in events
        }

    @pytest.mark.webhook
    @pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
    def test_on_a_terminal_it_shows_a_live_table(self) -> None:
        reader, terminal = os.openpty()
        process = subprocess.Popen(
            [sys.executable, str(FOLDER / "fetch.py"), "--mock", "--rate-limit", "40"],
            stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120",
                 "PIPELINE_BREAKER_RECOVERY_SECONDS": "0.1"},
        )  # fmt: skip
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
            while piece := os.read(reader, 65_536):
                shown += piece
        os.close(reader)

        assert process.wait(10) == 0
        assert shown.count("│ atlas ".encode()) > 3  # drawn again and again, in place
        assert b"\x1b[1A" in shown

    @pytest.mark.webhook
    def test_quiet_says_nothing_and_the_flags_go_before_environment_and_file(
        self, mock_apis: Callable[..., str]
    ) -> None:
        configure(mock_apis(*TAME), rate_limit_rps=1, timeout=1)
        code, out, err = fetch("--quiet", "--rate-limit-rps", "80", PIPELINE_TIMEOUT="30")

        assert (code, out, err) == (0, "", "")
        assert summary()["partial"] is False
        assert summary()["summary"]["total"] == 440

    @pytest.mark.webhook
    def test_sigterm_and_the_time_limit_leave_a_summary_and_resume_completes_it(
        self, mock_apis: Callable[..., str]
    ) -> None:
        configure(mock_apis(*SMALL), rate_limit_rps=15)
        code, _, _ = fetch("--quiet", "--timeout", "1.5")
        assert code == 1
        assert (summary()["ended"], summary()["partial"]) == ("timeout", True)

        process = command("--resume")
        wait_until(lambda: summary()["ended"] == "timeout" and journal_lines() > 36, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 143, err
        assert "Traceback" not in err
        assert (summary()["ended"], summary()["partial"]) == ("SIGTERM", True)

        code, _, err = fetch("--resume", "--quiet", "--rate-limit", "100")
        assert code == 0, err
        assert summary()["partial"] is False
        assert summary()["summary"]["total"] == 180
        assert fetch("--resume")[0] == 2

    @pytest.mark.webhook
    @pytest.mark.skipif(sys.platform != "linux", reason="asks /proc who listens to SIGTERM")
    def test_sigterm_while_it_still_starts_leaves_a_summary_and_a_sentence(self) -> None:
        process = command("--mock", COVERAGE_PROCESS_CONFIG="")  # it listens to SIGTERM, too
        wait_until(lambda: listens_to_sigterm(process.pid), process)  # the first thing it does
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)

        assert (process.returncode, "Traceback" in err) == (143, False)
        assert (summary()["ended"], summary()["partial"]) == ("SIGTERM", True)
        assert "--resume goes on" in out

    @pytest.mark.integration
    def test_what_is_wrong_is_a_sentence_and_nothing_is_fetched(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(*arguments: str) -> tuple[int, str, str]:
            try:
                code = main(list(arguments))
            except SystemExit as end:
                code = int(end.code or 0)
            return code, *capsys.readouterr()

        monkeypatch.setenv("PIPELINE_TIMOUT", "1")
        code, _, err = fetch("--timeout", "-1", "--worker-pool-size", "x")
        assert code == 2
        assert "timeout:" in err
        assert "worker_pool_size:" in err
        assert "Did you mean PIPELINE_TIMEOUT?" in err
        code, out, err = fetch("--print-config")
        assert code == 0
        assert "Did you mean PIPELINE_TIMEOUT?" in err
        assert out.split()[:2] == ["timeout", "60"]
        assert fetch("--no-such-flag")[0] == 2
        code, _, err = fetch("--timeout", "0.3")  # nobody serves what the shipped file names
        assert (code, "mock-apis" in err) == (1, True)
        Path("out/summary.json").unlink()
        code, _, err = fetch("--mock", "--pipeline", "nothing")
        assert (code, "There is no pipeline" in err) == (2, True)
        assert not Path("out/summary.json").exists()
        Path("out/summary.json").mkdir()
        code, _, err = fetch("--timeout", "0.3")
        assert (code, "summary.json cannot be used" in err) == (2, True)
        assert sorted(path.name for path in Path("out").iterdir()) == [
            "fetch.journal", "fetch.lock", "summary.json"
        ]  # fmt: skip
        structlog.reset_defaults()

    @pytest.mark.webhook
    def test_the_mock_servers_end_when_the_command_is_killed(self) -> None:
        process = command("--mock")
        wait_until(lambda: journal_lines() > 2, process)
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        process.communicate()

        assert psutil.wait_procs([child], timeout=10)[1] == []

    @pytest.mark.kill
    def test_killed_and_resumed_every_product_is_in_the_pipeline_once(
        self, mock_apis: Callable[..., str]
    ) -> None:
        configure(mock_apis(*SMALL), rate_limit_rps=25)
        arguments = ("--pipeline", "webhook", "--quiet")
        for lines, extra in ((20, ()), (60, ("--resume",))):
            process = command(*arguments, *extra)
            wait_until(lambda lines=lines: journal_lines() > lines, process)  # type: ignore[misc]
            process.kill()
            process.communicate()
        code, _, err = fetch(*arguments, "--resume")

        assert code == 0, err
        found = summary()
        assert found["summary"]["total"] == 180
        priced = sum(product["price"] is not None for product in found["products"])
        with contextlib.closing(sqlite3.connect("webhook_results.db")) as database:
            (counted,) = database.execute("SELECT sum(count) FROM windows").fetchone()
        assert counted == priced


def journal_lines() -> int:
    path = Path("out/fetch.journal")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def listens_to_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestHostileUpstreams:
    @pytest.mark.webhook
    def test_each_is_bounded_in_bytes_and_time_and_reported_while_the_others_go_on(
        self, serve: Callable[[Any], str]
    ) -> None:
        touched: list[str] = []

        async def good(request: Any) -> Response:
            return JSONResponse({"items": [{"id": 1, "name": "a"}], "pages": 1})

        async def secret(request: Any) -> Response:
            touched.append(str(request.url))
            return JSONResponse({"items": [{"id": 2, "name": "secret"}], "pages": 1})

        other = serve(Starlette(routes=[Route("/secret", secret)]))
        targets = {"private": "http://169.254.169.254/latest", "elsewhere": f"{other}/secret",
                   "circle": "/circle"}  # fmt: skip

        async def bad(request: Any) -> Response:
            kind = request.path_params["kind"]
            if kind == "pause":
                return Response(status_code=429, headers={"Retry-After": "1e9"})
            return hostile(targets.get(kind, kind))

        url = serve(Starlette(routes=[Route("/good", good), Route("/{kind}", bad)]))
        hostile("bomb")  # packed once, before the clock runs
        expected = {
            "endless": "too_large", "bomb": "too_large", "trickle": "timeout",
            "html": "content_type", "private": "redirect", "elsewhere": "redirect",
            "circle": "redirect", "pause": None,
        }  # fmt: skip
        settings = FetchSettings(
            sources=[
                Source.model_validate({"name": name, "url": f"{url}/{name}", "records": "items",
                                       "pages": "pages", "fields": {"id": "id", "name": "name"}})
                for name in ("good", *expected)
            ],
            rate_limit_rps=50, request_timeout=0.4, timeout=3.5, max_body_bytes=1024 * 1024,
            breaker_failures=1, breaker_recovery_seconds=0.05, breaker_patience=1,
        )  # fmt: skip
        before = psutil.Process().memory_info().rss
        started = time.monotonic()

        found = asyncio.run(FetchRun(settings).run())

        assert time.monotonic() - started < 5
        assert psutil.Process().memory_info().rss - before < 100e6
        assert found["ended"] == "timeout"
        assert found["partial"] is True
        assert found["summary"]["total"] == 1
        assert found["sources"]["good"]["complete"] is True
        assert found["sources"]["pause"]["requests"] == 1
        for name, kind in expected.items():
            assert found["sources"][name]["complete"] is False, name
            if kind is not None:
                assert kind in found["sources"][name]["errors"], name
                assert any(error["source"] == name for error in found["errors"]), name
        assert touched == []


class TestTheRateAsTheServerSeesIt:
    @pytest.mark.load
    def test_with_both_cores_busy_no_closed_second_holds_six(
        self, mock_apis: Callable[..., str]
    ) -> None:
        """Also across retries, 429s, an outage and the recovery from it; and it is used."""
        rough = ("--failure-rate", "0.05", "--limited-rate", "0.02", "--dead", "corner:20-26")
        url = mock_apis(*rough, "--products", "100", "--latency-ms", "5-80")
        calm = mock_apis(*TAME, "--latency-ms", "30-120")
        configure(url, timeout=8)
        hogs = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(os.cpu_count() or 2)]
        try:
            run = command("--quiet")
            Path("calm").mkdir()
            os.chdir("calm")
            configure(calm, timeout=8)
            other = command("--quiet")
            for process in (run, other):
                process.communicate(timeout=60)
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()
        seen = httpx2.get(f"{url}/seen").json()
        saturated = httpx2.get(f"{calm}/seen").json()["corner"]

        for name in ("atlas", "bazar", "corner"):
            assert seen[name]["requests"] >= 5
            assert seen[name]["worst_second"] <= 5
        assert saturated["worst_second"] == 5
        assert saturated["requests"] >= 30
        assert saturated["per_second"] >= 4.6


class TestRoutes:
    @pytest.mark.webhook
    def test_a_run_is_begun_followed_and_its_products_reach_the_pipeline(
        self, make_server: Callable[[], Any], mock_apis: Callable[..., str]
    ) -> None:
        server = make_server()
        os.chdir(server.data)
        configure(mock_apis(*SMALL), rate_limit_rps=30)
        server.start()
        with server.client() as client:
            assert client.get("/fetch/runs/latest").status_code == 404
            begun = client.post("/fetch/runs", json={"pipeline": "events", "timeout": 30})
            assert begun.status_code == 202
            run = begun.json()
            assert begun.headers["location"] == f"/fetch/runs/{run['id']}"
            second = client.post("/fetch/runs", json={})
            assert (second.status_code, second.json()["run_id"]) == (409, run["id"])
            totals = []
            while (now := client.get(f"/fetch/runs/{run['id']}").json())["status"] == "running":
                totals.append(now["total"])
                time.sleep(0.05)
            assert len(set(totals)) > 3  # live
            assert (now["status"], now["partial"], now["total"]) == ("finished", False, 180)
            assert now["summary"]["pipeline"]["accepted"] == 180
            assert client.get("/fetch/runs/latest").json()["id"] == run["id"]
            stats = client.get("/stats").json()
            assert stats["pipelines"]["events"]["accepted"] == 180
            assert client.get("/fetch/runs/unknown").status_code == 404
            for body, status in (
                ({"sources": ["nowhere"]}, 422), ({"timeout": -1}, 422), ({"timeout": True}, 422),
                ({"url": "http://127.0.0.1/"}, 422), ({"pipeline": "nothing"}, 404),
                ({"resume": True}, 409), ({"resume": "yes"}, 422),
            ):  # fmt: skip
                refused = client.post("/fetch/runs", json=body)
                assert refused.status_code == status, body
                assert refused.headers["content-type"] == "application/problem+json"
        assert len(json.loads((server.data / "out/summary.json").read_text())["products"]) == 180

    @pytest.mark.webhook
    def test_the_server_stops_at_once_and_leaves_what_was_fetched(
        self, make_server: Callable[[], Any], mock_apis: Callable[..., str]
    ) -> None:
        server = make_server()
        os.chdir(server.data)
        configure(mock_apis(*TAME))
        server.start()
        assert server.post("/fetch/runs", b"{}").status_code == 202
        time.sleep(1.5)
        started = time.monotonic()
        server.stop()

        assert time.monotonic() - started < 2
        assert "Traceback" not in server.log.read_text()
        found = json.loads((server.data / "out/summary.json").read_text())
        assert (found["ended"], found["partial"]) == ("stopped", True)
        assert found["products"]

    @pytest.mark.webhook
    def test_a_wrong_configuration_stops_no_server_and_is_told_without_its_values(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start(PIPELINE_TIMEOUT="secret-text")
        answer = server.post("/fetch/runs", b"{}")

        assert answer.status_code == 503
        assert "secret-text" not in answer.text
