"""Percentiles and distinct counts: bounded, right within what is stated, the same at any speed."""

import bisect
import random
from collections.abc import Callable

import pytest

from sketches import (
    BLOCK,
    Quantiles,
    SketchesMissing,
    count_distinct,
    distinct,
    join_distinct,
    require,
)

pytestmark = pytest.mark.unit

SHAPES: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda chance: chance.random(),
    "log-normal": lambda chance: chance.lognormvariate(0, 2),
    "pareto": lambda chance: chance.paretovariate(1.1),
    "few": lambda chance: float(chance.randrange(5)),
    "two humps": lambda chance: chance.gauss(chance.choice([0, 1000]), 1),
}
RANK_ERROR = {0.5: 0.01, 0.95: 0.005, 0.99: 0.002}


def fed(values: list[float], seed: int) -> Quantiles:
    chance, quantiles, at = random.Random(seed), Quantiles(), 0
    while at < len(values):
        size = chance.choice([1, 10, BLOCK, 3000])
        quantiles.add(values[at : at + size])
        at += size
    return quantiles


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_percentiles_are_right_within_the_stated_rank(shape: str, ordered: bool) -> None:
    chance = random.Random(1)
    values = [SHAPES[shape](chance) for _ in range(50_000)]
    if ordered:
        values.sort()
    quantiles = fed(values, 1)
    values.sort()

    for share, error in RANK_ERROR.items():
        found = quantiles.at(share)
        assert found is not None
        low, high = bisect.bisect_left(values, found), bisect.bisect_right(values, found)
        assert low / len(values) - error <= share <= high / len(values) + error
    assert len(quantiles.digest) <= 8600
    assert len(quantiles.pending) < BLOCK


def test_the_batches_make_no_difference() -> None:
    chance = random.Random(2)
    values = [chance.gauss(0, 1) for _ in range(5000)]

    one, two = fed(values, 1), fed(values, 2)

    assert (one.digest, one.pending) == (two.digest, two.pending)


def test_few_values_are_exact() -> None:
    quantiles = Quantiles()
    assert quantiles.at(0.5) is None
    quantiles.add([7.0])
    assert quantiles.at(0.99) == 7
    quantiles.add([1.0, 3.0, 5.0])
    assert quantiles.at(0.5) == 4


def test_joined_sketches_hold_the_values_of_both() -> None:
    one, two = (
        fed([float(n) for n in range(1000)], 1),
        fed([float(n) for n in range(1000, 2000)], 2),
    )
    one.join(two)

    assert one.at(0.5) == pytest.approx(1000, abs=20)
    assert distinct(
        join_distinct(count_distinct(b"", range(1000)), count_distinct(b"", range(500, 1500)))
    ) == pytest.approx(1500, rel=0.05)


@pytest.mark.parametrize("count", [0, 1, 100, 1000, 30_000])
def test_distinct_counts_are_right_within_five_percent(count: int) -> None:
    sketch = b""
    for start in range(0, count, 700):
        sketch = count_distinct(sketch, (f"v{n}" for n in range(start, min(start + 700, count))))
        sketch = count_distinct(sketch, [f"v{start}"])

    assert distinct(sketch) == pytest.approx(count, rel=0.05)
    assert len(sketch) <= 4200


def test_values_of_different_kinds_are_different() -> None:
    assert distinct(count_distinct(b"", ["1", 1, True, 2.5, "true", 1])) == 5


def test_without_the_package_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketches", None)

    with pytest.raises(SketchesMissing, match="package datasketches"):
        require()
