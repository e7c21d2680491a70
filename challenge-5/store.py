"""What the engine needs of a place to keep tasks: the contract, for SQLite and for later ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from records import Batch, Job

Durability = Literal["full", "normal", "off"]
KEPT_LINES = 100  # of log per task


@dataclass
class Recovered:
    """What a store held when it was opened."""

    next_seq: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    # (seq, kind, priority, state, run_at) of everything unfinished, in order
    live: list[tuple[int, str, int, str, float | None]] = field(default_factory=list)
    # (child, parent, state of the parent) of everything pending
    edges: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Filter:
    """Which tasks a page shows, newest first; `before` is the last sequence number seen."""

    states: Sequence[str] = ()
    name: str | None = None
    priority: int | None = None
    text: str | None = None
    before: int | None = None
    limit: int = 50


class Store(Protocol):
    """What the engine needs of a place to keep tasks; the first group in its own thread."""

    durability: Durability
    lasting: bool  # another scheduler can go on with it later

    def open(self) -> Recovered:
        """Take the store, or raise StoreLocked naming its holder."""

    def commit(self, batch: Batch) -> None:
        """Write it all or nothing; durable on return as far as the durability says."""

    def load(self, seqs: Sequence[int]) -> list[Job]:
        """The tasks with these numbers, with their calls and parents, in order."""

    def known(self, ids: Sequence[str]) -> dict[str, tuple[int, str, bytes | None]]:
        """Number, state and digest of those ids that exist."""

    def with_key(self, key: str) -> tuple[str, bytes | None] | None:
        """Id and digest of the task with this idempotency key."""

    def results(self, seqs: Sequence[int]) -> dict[int, bytes]:
        """The results that are still kept."""

    def unfinished(self) -> list[str]:
        """The ids of all tasks that have not ended."""

    def cleanup(self, before: float, states: Sequence[str], limit: int) -> dict[str, int]:
        """Delete ended tasks; how many of each state. Parents of unfinished tasks stay."""

    def expire(self, now: float) -> int:
        """Delete results whose time is over, except for unfinished children."""

    def close(self) -> None:
        """Let the next one have it; idempotent."""

    # --- from any thread ---

    def find(self, task_id: str) -> dict[str, Any] | None:
        """The committed row of a task, with its parents' ids."""

    def page(self, wanted: Filter) -> list[dict[str, Any]]:
        """Rows that fit, newest first."""

    def result(self, seq: int) -> bytes | None:
        """The result (or the travelled exception) of a task, if it is kept."""

    def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Transitions after a number, with the ids of their tasks."""

    def history(self, seq: int) -> list[dict[str, Any]]:
        """The transitions of one task."""

    def last_event(self) -> int:
        """The number of the newest transition."""

    def notes(self, seq: int) -> list[dict[str, Any]]:
        """The log lines of a task, oldest first."""

    def graph(self, seq: int, limit: int) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """The tasks connected with one, and the edges (parent, child) between them."""

    def counts(self) -> dict[str, int]:
        """How many tasks are in each state, counted."""
