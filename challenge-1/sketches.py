"""Percentiles and distinct counts in bounded size, whatever they are fed.

A percentile is exact up to 256 values; beyond, a t-digest of at most about 8.5 KB is right within
1 % of rank at p50, 0.5 % at p95 and 0.2 % at p99 (measured in the tests, over several shapes). A
distinct count is a HyperLogLog of 4 KB with a standard error of 1.6 %. Both are of `datasketches`.

A t-digest depends on when it is compressed, so it is fed in blocks of exactly 256 values in the
order of the log: the same events give the same answer, however they were batched.
"""

import importlib
from collections.abc import Iterable
from typing import Any, Final

from msgspec import Struct

BLOCK: Final = 256  # values kept as they are until a digest takes them
COMPRESSION: Final = 400
LOG_REGISTERS: Final = 12


class SketchesMissing(RuntimeError):
    """The package datasketches is needed and not installed."""


def _library() -> Any:
    try:
        return importlib.import_module("datasketches")
    except ImportError:
        raise SketchesMissing(
            "Percentiles and distinct counts need the package datasketches, which is not "
            "installed: pip install -r requirements.txt. The other aggregates work without it."
        ) from None


def require() -> None:
    """Raise SketchesMissing unless sketches can be used."""
    _library()


class Quantiles(Struct, array_like=True):
    """The distribution of a field: a digest of whole blocks, and the values after them."""

    digest: bytes = b""
    pending: list[float] = []

    def add(self, values: Iterable[float]) -> None:
        """Take more values, in the order of the log."""
        self.pending = pending = [*self.pending, *values]
        if len(pending) < BLOCK:
            return
        kind = _library().tdigest_double
        whole = len(pending) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            digest = kind.deserialize(self.digest) if self.digest else kind(COMPRESSION)
            for value in pending[start : start + BLOCK]:
                digest.update(value)
            self.digest = digest.serialize()
        self.pending = pending[whole:]

    def join(self, more: "Quantiles") -> None:
        """Take over another's values (of a session that turned out to be the same one)."""
        if more.digest:
            kind = _library().tdigest_double
            digest = kind.deserialize(self.digest) if self.digest else kind(COMPRESSION)
            digest.merge(kind.deserialize(more.digest))
            self.digest = digest.serialize()
        self.add(more.pending)

    def at(self, share: float) -> float | None:
        """The value below which that share lies; None when there are no values."""
        if not self.digest:
            if not self.pending:
                return None
            ordered = sorted(self.pending)
            place = share * (len(ordered) - 1)
            below = int(place)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
        digest = _library().tdigest_double.deserialize(self.digest)
        for value in self.pending:
            digest.update(value)
        found: float = digest.get_quantile(share)
        return found


def count_distinct(sketch: bytes, values: Iterable[Any]) -> bytes:
    """A sketch that has seen these values as well, in this order."""
    kind = _library().hll_sketch
    found = kind.deserialize(sketch) if sketch else kind(LOG_REGISTERS)
    for value in values:
        found.update(value if type(value) is str else f"\0{value!r}")
    result: bytes = found.serialize_compact()
    return result


def join_distinct(one: bytes, two: bytes) -> bytes:
    """A sketch of the values of both."""
    library = _library()
    union = library.hll_union(LOG_REGISTERS)
    for sketch in (one, two):
        if sketch:
            union.update(library.hll_sketch.deserialize(sketch))
    result: bytes = union.get_result().serialize_compact()
    return result


def distinct(sketch: bytes) -> int:
    """How many different values a sketch has seen, about."""
    return round(_library().hll_sketch.deserialize(sketch).get_estimate()) if sketch else 0
