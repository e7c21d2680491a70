"""Figures agree with a load that is known, on a clock that is turned by hand."""

from functools import partial

import pytest

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_throughput_is_that_of_the_last_minute() -> None:
    from measures import Meter

    clock = Clock()
    meter = Meter(clock)
    assert meter.per_second() == 0
    for _ in range(300):  # five minutes of 20 per second
        for _ in range(4):
            meter.count(5)
        clock.now += 1

    assert meter.total == 6_000
    assert meter.per_second() == pytest.approx(20, rel=0.02)
    clock.now += 30
    assert meter.per_second() == pytest.approx(10, rel=0.04)
    clock.now += 60
    assert meter.per_second() == 0


def test_throughput_of_a_young_scheduler_counts_from_its_start() -> None:
    from measures import Meter

    clock = Clock()
    meter = Meter(clock)
    for _ in range(10):
        meter.count(7)
        clock.now += 1

    assert meter.per_second() == pytest.approx(7)


def test_utilisation_is_busy_time_over_time_and_slots() -> None:
    from measures import Meter

    clock = Clock()
    meter = Meter(clock)
    busy = 0.0
    for second in range(200):  # three of four slots for 100 s, then one
        meter.sample(partial(float, busy))
        busy += 3 if second < 100 else 1
        clock.now += 1
        if second == 90:
            assert meter.utilisation(busy, 4) == pytest.approx(0.75)

    assert meter.utilisation(busy, 4) == pytest.approx(0.25)
    assert meter.utilisation(busy, 0) == 0
    assert Meter(clock).utilisation(0.0, 4) == 0


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([4, 1, 3, 2], 0.5, 2), (range(1, 101), 0.95, 95)],
)
def test_percentiles_are_values_that_were_seen(
    values: list[float], fraction: float, expected: float | None
) -> None:
    from measures import percentile

    assert percentile(values, fraction) == expected


def test_only_the_latest_waits_are_kept() -> None:
    from measures import WAITS, Meter

    meter = Meter()
    meter.waits.extend(float(n) for n in range(WAITS + 10))
    assert (len(meter.waits), meter.waits[0]) == (WAITS, 10.0)
