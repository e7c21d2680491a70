"""A spec compiled once: the struct an event is projected to, and the loop that groups it.

An event is decoded straight into a small struct that names only the needed fields; everything else
in the document is skipped by the decoder. `normalise` reads its time and its conditions, `fold`
groups a batch. Both are written for the spec at hand as plain Python, because the loop over events
is what is left to make faster: no look-ups of names, no branches for what the spec does not use.
The source is put together from numbers and names made here; what a spec says is only ever bound.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

import sketches
from aggregation import (
    MAX_NAME_CHARS,
    Folded,
    Measure,
    Moment,
    Name,
    Number,
    State,
    Summary,
    deltas_of,
    judge,
    measure,
    micros,
    place,
    session_delta,
)
from specs import NUMERIC, Aggregation, Condition, PipelineSpec
from windows import BEGINNING, Window, Windows

NO_TIME: Final = BEGINNING  # the event takes the time of its arrival

GroupValue = (
    Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
    | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    | float
    | bool
    | None
)
CountedValue = str | int | float | bool | None


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


# --- the struct -------------------------------------------------------------------------------


@dataclass
class _Leaf:
    """A value that is read: what it is needed for, and where it stands."""

    path: str
    numeric: bool = False
    grouped: bool = False
    counted: bool = False  # its distinct values are
    optional: bool = True
    is_time: bool = False
    is_id: bool = False
    strict: bool = False  # built in: neither absent nor null
    conditions: list[Condition] = field(default_factory=list)
    place: str = ""  # the expression that reads it, once its node is at hand

    def type(self) -> Any:
        kind: Any
        strict = self.strict
        if self.is_id:
            kind = Name | int
        elif self.is_time:
            kind = Moment if strict else Moment | None
        elif self.numeric:
            kind = Number if strict else Number | None
        elif self.grouped:
            kind = Name if strict else GroupValue
        elif self.counted:
            kind = CountedValue
        else:
            kind = Any
        return kind | UnsetType if self.optional and kind is not Any else kind


class _Tree:
    """The paths of a spec as nested structs, and the code that walks down to them."""

    def __init__(self, leaves: dict[str, _Leaf]) -> None:
        self.steps: list[str] = []  # statements that fetch the inner nodes of `event`
        self.levels = 1
        self._numbers = iter(range(10_000))
        found = [(path.split("."), leaf) for path, leaf in leaves.items()]
        self.shape = self._node(found, "event", optional=False, root=True)

    def _node(
        self,
        found: list[tuple[list[str], _Leaf]],
        owner: str,
        *,
        optional: bool,
        root: bool = False,
    ) -> type[Struct]:
        fields: list[tuple[str, Any, Any]] = []
        rename: dict[str, str] = {}
        inner: dict[str, list[tuple[list[str], _Leaf]]] = {}
        for parts, leaf in found:
            if len(parts) > 1:
                inner.setdefault(parts[0], []).append((parts[1:], leaf))
                continue
            name = f"f{next(self._numbers)}"
            rename[name] = parts[0]
            default = UNSET if leaf.optional else msgspec.NODEFAULT
            fields.append((name, leaf.type(), default))
            leaf.place = f"{owner}.{name}"
            if optional:
                leaf.place = f"({owner}.{name} if {owner} else UNSET)"
        for key, below in inner.items():
            name = f"f{next(self._numbers)}"
            variable = f"n{name[1:]}"
            rename[name] = key
            lacking = all(leaf.optional for _, leaf in below)
            step = f"{variable} = {owner}.{name}"
            self.steps.append(f"{step} if {owner} else None" if optional else step)
            self.levels += not (lacking or optional)
            shape: Any = self._node(below, variable, optional=lacking or optional)
            if lacking:
                shape = shape | UnsetType | None
            fields.append((name, shape, UNSET if lacking else msgspec.NODEFAULT))
        if root:
            fields.append(("at", Any, NO_TIME))
            rename["at"] = "\u241fat"  # a document may hold it: it is set anew after decoding
        return msgspec.defstruct(
            "Event" if root else "Part",
            fields,
            rename=rename,
            kw_only=True,
            gc=False,
        )


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
        constants = constant if isinstance(constant, list) else [constant]
        return lambda value: value is not UNSET and any(_same(value, each) for each in constants)
    compare = _ORDER[cmp]
    kinds = (str,) if isinstance(constant, str) else (int, float)
    return lambda value: type(value) in kinds and compare(value, constant)


def plain_group(value: Any) -> Any:
    """A group's part that is no text: equal numbers are one group, true is not 1."""
    if type(value) is bool:
        return "true" if value else "false"
    return _plain(value) if type(value) is float else value


# --- compiling --------------------------------------------------------------------------------


@dataclass
class _Column:
    """A list of values that the loop collects, and what is made of it."""

    alias: str
    leaf: _Leaf
    measured: bool = False
    extremes: bool = False
    quantiles: bool = False
    distinct: bool = False
    counted: bool = False


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
    tree = _Tree(leaves)
    columns = _columns(spec, leaves)
    by_source = "source" in spec.group_by
    source_at = spec.group_by.index("source") if by_source else -1
    names: dict[str, Any] = {
        "UNSET": UNSET, "NO_TIME": NO_TIME, "micros": micros, "too_early": too_early,
        "plain_group": plain_group, "Folded": Folded, "deltas_of": deltas_of, "judge": judge,
        "place": place, "session_delta": session_delta, "summarise": _summariser(columns, window),
        "source_of": (lambda group: str(group[source_at])) if by_source else (lambda _: ""),
    }  # fmt: skip
    groups = [leaves[spec.select[alias]] for alias in spec.group_by]
    time = leaves.get(spec.event_time) if spec.event_time else None
    fold = _fold_source(window, tree, groups, columns, source_at, filters=bool(spec.where))
    normalise = _normalise_source(spec, tree, leaves, groups, time, names, strict=strict)
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


def _leaves(spec: PipelineSpec, *, strict: bool) -> dict[str, _Leaf]:
    leaves: dict[str, _Leaf] = {}

    def leaf(path: str) -> _Leaf:
        return leaves.setdefault(path, _Leaf(path, strict=strict))

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


def _columns(spec: PipelineSpec, leaves: dict[str, _Leaf]) -> list[_Column]:
    columns: dict[str, _Column] = {}
    for each in spec.aggregates:
        if each.field is None:
            continue
        column = columns.setdefault(
            each.field, _Column(each.field, leaves[spec.select[each.field]])
        )
        column.measured |= each.op in ("sum", "avg", "min", "max")
        column.extremes |= each.op in ("min", "max")
        column.quantiles |= each.op in ("p50", "p95", "p99")
        column.distinct |= each.op == "distinct"
        column.counted |= each.op == "count"
    return list(columns.values())


def _summariser(columns: Sequence[_Column], window: Window) -> Callable[[Any], Summary]:
    """What turns the lists of a bucket into sums; the first list has an entry per event."""
    numbered = window.kind == "sliding"

    def summarise(bucket: Sequence[list[Any]]) -> Summary:
        summary = Summary(len(bucket[0]), {})
        for column, entries in zip(columns, bucket[1:], strict=True):
            if column.counted:
                summary.counts[column.alias] = len(entries)
            if not entries:
                continue
            values = [value for _, value in entries] if _is_numbered(column, numbered) else entries
            if column.measured:
                summary.measures[column.alias] = measure(values, extremes=column.extremes)
            if column.quantiles:
                summary.samples[column.alias] = entries
            if column.distinct:
                summary.values[column.alias] = entries
        return summary

    def simply(bucket: Sequence[list[Any]]) -> Summary:
        return Summary(
            len(bucket[0]),
            {
                column.alias: measure(values, extremes=column.extremes)
                for column, values in zip(columns, bucket[1:], strict=True)
                if values
            },
        )

    plain = all(c.measured and not (c.quantiles or c.distinct or c.counted) for c in columns)
    return simply if plain else summarise


def _is_numbered(column: _Column, numbered: bool) -> bool:
    return numbered and (column.quantiles or column.distinct)


def _normalise_source(
    spec: PipelineSpec,
    tree: _Tree,
    leaves: dict[str, _Leaf],
    groups: list[_Leaf],
    time: _Leaf | None,
    names: dict[str, Any],
    *,
    strict: bool,
) -> str:
    code = ["def normalise(events, horizon):", "    filtered = 0", "    for event in events:"]
    code += [f"        {step}" for step in tree.steps]
    if time is None:
        code.append("        t = NO_TIME")
    else:
        code.append(f"        m = {time.place}")
        code += [
            "        if type(m) is float and 0.0 <= m <= 9e9:",
            "            t = int(m * 1000000.0 + 0.5)",
        ]
        if not strict:
            code += ["        elif m is UNSET or m is None:", "            t = NO_TIME"]
        code += ["        else:", "            t = micros(m)",
                 "        if t > horizon:", "            raise too_early()"]  # fmt: skip
    tests: list[str] = []
    for leaf in leaves.values():
        for condition in leaf.conditions:
            test = f"test{len(tests)}"
            names[test] = test_of(condition)
            tests.append(f"{test}({leaf.place})")
    if tests:
        code += [f"        if not ({' and '.join(tests)}):", "            event.at = None",
                 "            filtered += 1", "            continue"]  # fmt: skip
    if not strict:
        for leaf in groups:
            if leaf.optional:
                continue
            code += [f"        v = {leaf.place}", "        if type(v) is not str:",
                     f"            {leaf.place} = plain_group(v)"]  # fmt: skip
    code += ["        event.at = t", "    return filtered"]
    walk = [f"        {step}" for step in tree.steps]
    if spec.event_id:
        place_ = leaves[spec.event_id].place
        code += ["", "def ids(events):", "    found = []", "    for event in events:", *walk,
                 f"        found.append(str({place_}))", "    return found"]  # fmt: skip
    if "source" in spec.group_by:
        place_ = leaves[spec.select["source"]].place
        code += [
            "", "def sources(events):", "    found = []", "    for event in events:", *walk,
            f"        found.append(str(plain_group({place_})))", "    return found",
        ]  # fmt: skip
    return "\n".join(code)


def _fold_source(
    window: Window,
    tree: _Tree,
    groups: list[_Leaf],
    columns: list[_Column],
    source_at: int,
    *,
    filters: bool,
) -> str:
    by_source = source_at >= 0
    panes = bool(window.pane)
    values = [f"v{n}" for n in range(len(groups))]
    key = ", ".join(["i", *values]) + ("," if not values else "")
    group = ", ".join(values) + ("," if values else "")
    source = f"str(v{source_at})" if by_source else "''"
    code = ["def fold(events, windows):", "    late = {}", "    dropped = []"]
    numbered = window.kind == "sliding" and any(c.quantiles or c.distinct for c in columns)
    if window.kind == "session":
        code.append("    touched = {}")
    else:
        code += ["    rows = {}", "    data = {}", "    get = rows.get"]
    if not by_source and panes:
        code += [
            "    clock = windows.clock('')", "    latest = clock.latest",
            "    open_from = clock.open_from", "    next_close = clock.next_close",
        ]  # fmt: skip
    elif window.kind == "none":
        code += ["    clock = windows.clock('')", "    i = 0"]
    if numbered:
        code.append("    n = 0")
    code.append("    for event in events:")
    body = ["t = event.at"] if panes or filters or window.kind == "session" else []
    if filters:
        body += ["if t is None:", "    continue"]
    if numbered:
        body.append("n += 1")
    body += tree.steps
    body += [
        f"v{n} = {leaf.place}" + (f"\nif type(v{n}) is not str: v{n} = None if v{n} is UNSET "
                                  f"else plain_group(v{n})" if leaf.optional else "")
        for n, leaf in enumerate(groups)
    ]  # fmt: skip
    if window.kind == "session":
        body += [
            f"s = {source}", f"found = windows.session(({group}), s, t)", "if found is None:",
            "    dropped.append(event)", "    continue",
            "windows.advance(windows.clock(s), s, t)", "touched[id(found[1])] = found",
            "row = found[1].columns", "if row is None:",
            f"    row = found[1].columns = tuple([] for _ in range({len(columns) + 1}))",
            "row[0].append(None)",
        ]  # fmt: skip
        body += _appends(columns, window, lambda n: f"row[{n}].append")
    else:
        if panes:
            body.append(f"i = t // {window.pane}")
        body.append(f"key = ({key})")
        if by_source:
            body += [f"s = {source}", "clock = windows.clocks.get(s) or windows.clock(s)"]
        if panes:
            mine = "clock." if by_source else ""
            body.append(f"if i < {mine}open_from:")
            if not by_source:
                body.append("    clock.latest = latest")
            body += ["    key = judge(windows, clock, key, late)", "    if key is None:",
                     "        dropped.append(event)", "        continue"]  # fmt: skip
            if by_source:
                body += ["if t > clock.latest:", "    clock.latest = t",
                         "    if t >= clock.next_close:",
                         "        windows.passed(clock, s)"]  # fmt: skip
            else:
                body += ["if t > latest:", "    latest = t", "    if t >= next_close:",
                         "        clock.latest = t", "        windows.passed(clock, '')",
                         "        open_from = clock.open_from",
                         "        next_close = clock.next_close"]  # fmt: skip
        body += ["row = get(key)", "if row is None:"]
        if panes and not by_source:
            body.append("    clock.latest = latest")
        body += [
            f"    key = place(windows, key, {'s' if by_source else repr('')}, clock, late)",
            "    row = get(key)", "    if row is None:",
            f"        lists = data[key] = tuple([] for _ in range({len(columns) + 1}))",
            "        row = rows[key] = tuple(each.append for each in lists)",
        ]  # fmt: skip
        body.append(", ".join(f"a{n}" for n in range(len(columns) + 1)) + ", = row")
        body.append("a0(None)")
        body += _appends(columns, window, lambda n: f"a{n}")
    for statement in body:
        code += [f"        {line}" for line in statement.split("\n")]
    if window.kind == "session":
        code += _SESSION_END
    else:
        if panes and not by_source:
            code.append("    clock.latest = latest")
        code += ["    deltas = deltas_of(windows.window, data.items(), late, summarise, source_of)",
                 "    return Folded(deltas, sum(late.values()), dropped)"]  # fmt: skip
    return "\n".join(code)


def _appends(columns: list[_Column], window: Window, append: Callable[[int], str]) -> Iterable[str]:
    for number, column in enumerate(columns, 1):
        entry = "x"
        if window.kind == "sliding" and _is_numbered(column, True):
            entry = "(n, x)"
        leaf = column.leaf
        if leaf.optional or not (leaf.numeric and leaf.strict):
            yield f"x = {leaf.place}"
            yield f"if x is not None and x is not UNSET: {append(number)}({entry})"
        elif entry == "x":
            yield f"{append(number)}({leaf.place})"
        else:
            yield f"x = {leaf.place}"
            yield f"{append(number)}({entry})"


_SESSION_END: Final = [
    "    deltas = []",
    "    corrections = 0",
    "    for group, session in touched.values():",
    "        if session.columns is None:",
    "            continue",
    "        summary = summarise(session.columns)",
    "        deltas.append(session_delta(group, session, summary))",
    "        corrections += session.late",
    "        session.columns, session.late, session.stored = None, 0, [session.start]",
    "    return Folded(deltas, corrections, dropped)",
]
