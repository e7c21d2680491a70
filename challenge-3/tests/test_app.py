"""Over HTTP, against a real server: what the documentation promises is what happens."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from jsonschema import Draft202012Validator

from web import HEALTH_PATHS

pytestmark = [pytest.mark.webhook, pytest.mark.integration]

FOLDER = Path(__file__).resolve().parent.parent
TOKEN = {"Authorization": "Bearer sesame"}
PLUGINS = """
import asyncio, threading, time
from pathlib import Path
from typing import Any
from pydantic import BaseModel, Field
from utils import Contract, InvalidInput, PluginBase, Processor, ValidationReport, Validator

class Point(BaseModel):
    x: int
    y: int = Field(ge=0)
    label: str = Field(default="", max_length=5)

class Moved(BaseModel):
    x: int = Field(le=1000)

class Moves(Processor[Point, Moved]):
    version = "1.0.0"
    example = {"x": 1, "y": 2}

    def process(self, data: Point) -> Moved:
        return Moved(x=data.x + data.y)

class Checks(Validator[Any]):
    def validate(self, data: Any) -> ValidationReport | bool:
        if data == "reasons":
            return ValidationReport.of([("/a", "Wrong.")])
        return data == "yes"

class Lies(Processor[str, Moved]):
    def process(self, data: str) -> Moved:
        if data == "constructed":
            return Moved.model_construct(x="secret text")
        if data == "changed":
            moved = Moved(x=1)
            moved.x = 5000
            return moved
        if data == "dict":
            return {"x": 3}
        if data == "text for number":
            return {"x": "3"}
        if data == "nothing":
            return None
        return object()

class Passes(PluginBase):
    def process(self, data):
        return data

class PassesLater(PluginBase):
    async def process(self, data):
        return data

class Numbers(PluginBase):
    def process(self, data):
        return {"nan": float("nan"), "inf": float("inf"), "big": "x" * 9_000_000,
                "surrogate": "\\ud800", "object": object(), "loop": LOOP}[data]

LOOP = []
LOOP.append(LOOP)

HOW = {"value": ValueError, "exit": SystemExit, "interrupt": KeyboardInterrupt,
       "cancel": asyncio.CancelledError, "stop": StopIteration, "timeout": TimeoutError}

class Raises(PluginBase):
    def process(self, data: str) -> str:
        raise HOW[data]("secret of " + __file__)

class RaisesLater(PluginBase):
    async def process(self, data: str) -> str:
        raise HOW[data]("secret of " + __file__)

class Refuses(PluginBase):
    def process(self, data: Any) -> Any:
        if data == "without reason":
            raise InvalidInput([])
        if data == "at length":
            raise InvalidInput([("/\\ud800" * 50_000, "\\ud800" * 100_000)] * 1000)
        raise InvalidInput([("/x", "Not that one.")])

class Sleeps(PluginBase):
    def process(self, data: float) -> float:
        time.sleep(data)
        return data

class Waits(PluginBase):
    def process(self, data: str) -> int:
        while not Path(data).exists():
            time.sleep(0.01)
        return 1

class SleepsLater(PluginBase):
    async def process(self, data: float) -> float:
        try:
            await asyncio.sleep(data)
        except asyncio.CancelledError:
            if data > 50:
                await asyncio.sleep(data)
            raise
        return data

class Opaque(PluginBase):
    def process(self, data: threading.Lock) -> str:
        return "x"

class BadInit(PluginBase):
    def __init__(self) -> None:
        raise RuntimeError("secret")

    def process(self, data: int) -> int:
        return data

class Other(Contract, attributes="optional"):
    def run(self) -> int: ...

class OnlyRuns(Other):
    def run(self) -> int:
        return 1
"""
VERSIONED = """
from pydantic import BaseModel
from utils import Processor

class Input(BaseModel):
    {field}: int

class Versioned(Processor[Input, int]):
    version = "{version}"

    def process(self, data: Input) -> int:
        return data.{field}
"""


def problem_of(answer: httpx2.Response) -> dict[str, Any]:
    """The one shape of every error, checked."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "request_id"} <= problem.keys()
    assert problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert len(answer.content) < 8192
    for leak in ("Traceback", "secret", str(FOLDER), "/tmp", ".py"):
        assert leak not in answer.text, leak
    return problem


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with difficult plugins and a short patience."""
    import conftest

    server = conftest.Server(tmp_path_factory.mktemp("served"))
    server.write("difficult.py", PLUGINS)
    server.write("broken.py", "from utils import Processor\nclass B(Processor):\n    process = 7\n")
    server.start(CALL_TIMEOUT_SECONDS="1", ADMIN_TOKEN="sesame")
    yield server
    server.close()


class TestCalls:
    def test_the_body_is_the_input_and_the_answer_the_output(self, served: Any) -> None:
        for path in ("/plugins/Moves/process", "/plugins/Moves/1.0.0/process"):
            answer = served.post(path, {"x": 1, "y": 2})
            assert (answer.status_code, answer.json()) == (200, {"x": 3})

    def test_input_that_does_not_fit_is_422_with_pointers(self, served: Any) -> None:
        answer = served.post("/plugins/Moves/process", {"y": -1, "label": "too long"})

        problem = problem_of(answer)
        assert answer.status_code == 422
        assert [error["pointer"] for error in problem["errors"]] == ["/x", "/y", "/label"]
        assert "too long" not in answer.text

    def test_a_plugin_may_refuse_its_input(self, served: Any) -> None:
        for data in ("without reason", "at length"):
            answer = served.post("/plugins/Refuses/process", data)
            assert answer.status_code == 422
            assert len(answer.content) < 4096
            assert problem_of(answer)["detail"]
        answer = served.post("/plugins/Refuses/process", 1)
        assert answer.status_code == 422
        assert problem_of(answer)["errors"] == [{"pointer": "/x", "message": "Not that one."}]

    def test_a_no_of_a_validator_is_200(self, served: Any) -> None:
        said = [served.post("/plugins/Checks/validate", data) for data in ("yes", "no", "reasons")]
        assert [answer.status_code for answer in said] == [200, 200, 200]
        assert [answer.json() for answer in said] == [
            {"valid": True, "errors": []},
            {"valid": False, "errors": [{"pointer": "", "message": "Not valid."}]},
            {"valid": False, "errors": [{"pointer": "/a", "message": "Wrong."}]},
        ]

    @pytest.mark.parametrize("plugin", ["Raises", "RaisesLater"])
    @pytest.mark.parametrize("how", ["value", "exit", "interrupt", "cancel", "stop", "timeout"])
    def test_whatever_a_plugin_raises_is_500_without_details(
        self, served: Any, plugin: str, how: str
    ) -> None:
        answer = served.post(f"/plugins/{plugin}/process", how)
        assert answer.status_code == 500
        problem_of(answer)
        assert served.post("/plugins/Moves/process", {"x": 1, "y": 2}).status_code == 200

    @pytest.mark.parametrize(
        "data", ["constructed", "changed", "text for number", "nothing", "object"]
    )
    def test_output_that_breaks_its_own_model_is_never_passed_on(
        self, served: Any, data: str
    ) -> None:
        answer = served.post("/plugins/Lies/process", data)
        assert answer.status_code == 500
        assert "breaks its own model" in problem_of(answer)["detail"]
        assert served.post("/plugins/Lies/process", "dict").json() == {"x": 3}

    @pytest.mark.parametrize("data", ["nan", "inf", "big", "surrogate", "object", "loop"])
    def test_output_that_is_no_json_is_never_passed_on(self, served: Any, data: str) -> None:
        answer = served.post("/plugins/Numbers/process", data)
        assert answer.status_code == 500
        problem_of(answer)

    def test_a_plugin_that_cannot_be_made_is_500(self, served: Any) -> None:
        assert served.post("/plugins/BadInit/process", 1).status_code == 500

    def test_what_has_no_json_form_is_not_offered(self, served: Any) -> None:
        answer = served.post("/plugins/Opaque/process", "x")
        assert answer.status_code == 404
        assert "from Python only" in problem_of(answer)["detail"]
        assert "/plugins/Opaque/process" not in served.get("/openapi.json")["paths"]
        answer = served.post("/plugins/Moves/validate", 1)
        assert "has no validate; it has: process" in problem_of(answer)["detail"]
        assert served.post("/plugins/OnlyRuns/process", 1).status_code == 404

    def test_unknown_names_are_404_with_near_ones(self, served: Any) -> None:
        answer = served.post("/plugins/Movess/process", 1)
        assert answer.status_code == 404
        assert "Moves" in problem_of(answer)["detail"]
        answer = served.post("/plugins/Moves/9.9.9/process", 1)
        assert "there are: 1.0.0" in problem_of(answer)["detail"]
        for name in ("__class__", "os.system", "..%2f..%2fetc", "x" * 5000, "%00", "é"):
            for path in (f"/plugins/{name}/process", f"/plugins/{name}/{name}/process"):
                assert served.post(path, 1).status_code == 404

    @pytest.mark.parametrize(
        ("body", "headers", "status"),
        [
            (b"{", {}, 400), (b"", {}, 400), (b"NaN", {}, 400), (b"[1e999]", {}, 400),
            (b"\xff\xfe", {}, 400), (b'"\\ud800"', {}, 400), (b"\xef\xbb\xbf1", {}, 400),
            (b"[" * 100_000, {}, 400), (b'{"a":' * 100_000, {}, 400), (b"1" * 10_000, {}, 400),
            (b"1", {"content-type": "text/plain"}, 415), (b"1", {"content-type": ""}, 415),
            (b'"' + b"x" * 1_100_000 + b'"', {}, 413),
            (b"-1" + b"0" * 400, {}, 400), (b'{"x": 1' + b"0" * 400 + b', "y": 1}', {}, 400),
            (b"1", {"origin": "http://evil.example"}, 403),
            (b"1", {"host": "evil.example"}, 403),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize(
        "path", ["/plugins/Moves/process", "/plugins/Checks/validate", "/chains/run"]
    )
    def test_bad_bodies_are_4xx_of_one_shape(
        self, served: Any, path: str, body: bytes, headers: dict[str, str], status: int
    ) -> None:
        given = {"content-type": "application/json", **headers}
        answer = served.post(path, content=body, headers=given)
        assert answer.status_code == status, answer.text
        problem_of(answer)


class TestTime:
    def test_a_call_that_takes_too_long_is_504(self, served: Any) -> None:
        for plugin in ("Sleeps", "SleepsLater"):
            started = time.monotonic()
            answer = served.post(f"/plugins/{plugin}/process", 20)
            assert answer.status_code == 504
            assert time.monotonic() - started < 10
            assert "1 s" in problem_of(answer)["detail"]
            assert served.post(f"/plugins/{plugin}/process", 0.01).status_code == 200

    def test_slow_plain_plugins_do_not_block_the_loop(self, make_server: Callable[[], Any]) -> None:
        server = make_server()
        server.write("difficult.py", PLUGINS)
        server.start()
        door = str(server.data / "door")
        with ThreadPoolExecutor(8) as pool:
            slow = [pool.submit(server.post, "/plugins/Waits/process", door) for _ in range(8)]
            for _ in range(5):
                assert server.post("/plugins/Moves/process", {"x": 1, "y": 1}).status_code == 200
            assert not any(future.done() for future in slow)
            Path(door).touch()
            assert {future.result().status_code for future in slow} == {200}

    def test_calls_that_never_come_back_are_bounded_and_the_end_does_not_wait(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server()
        server.write("difficult.py", PLUGINS)
        server.start(CALL_TIMEOUT_SECONDS="0.2")
        for plugin in ("Sleeps", "SleepsLater"):
            with ThreadPoolExecutor(12) as pool:
                path = f"/plugins/{plugin}/process"
                calls = [pool.submit(server.post, path, 60) for _ in range(12)]
            assert {call.result().status_code for call in calls} <= {503, 504}
            answer = server.post(path, 0.01)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            problem_of(answer)
        assert server.post("/plugins/Moves/process", {"x": 1, "y": 1}).status_code == 200
        started = time.monotonic()
        server.stop(signal.SIGINT)
        assert time.monotonic() - started < 5  # the calls would take 60


class TestMethods:
    @pytest.mark.parametrize(
        ("path", "allowed"),
        [
            ("/plugins", "GET"), ("/plugins/Moves", "GET"), ("/plugins/Moves/1.0.0", "GET"),
            ("/plugins/Moves/process", "POST"), ("/plugins/Moves/1.0.0/process", "POST"),
            ("/plugins/reload", "POST"), ("/plugins/Moves/enable", "POST"),
            ("/plugins/Moves/1.0.0/disable", "POST"), ("/plugins/failed", "GET"),
            ("/plugins/Moves/metrics", "GET"), ("/chains/run", "POST"),
        ],
    )  # fmt: skip
    def test_every_path_names_its_own_method(self, served: Any, path: str, allowed: str) -> None:
        """No path is taken for a plugin or a version that is called like it."""
        with served.client() as client:
            for method in {"GET", "POST", "PUT", "DELETE", "OPTIONS"} - {allowed}:
                answer = client.request(method, path)
                assert (answer.status_code, answer.headers.get("allow")) == (405, allowed), method

    def test_without_a_token_admin_paths_do_not_exist(self, bundled_server: Any) -> None:
        with bundled_server.client() as client:
            for path in ("reload", "Describe/enable", "Describe/1.0.0/disable", "Describe/reload"):
                for method in ("GET", "POST", "PUT", "OPTIONS"):
                    assert client.request(method, f"/plugins/{path}").status_code == 404


class TestChains:
    def test_the_answer_is_the_output_of_the_last(self, served: Any) -> None:
        answer = served.post("/chains/run", {"steps": ["Moves@1.0.0"], "data": {"x": 1, "y": 2}})
        assert answer.json() == {"x": 3}

    def test_a_no_is_200_and_names_the_step(self, served: Any) -> None:
        answer = served.post("/chains/run", {"steps": ["Checks", "Moves"], "data": "reasons"})
        assert (answer.status_code, answer.json()) == (200, {
            "valid": False, "errors": [{"pointer": "/a", "message": "Wrong."}], "step": 1,
            "plugin": "Checks",
        })  # fmt: skip

    def test_types_that_do_not_fit_are_422_and_name_the_joint(self, served: Any) -> None:
        answer = served.post("/chains/run", {"steps": ["Moves", "Lies"], "data": {"x": 1, "y": 2}})
        assert answer.status_code == 422
        assert "Joint 1, between Moves.process and Lies.process" in problem_of(answer)["detail"]

    @pytest.mark.parametrize("first", ["Passes", "PassesLater"])
    def test_what_comes_from_an_untyped_step_becomes_what_the_next_takes(
        self, served: Any, first: str
    ) -> None:
        for data, status in (({"x": 1, "y": 2}, 200), ({"x": "no"}, 422), ("text", 422)):
            answer = served.post("/chains/run", {"steps": [first, "Moves"], "data": data})
            assert answer.status_code == status, answer.text
            if status == 200:
                assert answer.json() == {"x": 3}
            else:
                problem = problem_of(answer)
                assert "step 2, Moves.process" in problem["detail"]
                assert problem["errors"][0]["pointer"] == "/steps"

    def test_async_steps_are_awaited_and_timed(self, served: Any) -> None:
        steps = ["SleepsLater", "Sleeps"]
        assert served.post("/chains/run", {"steps": steps, "data": 0.01}).json() == 0.01
        for chain in (steps, ["Sleeps"]):
            assert served.post("/chains/run", {"steps": chain, "data": 5}).status_code == 504

    @pytest.mark.parametrize(
        ("asked", "status"),
        [
            ({"steps": ["Nothing"], "data": 1}, 404),
            ({"steps": ["Moves@7.0.0"], "data": 1}, 404),
            ({"steps": [], "data": 1}, 422),
            ({"steps": ["Moves"] * 40, "data": 1}, 422),
            ({"steps": "Moves", "data": 1}, 422),
            ({"steps": ["Moves"]}, 422),
            ({"steps": ["Moves"], "data": {"x": "no"}}, 422),
            ({"steps": ["OnlyRuns"], "data": 1}, 422),
            ({"steps": ["Raises"], "data": "exit"}, 500),
            ({"steps": ["Lies"], "data": "changed"}, 500),
            ({"steps": ["Refuses"], "data": 1}, 422),
            ({"steps": ["Refuses"], "data": "at length"}, 422),
        ],
    )
    def test_what_goes_wrong_is_a_problem(self, served: Any, asked: Any, status: int) -> None:
        answer = served.post("/chains/run", asked)
        assert answer.status_code == status, answer.text
        problem_of(answer)


class TestWhatIsThere:
    def test_plugins_are_listed_with_their_state(self, served: Any) -> None:
        found = {each["name"]: each for each in served.get("/plugins")}
        assert found["Moves"]["version"] == "1.0.0"
        assert found["Moves"]["source"] == "difficult.py"
        assert found["Moves"]["methods"] == ["process"]
        assert found["Moves"]["default"] is True
        detail = served.get("/plugins/Moves")
        assert detail == served.get("/plugins/Moves/1.0.0")
        assert detail["versions"] == ["1.0.0"]
        assert detail["input_schema"]["process"]["required"] == ["x", "y"]
        with served.client() as client:
            assert client.get("/plugins/Moves/2.0.0").status_code == 404
            wrong = client.get("/plugins/Moves/process")
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")

    def test_what_failed_is_listed_with_phase_and_line(self, served: Any) -> None:
        (failure,) = served.get("/plugins/failed")
        assert (failure["file"], failure["phase"], failure["line"]) == ("broken.py", "contract", 3)
        assert "C110" in failure["error"]
        assert str(served.plugins) not in failure["error"]

    def test_contracts_are_listed_with_who_keeps_them(self, served: Any) -> None:
        found = {each["name"]: each for each in served.get("/contracts")}
        assert found["Other"]["plugins"] == ["OnlyRuns 0.0.0"]
        assert found["Other"]["members"][0]["signature"] == "(self) -> int"
        assert found["PluginBase"]["any_of"] is True
        assert found["APIContractBase"]["attributes"] == "required"

    def test_figures_are_exact_and_in_prometheus(self, make_server: Callable[[], Any]) -> None:
        server = make_server()
        server.write("difficult.py", PLUGINS)
        server.start(CALL_TIMEOUT_SECONDS="0.3")
        for _ in range(5):
            server.post("/plugins/Moves/process", {"x": 1, "y": 2})
        for _ in range(3):
            server.post("/plugins/Raises/process", "value")
        for _ in range(2):
            server.post("/plugins/SleepsLater/process", 5)

        figures = server.get("/plugins/Moves/metrics")["methods"]["process"]
        assert (figures["calls"], figures["errors"], figures["cancellations"]) == (5, 0, 0)
        assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"] < 0.1
        assert server.get("/plugins/Moves/1.0.0/metrics")["methods"]["process"]["calls"] == 5
        with server.client() as client:
            text = client.get("/metrics").text
        for line in (
            'plugin_calls_total{method="process",plugin="Moves",version="1.0.0"} 5.0',
            'plugin_errors_total{method="process",plugin="Raises",version="0.0.0"} 3.0',
            'plugin_calls_total{method="process",plugin="Raises",version="0.0.0"} 3.0',
            'plugin_cancellations_total{method="process",plugin="SleepsLater",version="0.0.0"} 2.0',
            'plugin_latency_seconds_bucket{le="+Inf",method="process",plugin="Moves",'
            'version="1.0.0"} 5.0',
            'plugin_latency_seconds_count{method="process",plugin="Moves",version="1.0.0"} 5.0',
        ):  # fmt: skip
            assert line in text


class TestAdmin:
    def test_without_a_token_there_are_no_such_paths(self, bundled_server: Any) -> None:
        paths = ["/plugins/reload"]
        paths += [f"/plugins/Describe{v}/{verb}" for v in ("", "/1.0.0")
                  for verb in ("enable", "disable", "reload")]  # fmt: skip
        for path in paths:
            answer = bundled_server.post(path, headers=TOKEN)
            assert answer.status_code == 404
            problem_of(answer)
        document = json.dumps(bundled_server.get("/openapi.json"))
        assert "/enable" not in document
        assert "/plugins/reload" not in document

    def test_the_wrong_token_is_401(self, served: Any) -> None:
        for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic sesame"},
                        {"Authorization": b"Bearer \xff\xfe"}):  # fmt: skip
            for path in ("/plugins/reload", "/plugins/Moves/disable", "/plugins/X/1.0.0/enable"):
                answer = served.post(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"

    def test_disabled_is_409_until_enabled(self, served: Any) -> None:
        assert served.post("/plugins/Moves/disable", headers=TOKEN).json()["state"] == "disabled"
        answer = served.post("/plugins/Moves/process", {"x": 1, "y": 2})
        assert answer.status_code == 409
        assert "disabled" in problem_of(answer)["detail"]
        assert (
            served.post("/plugins/Moves/1.0.0/enable", headers=TOKEN).json()["state"] == "enabled"
        )
        assert served.post("/plugins/Moves/process", {"x": 1, "y": 2}).status_code == 200
        assert served.post("/plugins/Nothing/enable", headers=TOKEN).status_code == 404

    def test_plugins_come_change_fail_and_go_without_restart(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server()
        server.start(ADMIN_TOKEN="sesame")

        def rescan() -> Any:
            return server.post("/plugins/reload", headers=TOKEN).json()

        def paths() -> set[str]:
            return {p for p in server.get("/openapi.json")["paths"] if "Versioned" in p}

        assert paths() == set()
        server.write("one.py", VERSIONED.format(field="a", version="1.0.0"))
        server.write("two.py", VERSIONED.format(field="b", version="2.0.0"))
        assert rescan()["loaded"] == ["one.py", "two.py"]
        assert paths() == {
            "/plugins/Versioned/process", "/plugins/Versioned/1.0.0/process",
            "/plugins/Versioned/2.0.0/process",
        }  # fmt: skip
        schemas = server.get("/openapi.json")["components"]["schemas"]
        assert schemas["Versioned-1.0.0-process-input-Input"]["required"] == ["a"]
        assert schemas["Versioned-2.0.0-process-input-Input"]["required"] == ["b"]
        assert server.post("/plugins/Versioned/process", {"b": 5}).json() == 5
        assert server.post("/plugins/Versioned/1.0.0/process", {"a": 4}).json() == 4

        server.write("two.py", VERSIONED.format(field="b", version="2.0"))
        assert rescan()["failed"][0]["phase"] == "contract"
        answer = server.post("/plugins/Versioned/2.0.0/reload", headers=TOKEN)
        assert answer.status_code == 409
        assert answer.json()["failure"]["file"] == "two.py"
        assert server.post("/plugins/Versioned/process", {"b": 5}).json() == 5
        assert server.get("/plugins/failed")[0]["file"] == "two.py"

        (server.plugins / "two.py").unlink()
        assert rescan()["removed"] == ["two.py"]
        assert server.get("/plugins/failed") == []
        assert server.post("/plugins/Versioned/2.0.0/process", {"b": 5}).status_code == 404
        assert paths() == {"/plugins/Versioned/process", "/plugins/Versioned/1.0.0/process"}
        assert server.post("/plugins/Versioned/process", {"a": 4}).json() == 4

    def test_reloads_under_load_fail_no_request(self, make_server: Callable[[], Any]) -> None:
        server = make_server()
        text = "from utils import PluginBase\nclass P(PluginBase):\n    def process(self, data: int) -> int:\n        return data + {}\n"  # noqa: E501
        server.write("p.py", text.format(0))
        server.start(ADMIN_TOKEN="sesame")
        stop = False
        answers: list[tuple[int, Any]] = []

        def call() -> None:
            with server.client() as client:
                while not stop:
                    answer = client.post("/plugins/P/process", json=0)
                    answers.append((answer.status_code, answer.json()))

        with ThreadPoolExecutor(3) as pool:
            callers = [pool.submit(call) for _ in range(3)]
            with server.client() as client:
                for step in range(1, 51):
                    server.write("p.py", text.format(step))
                    done = client.post("/plugins/P/reload", headers=TOKEN)
                    assert done.status_code == 200
            stop = True
            for caller in callers:
                caller.result()

        assert {status for status, _ in answers} == {200}
        assert server.post("/plugins/P/process", 0).json() == 50
        calls = server.get("/plugins/P/metrics")["methods"]["process"]["calls"]
        assert calls == len(answers) + 1


class TestDocumentation:
    def test_with_an_api_key_admin_operations_declare_both_schemes(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server()
        server.start(ADMIN_TOKEN="sesame", API_KEY="open")
        with server.client(headers={"X-API-Key": "open"}) as client:
            document = client.get("/openapi.json").json()
            assert set(document["components"]["securitySchemes"]) == {"HTTPBearer", "apiKey"}
            for path, item in document["paths"].items():
                for operation in item.values():
                    wanted: dict[str, list[str]] = {"apiKey": []}
                    if "admin" in operation["tags"]:
                        wanted["HTTPBearer"] = []
                    if path not in HEALTH_PATHS:
                        assert operation["security"] == [wanted], path
            assert client.post("/plugins/reload").status_code == 401
            assert client.post("/plugins/reload", headers=TOKEN).status_code == 200
        assert server.post("/plugins/reload", headers=TOKEN).status_code == 401

    def test_every_documented_example_succeeds_as_shown(self, make_server: Any) -> None:
        server = make_server().start(PLUGINS_DIR="default", ADMIN_TOKEN="sesame")
        document = server.get("/openapi.json")
        tried = 0
        with server.client() as client:
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    assert operation["tags"], path
                    assert operation["summary"], path
                    assert operation["operationId"], path
                    assert any(code.startswith(("4", "default")) for code in operation["responses"])
                    url = path
                    for parameter in operation.get("parameters", ()):
                        example = parameter.get(
                            "example", parameter["schema"].get("examples", [None])[0]
                        )
                        url = url.replace(f"{{{parameter['name']}}}", str(example))
                    body = None
                    if "requestBody" in operation:
                        body = operation["requestBody"]["content"]["application/json"]["example"]
                    headers = TOKEN if "admin" in operation["tags"] else {}
                    answer = client.request(method, url, json=body, headers=headers)
                    assert answer.status_code == 200, (path, answer.text)
                    tried += 1
                    if path.endswith("/disable"):
                        client.post(url.replace("/disable", "/enable"), headers=TOKEN)
        assert tried >= 35
        ids = [o["operationId"] for each in document["paths"].values() for o in each.values()]
        assert len(ids) == len(set(ids))

    def test_the_document_is_sound(self, bundled_server: Any) -> None:
        document = bundled_server.get("/openapi.json")
        assert document["openapi"].startswith("3.1")
        text = json.dumps(document)
        for reference in set(re.findall(r'"#/components/schemas/([^"]+)"', text)):
            assert reference in document["components"]["schemas"], reference
            assert re.fullmatch(r"[a-zA-Z0-9._-]+", reference)
        for schema in document["components"]["schemas"].values():
            Draft202012Validator.check_schema(schema)
        declared = {tag["name"] for tag in document["tags"]}
        used = {t for each in document["paths"].values() for o in each.values() for t in o["tags"]}
        assert used <= declared
        assert document == bundled_server.get("/openapi.json")

    def test_the_pages_need_no_network(self, bundled_server: Any) -> None:
        with bundled_server.client() as client:
            for page in ("/docs", "/redoc"):
                for asset in re.findall(r'(?:src|href)="([^"]+)"', client.get(page).text):
                    assert asset.startswith("/"), asset
                    assert client.get(asset).status_code == 200

    def test_the_key_guards_the_calls(self, make_server: Callable[[], Any]) -> None:
        server = make_server().start(API_KEY="sesame", PLUGINS_DIR="default")
        assert server.post("/plugins/Describe/process", [1]).status_code == 401
        answer = server.post("/plugins/Describe/process", [1], headers={"x-api-key": "sesame"})
        assert answer.status_code == 200
        document = server.get("/openapi.json")
        assert document["paths"]["/plugins/Describe/process"]["post"]["security"] == [
            {"apiKey": []}
        ]
