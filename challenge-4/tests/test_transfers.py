"""How many rows a server really sends: counted on the wire, between driver and PostgreSQL."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tables import DatabaseLazyCollection
from utils import col

pytestmark = pytest.mark.integration

ROWS = 1_000_000
FETCH = 1000
Rows = DatabaseLazyCollection


class Wire:
    """Passes bytes between a client and PostgreSQL, and counts the rows of the table `big`.

    A message of the server is a letter, the length of what follows including itself, and that: `T`
    names the columns of the rows that follow, `D` is a row.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", 5432))
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
                threading.Thread(target=self._count, args=(server, client), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _count(self, server: socket.socket, client: socket.socket) -> None:
        ours = False
        with suppress(OSError), server, client, server.makefile("rb") as stream:
            while head := stream.read(5):
                body = stream.read(int.from_bytes(head[1:]) - 4)
                if head[:1] == b"T":
                    ours = b"id_of_big\0" in body
                self.rows += head[:1] == b"D" and ours
                client.sendall(head + body)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


@pytest.fixture(scope="module")
def big(postgres: Any) -> str:
    connection, schema = postgres
    connection.execute(
        f"CREATE UNLOGGED TABLE {schema}.big (id_of_big integer PRIMARY KEY, n integer, t text)"
    )
    connection.execute(
        f"INSERT INTO {schema}.big SELECT i, i % 1000, 'row ' || i "
        f"FROM generate_series(1, {ROWS}) AS i"
    )
    return f"{schema}.big"


@pytest.mark.parametrize(
    ("read", "least", "most"),
    [
        (lambda rows: rows.take(10).collect(), 10, 10),
        (lambda rows: rows.filter(col("n") == 7).take(10).collect(), 10, 10),
        (lambda rows: rows.page(1, 10), 11, 11),
        (lambda rows: rows.first(), 1, 1),
        (lambda rows: rows[5], 1, 1),
        (lambda rows: rows.filter(lambda row: row["id_of_big"] > 5).take(10).collect(), 15, FETCH),
        (lambda rows: rows.batch(5).take(2).collect(), 10, FETCH),
        (lambda rows: rows.any(lambda row: row["n"] == 3), 3, FETCH),
        (lambda rows: next(iter(rows)), 1, FETCH),
        (lambda rows: rows.filter(lambda row: row["n"] == 0).take(2).collect(), 2000, 2 * FETCH),
    ],
)
def test_the_server_sends_no_more_than_a_fetch_beyond_what_is_needed(
    wire: Wire, big: str, read: Callable[[Rows], Any], least: int, most: int
) -> None:
    dsn = f"postgresql://postgres@127.0.0.1:{wire.port}/test?sslmode=disable"

    read(DatabaseLazyCollection.from_table(big, fetch_size=FETCH, connection=dsn))

    assert least <= wire.rows <= most


def test_the_count_sees_every_row_of_the_table(wire: Wire, big: str) -> None:
    dsn = f"postgresql://postgres@127.0.0.1:{wire.port}/test?sslmode=disable"
    table = DatabaseLazyCollection.from_table(big, columns=["id_of_big"], connection=dsn)

    assert table.filter(lambda row: row["id_of_big"] > 0).take(20_000).count() == 20_000
    assert 20_000 <= wire.rows <= 20_000 + FETCH
