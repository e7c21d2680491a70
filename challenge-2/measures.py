"""Histograms and counts of what managers did, and how they are shown to Prometheus.

A finished run is added in one go, so that a resource costs three bisections; runs that still last
are looked at when somebody asks. The number of names is bounded: what comes after `SERIES_MAX` is
counted under `other`.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Owner, Run

BOUNDS = (
    0.00001, 0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 300.0, 3600.0,
)  # fmt: skip  # seconds
SHORTEST = BOUNDS[0]
BUCKETS = len(BOUNDS) + 1
SERIES_MAX = 1000


class Histogram:
    """Counts by upper bound in seconds, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self, counts: list[int], total: float) -> None:
        self.counts = counts
        self.total = total

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        found, below = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            below += count
            found.append((bound, float(below)))
        return found


class Series:
    """The figures of all resources of one name and kind.

    The counts of the three histograms are one list: this is added to for every resource.
    """

    __slots__ = (
        "_acquire_total", "_counts", "_hold_total", "_release_total", "abandoned",
        "acquire_failures", "key", "lost", "release_failures",
    )  # fmt: skip

    def __init__(self, key: tuple[str, str]) -> None:
        self.key = key
        self._counts = [0] * (3 * BUCKETS)
        self._acquire_total = self._hold_total = self._release_total = 0.0
        self.acquire_failures: Counter[str] = Counter()
        self.release_failures: Counter[str] = Counter()
        self.abandoned = self.lost = 0

    @property
    def acquire(self) -> Histogram:
        """Of what became ready."""
        return Histogram(self._counts[:BUCKETS], self._acquire_total)

    @property
    def hold(self) -> Histogram:
        """Of what began to be released."""
        return Histogram(self._counts[BUCKETS:-BUCKETS], self._hold_total)

    @property
    def release(self) -> Histogram:
        """Of what was released, well or badly."""
        return Histogram(self._counts[-BUCKETS:], self._release_total)

    def add(self, owner: Owner) -> None:
        """What is known of a resource: of one that still lives, only the finished part."""
        ready, releasing, released = owner.ready_at, owner.releasing_at, owner.released_at
        if ready:
            counts = self._counts
            seconds = ready - owner.acquiring_at
            counts[bisect_left(BOUNDS, seconds) if seconds > SHORTEST else 0] += 1
            self._acquire_total += seconds
            if releasing:
                seconds = releasing - ready
                counts[BUCKETS + bisect_left(BOUNDS, seconds)] += 1
                self._hold_total += seconds
                if released:
                    seconds = released - releasing
                    place = bisect_left(BOUNDS, seconds) if seconds > SHORTEST else 0
                    counts[2 * BUCKETS + place] += 1
                    self._release_total += seconds
        if owner.error is not None or owner.loss is not None:
            self._add_troubles(owner)

    def _add_troubles(self, owner: Owner) -> None:
        self.abandoned += owner.abandoned
        if owner.loss is not None:
            self.lost += 1
        elif owner.error is not None:
            reasons = self.release_failures if owner.ready_at else self.acquire_failures
            reasons[reason_of(owner.error)] += 1

    def copy(self) -> Series:
        """An independent copy."""
        twin = Series(self.key)
        twin._counts = self._counts.copy()
        twin._acquire_total, twin._hold_total = self._acquire_total, self._hold_total
        twin._release_total = self._release_total
        twin.acquire_failures = Counter(self.acquire_failures)
        twin.release_failures = Counter(self.release_failures)
        twin.abandoned, twin.lost = self.abandoned, self.lost
        return twin


def reason_of(error: BaseException) -> str:
    """The cause of a failure as one of a few words."""
    cause = error.__cause__ if error.__cause__ is not None else error
    if type(error).__name__ == "MissingDriver":
        return "missing_driver"
    if isinstance(error, TimeoutError) or isinstance(cause, TimeoutError):
        return "timeout"
    if type(cause).__name__ == "CancelledError":
        return "cancelled"
    return "connection" if isinstance(cause, OSError) else "error"


class Measures:
    """The figures of all managers of this process that have metrics enabled."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], Series] = {}
        self._live: weakref.WeakSet[Run] = weakref.WeakSet()
        self._lock = threading.Lock()  # managers may live in several threads

    def series(self, name: str, kind: str) -> Series:
        """Where resources of this name and kind are counted."""
        key = (name, kind)
        found = self._series.get(key)
        if found is None:
            with self._lock:
                if len(self._series) >= SERIES_MAX:
                    key = ("other", kind)
                found = self._series.setdefault(key, Series(key))
        return found

    def began(self, run: Run) -> None:
        """A run whose resources are in use until it has ended."""
        self._live.add(run)

    def ended(self, run: Run) -> None:
        """Count a whole run."""
        with self._lock:
            self._live.discard(run)
            for owner in run.owners:
                if (series := owner.series) is not None:
                    series.add(owner)

    def snapshot(self) -> tuple[Mapping[tuple[str, str], Series], list[Owner]]:
        """All figures now, and the owners that are held now."""
        with self._lock:
            found = {key: series.copy() for key, series in self._series.items()}
            owners = [owner for run in self._live for owner in run.owners if owner.series]
            for owner in owners:
                found[owner.series.key].add(owner)
        return found, [owner for owner in owners if owner.ready_at and not owner.released_at]


MEASURES = Measures()


def families(measures: Measures) -> Iterable[Any]:
    """The metric families of resources, in seconds, by resource and kind."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    found, held = measures.snapshot()
    in_use = Counter(owner.series.key for owner in held)
    labels = ["resource", "kind"]
    for phase in ("acquire", "hold", "release"):
        family = HistogramMetricFamily(
            f"resource_{phase}_duration_seconds", f"Seconds of {phase}.", labels=labels
        )
        for key, series in sorted(found.items()):
            histogram: Histogram = getattr(series, phase)
            family.add_metric(list(key), histogram.buckets(), histogram.total)
        yield family
    gauge = GaugeMetricFamily("resource_in_use", "Resources held now.", labels=labels)
    for key in sorted(found):
        gauge.add_metric(list(key), in_use[key])
    yield gauge
    for name, attribute in (
        ("resource_acquire_failures", "acquire_failures"),
        ("resource_release_failures", "release_failures"),
    ):
        counter = CounterMetricFamily(name, "Failures by reason.", labels=[*labels, "reason"])
        for key, series in sorted(found.items()):
            for reason, count in sorted(getattr(series, attribute).items()):
                counter.add_metric([*key, reason], count)
        yield counter
    for name, attribute, text in (
        ("resource_abandoned", "abandoned", "Resources that ignored their cancellation."),
        ("resource_lost", "lost", "Resources that died while in use."),
    ):
        counter = CounterMetricFamily(name, text, labels=labels)
        for key, series in sorted(found.items()):
            counter.add_metric(list(key), getattr(series, attribute))
        yield counter
    pools = GaugeMetricFamily("resource_pool", "State of the pools.", labels=[*labels, "figure"])
    figures: Counter[tuple[str, str, str]] = Counter()
    for owner in held:
        for figure, value in pool_figures(owner).items():
            figures[(*owner.series.key, figure)] += value  # type: ignore[assignment]
    for (name, kind, figure), value in sorted(figures.items()):
        pools.add_metric([name, kind, figure], value)
    yield pools


def pool_figures(owner: Owner) -> Mapping[str, float]:
    """The figures of a held resource's pool; none if it has no pool."""
    resource = getattr(owner.opening, "resource", None)
    if resource is None or owner.released_at or owner.value is None:
        return {}
    return dict(resource.stats(owner.value) or {})
