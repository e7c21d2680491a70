"""One source in a run: what of it is there, what is missing, and what it cost."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fetch_settings import Source
from records import Product
from resilience import CallError, Guard

REPORTED_ERRORS: Final = 1000  # of a source in the summary; the counts are of all


@dataclass
class SourceState:
    """One source in this run: what is done, what failed, what it cost."""

    source: Source
    guard: Guard
    products: dict[str, Product] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # item -> kind
    expected: int | None = None
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    next_cursor: str | None = None
    pages: int | None = None
    ids: list[str] | None = None
    is_finished: bool = False
    requests: int = 0  # sent, redirects not counted
    first_request: float | None = None
    first_window_at: float = 0.0  # when the last request of the first window was sent
    last_request: float = 0.0

    @property
    def not_tried(self) -> int:
        """Items that are known of, and were neither fetched nor found wanting."""
        if self.is_finished:
            return 0
        if self.expected is None:
            return 0 if self.failed else 1
        return max(0, self.expected - len(self.done) - len(self.failed))

    @property
    def is_complete(self) -> bool:
        """Nothing of it is missing."""
        return self.is_finished and not self.failed and not self.faults

    def keep(
        self, line: Mapping[str, Any], products: Iterable[Product], max_products: int
    ) -> list[Product]:
        """Take an item into the result; the products that were not there before."""
        new = {each.id: each for each in products if each.id not in self.products}
        self.duplicates += len(line["products"]) - len(new)
        room = max_products - len(self.products)
        if len(new) > room:
            self.faults["too_many"] += 1
            self.list_error(line["item"], "too_many", f"Over {max_products:,}.")
        fresh = list(new.values())[:room]
        self.products.update((product.id, product) for product in fresh)
        self.done.add(line["item"])
        self.failed.pop(line["item"], None)
        self.next_cursor = line["next"]
        if line["pages"] is not None:
            self.pages = self.expected = line["pages"]
        for kind, message in line["faults"]:
            self.faults[kind] += 1
            self.list_error(line["item"], kind, message)
        return fresh

    def note(self, item: str, error: CallError) -> None:
        """Remember that an item is missing, and why."""
        self.failed[item] = error.kind
        if error.kind not in self.guard.tally.failures:
            self.faults[error.kind] += 1
        self.list_error(item, error.kind, str(error))

    def list_error(self, item: str, kind: str, message: str) -> None:
        """Add it to the errors of the summary, as long as these are not too many."""
        if len(self.errors) < REPORTED_ERRORS:
            self.errors.append(
                {"source": self.source.name, "item": item, "kind": kind, "message": message}
            )

    def progress(self) -> dict[str, Any]:
        """What a table of the run shows of it."""
        tally, breaker = self.guard.tally, self.guard.breaker
        return {
            "source": self.source.name,
            "items": len(self.products),
            "requests_done": len(self.done),
            "requests_expected": self.expected,
            "failed": len(self.failed),
            "errors": dict(tally.failures + self.faults),
            "retries": tally.retries,
            "paused": tally.limited,
            "breaker": str(breaker.state),
            "breaker_openings": breaker.openings,
            "rate": self.rate(),
            "finished": self.is_finished,
        }

    def sending(self, at: float) -> None:
        """A request is sent now."""
        self.requests += 1
        if self.requests <= self.guard.limiter.burst:
            self.first_window_at = at
        if self.first_request is None:
            self.first_request = at
        self.last_request = at

    def rate(self) -> float | None:
        """Requests per second; those of the first second may come at once, and count apart."""
        if self.first_request is None:
            return None
        window, burst = self.guard.limiter.window_seconds, self.guard.limiter.burst
        if self.requests <= burst:
            return round(self.requests / max(self.last_request - self.first_request, window), 2)
        return round((self.requests - burst) / (self.last_request - self.first_window_at), 2)

    def report(self) -> dict[str, Any]:
        """What the summary says of it."""
        by_currency: dict[str, list[float]] = {}
        for product in self.products.values():
            if product.price is not None:
                by_currency.setdefault(product.currency or "", []).append(float(product.price))
        averages = {each: round(sum(p) / len(p), 2) for each, p in sorted(by_currency.items())}
        return {
            "items": len(self.products),
            "complete": self.is_complete,
            "errors": dict(self.guard.tally.failures + self.faults),
            "failed_requests": len(self.failed),
            "not_tried": self.not_tried,
            "average_price": next(iter(averages.values())) if len(averages) == 1 else None,
            "average_price_by_currency": averages,
            "retries": self.guard.tally.retries,
            "paused": self.guard.tally.limited,
            "breaker_openings": self.guard.breaker.openings,
            "rate": self.rate(),
            "requests": self.guard.tally.attempts,
            "duplicates": self.duplicates,
        }
