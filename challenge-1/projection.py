"""A spec compiled once: the struct an event is projected to, and the loop that groups it.

An event is decoded straight into a small struct (`shapes.py`) that names only the needed fields.
`normalise` reads its time and its conditions, `fold` groups a batch; both are loops written for the
spec at hand (`loops.py`).
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from msgspec import UNSET, Struct

import sketches
from aggregation import (
    Folded,
    Measure,
    State,
    bucket,
    deltas_of,
    judge,
    micros,
    sessions_folded,
)
from loops import Column, fold_source, normalise_source, summariser
from shapes import NO_TIME, Leaf, Tree
from specs import NUMERIC, Aggregation, Condition, PipelineSpec
from windows import Window, Windows


class FromTheFuture(ValueError):
    """An event time is further ahead than is believed."""


def too_early() -> FromTheFuture:
    """The sentence for an event that comes from the future."""
    return FromTheFuture(
        "The event's time is further in the future than MAX_FUTURE_SECONDS: is its clock right?"
    )


@dataclass(frozen=True)
class Projection:
    """One pipeline at work.

    `normalise(events, horizon)` sets `at` of each event (None: filtered out) and returns how many
    were filtered; it raises ValueError for what the struct's types cannot say, FromTheFuture for a
    time beyond the horizon. `fold` groups normalised events, in the order of the log.
    """

    name: str
    spec: PipelineSpec | None  # None: built in, and more than a spec can say
    shape: type[Struct]
    aliases: tuple[str, ...]  # names of the group's parts
    window: Window
    aggregates: tuple[Aggregation, ...]
    normalise: Callable[[Iterable[Any], int], int]
    fold: Callable[[Iterable[Any], Windows], Folded]
    ids: Callable[[Iterable[Any]], list[str]] | None = None
    sources: Callable[[Iterable[Any]], list[str]] | None = None  # None: all events of one source
    may_lack_time: bool = False
    levels: int = 1  # objects that every valid event opens
    strict: bool = False  # built in: absent and null are refused
    built_in: bool = False

    @cached_property
    def text(self) -> str | None:
        """The spec as it stands in the log."""
        return self.spec.canonical() if self.spec else None

    def arrived(self, events: Iterable[Any], arrival: int) -> None:
        """Give events without a time of their own that of their arrival, in microseconds."""
        if self.may_lack_time:
            for event in events:
                if event.at == NO_TIME:
                    event.at = arrival

    def values(self, count: int, state: State) -> dict[str, float | int | None]:
        """The `values` of an aggregate, as `count`, `sum_<field>`, `avg_<field>`, …"""
        if not self.aggregates:
            return _member_values(count, state)
        return {each.label: _value(each, count, state) for each in self.aggregates}


def _value(aggregation: Aggregation, count: int, state: State) -> float | int | None:
    op, name = aggregation.op, aggregation.field
    if name is None:
        return count
    if op == "count":
        return state.counts.get(name, 0)
    if op == "distinct":
        return sketches.distinct(state.distinct.get(name, b""))
    if op in ("p50", "p95", "p99"):
        quantiles = state.quantiles.get(name)
        found = None if quantiles is None else quantiles.at(int(op[1:]) / 100)
        return None if found is None else _plain(found)
    measured = state.measures.get(name)
    return None if measured is None else _measured(op, measured)


def _measured(op: str, measured: Measure) -> float | int:
    total = measured.total + measured.rest
    return _plain(
        {
            "sum": total,
            "avg": total / measured.count,
            "min": measured.least,
            "max": measured.greatest,
        }[op]
    )


def _member_values(count: int, state: State) -> dict[str, float | int | None]:
    values: dict[str, float | int | None] = {"count": count}
    for name in sorted(state.measures):
        for op in ("sum", "avg", "min", "max"):
            values[f"{op}_{name}"] = _measured(op, state.measures[name])
    return values


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


# --- conditions -------------------------------------------------------------------------------

_ORDER: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _same(value: Any, constant: Any) -> bool:
    """Equal as JSON sees it: true is not 1."""
    if isinstance(value, bool) or isinstance(constant, bool):
        return value is constant
    return bool(value == constant)


def _one_of(constants: list[Any]) -> Callable[[Any], bool]:
    truths = {each for each in constants if isinstance(each, bool)}
    others = {each for each in constants if not isinstance(each, bool)}

    def test(value: Any) -> bool:
        try:
            return value in (truths if isinstance(value, bool) else others)
        except TypeError:  # an array or an object, which equals none of them
            return False

    return test


def test_of(condition: Condition) -> Callable[[Any], bool]:
    """The condition as a function of the value; absent and null are less than nothing."""
    cmp, constant = condition.cmp, condition.value
    if cmp == "exists":
        return lambda value: (value is not UNSET and value is not None) is constant
    if cmp == "eq":
        return lambda value: value is not UNSET and _same(value, constant)
    if cmp == "ne":
        return lambda value: value is UNSET or not _same(value, constant)
    if cmp == "in":
        return _one_of(constant if isinstance(constant, list) else [constant])
    compare = _ORDER[cmp]
    kinds = (str,) if isinstance(constant, str) else (int, float)
    return lambda value: type(value) in kinds and compare(value, constant)


def plain_group(value: Any) -> Any:
    """A group's part that is no text: equal numbers are one group, true is not 1."""
    if type(value) is bool:
        return "true" if value else "false"
    return _plain(value) if type(value) is float else value


# --- compiling --------------------------------------------------------------------------------


def compile_spec(
    name: str,
    spec: PipelineSpec,
    *,
    window: Window | None = None,
    strict: bool = False,
) -> Projection:
    """Compile a spec; raises SketchesMissing when it needs a package that is not installed.

    `strict` is for the built-in pipelines: group parts are texts, numbers neither absent nor null.
    """
    if any(each.op in ("p50", "p95", "p99", "distinct") for each in spec.aggregates):
        sketches.require()
    window = window or spec.window.window()
    leaves = _leaves(spec, strict=strict)
    tree = Tree(leaves)
    columns = _columns(spec, leaves)
    source_at = spec.group_by.index("source") if "source" in spec.group_by else None
    names: dict[str, Any] = {
        "UNSET": UNSET, "NO_TIME": NO_TIME, "micros": micros, "too_early": too_early,
        "plain_group": plain_group, "Folded": Folded, "deltas_of": deltas_of, "judge": judge,
        "bucket": bucket, "sessions_folded": sessions_folded,
        "summarise": summariser(columns, window),
        "source_of": (lambda _: "") if source_at is None else (lambda g: str(g[source_at])),
    }  # fmt: skip
    groups = [leaves[spec.select[alias]] for alias in spec.group_by]
    time = leaves.get(spec.event_time) if spec.event_time else None
    fold = fold_source(window, tree, groups, columns, source_at, filters=bool(spec.where))
    normalise = normalise_source(spec, tree, leaves, groups, time, names, test_of, strict=strict)
    exec(compile(f"{normalise}\n\n{fold}", f"<pipeline {name}>", "exec"), names)  # noqa: S102
    return Projection(
        name=name,
        spec=spec,
        shape=tree.shape,
        aliases=tuple(spec.group_by),
        window=window,
        aggregates=tuple(spec.aggregates),
        normalise=names["normalise"],
        fold=names["fold"],
        ids=names.get("ids"),
        sources=names.get("sources"),
        may_lack_time=window.kind != "none" and not (strict and time is not None),
        levels=tree.levels,
        strict=strict,
        built_in=strict,
    )


def _leaves(spec: PipelineSpec, *, strict: bool) -> dict[str, Leaf]:
    leaves: dict[str, Leaf] = {}

    def leaf(path: str) -> Leaf:
        return leaves.setdefault(path, Leaf(path, strict=strict))

    maybe = {c.field for c in spec.where if c.cmp == "exists"}
    for alias in spec.group_by:
        each = leaf(spec.select[alias])
        each.grouped = True
        each.optional &= alias in maybe
    for wanted in spec.aggregates:
        if wanted.field is None:
            continue
        each = leaf(spec.select[wanted.field])
        each.numeric |= wanted.op in NUMERIC
        each.counted |= wanted.op == "distinct"
        if wanted.op != "count":
            each.optional &= wanted.field in maybe
    for condition in spec.where:
        leaf(spec.select[condition.field]).conditions.append(condition)
    if spec.event_time:
        each = leaf(spec.event_time)
        each.is_time, each.optional = True, not strict
    if spec.event_id:
        each = leaf(spec.event_id)
        each.is_id, each.optional = True, False
    return leaves


def _columns(spec: PipelineSpec, leaves: dict[str, Leaf]) -> list[Column]:
    columns: dict[str, Column] = {}
    for each in spec.aggregates:
        if each.field is None:
            continue
        column = columns.setdefault(each.field, Column(each.field, leaves[spec.select[each.field]]))
        column.measured |= each.op in ("sum", "avg", "min", "max")
        column.extremes |= each.op in ("min", "max")
        column.quantiles |= each.op in ("p50", "p95", "p99")
        column.distinct |= each.op == "distinct"
        column.counted |= each.op == "count"
    return list(columns.values())
