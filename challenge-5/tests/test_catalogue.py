"""The tasks that may be asked for over HTTP stay inside of their folder, and on this machine."""

import asyncio
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration


@pytest.fixture
def data(tmp_path: Path, monkeypatch: Any) -> Path:
    """A data folder with plain files, and with everything that is none."""
    folder = tmp_path / "data"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "sales.csv").write_text("town,sold\nA,1\nB,x\nA,3\nB,nan\nB,-2.5\n")
    (folder / "deep" / "er" / "note.txt").write_text("n")
    (tmp_path / "secret.txt").write_text("s")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "out").symlink_to(tmp_path)
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    monkeypatch.setenv("SCHEDULER_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def say() -> Iterator[list[Any]]:
    """A running task's context; what it tells is kept."""
    import context

    told: list[Any] = []
    task = context.TaskContext("t", 1, 0, lambda what, value: told.append(value))
    token = context.running.set(task)
    yield told
    context.running.reset(token)


class TestFiles:
    def test_checksums_are_those_of_the_files(self, data: Path, say: list[Any]) -> None:
        from catalogue import checksum_files

        names = ["sales.csv", "deep/er/note.txt", "deep/../sales.csv"]
        assert checksum_files(names) == {
            name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in names
        }
        assert say == [[0.0, "sales.csv"]]

    @pytest.mark.parametrize(
        "name",
        ["../secret.txt", "deep/../../secret.txt", "link.txt", "out/secret.txt", "zero",
         "/etc/passwd", "//etc/passwd", "pipe", "deep", ".", "x" * 400, "sales.csv/x", "no.csv",
         "a\0b"],
    )  # fmt: skip
    def test_what_is_no_plain_file_in_the_folder_is_refused_without_saying_where_that_is(
        self, data: Path, say: list[Any], name: str
    ) -> None:
        from catalogue import aggregate_csv, checksum_files

        for ask in (lambda: checksum_files([name]), lambda: aggregate_csv(name, "a", "b")):
            with pytest.raises((ValueError, OSError)) as caught:
                ask()
            assert str(data) not in str(caught.value)
            assert str(data.parent) not in str(caught.value)

    def test_lists_follow_no_link_out_of_the_folder(self, data: Path) -> None:
        from catalogue import list_files

        assert list_files() == ["deep/er/note.txt", "sales.csv"]
        assert list_files("*.csv") == ["sales.csv"]
        assert list_files("out/*") == []
        for pattern in ("../*", "/etc/*", "deep/../../*", "**/**/x"):
            with pytest.raises(ValueError, match="pattern"):
                list_files(pattern)

    def test_a_list_has_a_limit(self, data: Path, monkeypatch: Any) -> None:
        import catalogue

        monkeypatch.setattr(catalogue, "MOST_FILES", 1)
        with pytest.raises(ValueError, match="narrower"):
            catalogue.list_files()

    def test_a_column_is_aggregated_by_another_where_it_is_a_number(self, data: Path) -> None:
        from catalogue import aggregate_csv

        assert aggregate_csv("sales.csv", "town", "sold") == {
            "A": {"count": 2, "sum": 4.0, "min": 1.0, "max": 3.0},
            "B": {"count": 1, "sum": -2.5, "min": -2.5, "max": -2.5},
        }
        with pytest.raises(ValueError, match="no column 'price'"):
            aggregate_csv("sales.csv", "town", "price")


class Answers(BaseHTTPRequestHandler):
    """A small body, a redirect, an endless one, and one that unpacks to much."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/away" else 200)
        if self.path == "/away":
            self.send_header("Location", "http://192.0.2.1/")
        if self.path == "/bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(65_536))
            body = gzip.compress(bytes(50_000_000)) if self.path == "/bomb" else b"hello"
            self.wfile.write(body)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class TestFetching:
    def test_an_answer_is_told_by_status_size_and_checksum(self, url: str) -> None:
        from catalogue import fetch_url

        expected = {"status": 200, "bytes": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
        assert fetch_url(url) == expected
        assert fetch_url(url.replace("127.0.0.1", "LOCALHOST")) == expected
        assert fetch_url(url.replace("//", "//name:word@")) == expected

    def test_redirects_are_not_followed_and_nothing_is_unpacked(self, url: str) -> None:
        from catalogue import fetch_url

        assert fetch_url(f"{url}/away")["status"] == 302
        assert fetch_url(f"{url}/bomb")["bytes"] < 100_000

    def test_what_is_too_long_is_left(self, url: str) -> None:
        from catalogue import fetch_url

        with pytest.raises(ValueError, match="larger than"):
            fetch_url(f"{url}/endless")

    def test_what_takes_too_long_is_left(self, url: str, monkeypatch: Any) -> None:
        import catalogue

        monkeypatch.setattr(catalogue, "FETCHED_BYTES", 2**60)
        monkeypatch.setattr(catalogue, "FETCH_SECONDS", 0.2)
        with pytest.raises(TimeoutError, match="longer than"):
            catalogue.fetch_url(f"{url}/endless")

    @pytest.mark.parametrize(
        "address",
        ["http://169.254.169.254/", "http://0.0.0.0/", "http://[::]/", "http://10.0.0.1/",
         "http://localhost.example/", "http://127.0.0.1@example.org/", "http://2130706433/",
         "http://0x7f.1/", "http://127.1/", "http://[::ffff:10.0.0.1]/", "http://[::1%25lo]/",
         "file:///etc/passwd", "gopher://127.0.0.1/", "http://", "", "http://localhost./",
         "http://127.0.0.1:99999/", "http://127.0.0.1:x/"],
    )  # fmt: skip
    def test_addresses_of_other_machines_are_refused_in_every_spelling(self, address: str) -> None:
        from catalogue import fetch_url

        with pytest.raises(ValueError, match=r"loopback|fetched|Port"):
            fetch_url(address)


class TestCalculating:
    @pytest.mark.parametrize(
        ("start", "stop", "number"),
        [
            (0, 100, 25),
            (2, 3, 1),
            (3, 3, 0),
            (9, 4, 0),
            (0, 0, 0),
            (90, 98, 1),
            (10**9 - 60, 10**9, 1),
        ],
    )
    def test_primes_are_counted(self, start: int, stop: int, number: int) -> None:
        from catalogue import count_primes

        by_division = sum(
            n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(start, stop)
        )
        assert count_primes(start, stop) == by_division
        if stop < 1_000:
            assert by_division == number

    def test_a_range_has_a_limit(self) -> None:
        from catalogue import count_primes

        with pytest.raises(ValueError, match="50,000,000"):
            count_primes(0, 10**9)

    def test_a_matrix_is_inverted_transposed_blurred_or_its_edges(self) -> None:
        from catalogue import transform_matrix

        matrix = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
        assert transform_matrix(matrix, "invert") == [[5, 4, 3], [2, 1, 0]]
        assert transform_matrix(matrix, "transpose") == [[1, 4], [2, 5], [3, 6]]
        assert transform_matrix(matrix, "blur")[0] == [3.0, 3.5, 4.0]
        assert transform_matrix(matrix, "edges")[0] == [2.0, 1.5, 1.0]
        with pytest.raises(ValueError, match="same length"):
            transform_matrix([[1.0], [1.0, 2.0]], "blur")

    def test_the_rest_merges_and_sleeps(self) -> None:
        from catalogue import merge, sleep

        assert merge({"a": 1}, {"b": 2}, {"a": 3}) == {"a": 3, "b": 2}
        assert asyncio.run(sleep(0)) == 0


@pytest.mark.webhook
def test_over_http_no_answer_tells_where_the_folder_lies_and_every_name_can_be_shown(
    make_server: Callable[[], Any],
) -> None:
    server = make_server().start()
    (server.data / os.fsdecode(b"\xff.txt")).write_text("x")
    (server.data / "plain.txt").write_text("x")
    with server.client() as client:

        def result(name: str, **args: Any) -> Any:
            task = client.post("/tasks", json={"name": name, "args": args}).json()["id"]
            answer = client.get(f"/tasks/{task}/result", params={"wait": 20})
            assert answer.status_code == 200, answer.text
            assert str(server.data) not in answer.text
            return json.loads(answer.content)

        assert result("list_files", pattern="*.txt")["output"] == ["plain.txt", r"\udcff.txt"]
        for name in ("gone.txt", ".", "../x"):
            assert result("checksum_files", files=[name])["state"] == "failed"
        wide = result("transform_matrix", matrix=[[-1e308, 1e308]], operation="invert")
        assert wide["output"] == [["inf", 0.0]]
        assert str(server.data) not in client.get("/tasks", params={"q": "gone"}).text
    assert "Traceback" not in server.log.read_text()
