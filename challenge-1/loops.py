"""The loops over events, written for the pipeline at hand as plain Python.

What is left to make faster, once decoding is one call per block, is the loop that groups: no
look-ups of names, no branches for what the spec does not use, nothing computed anew while events
stay in the pane of their neighbour. The source is put together from numbers and names made here;
what a spec says is only ever bound.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aggregation import Summary, measure
from shapes import Leaf, Tree
from specs import PipelineSpec
from windows import Window


@dataclass
class Column:
    """A list of values that the loop collects, and what is made of it."""

    alias: str
    leaf: Leaf
    measured: bool = False
    extremes: bool = False
    quantiles: bool = False
    distinct: bool = False
    counted: bool = False

    @property
    def ordered(self) -> bool:
        """Whether its values go to a sketch, in the order of the log."""
        return self.quantiles or self.distinct

    @property
    def always(self) -> bool:
        """Whether every event has a value here."""
        return self.leaf.numeric and self.leaf.strict


def summariser(columns: Sequence[Column], window: Window) -> Callable[[Any], Summary]:
    """What turns a bucket into sums: `append` methods of the lists of its columns.

    Where no column has a value of every event, the last list has an entry for each.
    """
    numbered = window.kind == "sliding"
    counter = counter_of(columns)

    def summarise(bucket: Sequence[Any]) -> Summary:
        lists = [append.__self__ for append in bucket]
        summary = Summary(len(lists[counter]), {})
        for column, entries in zip(columns, lists, strict=False):
            if column.counted:
                summary.counts[column.alias] = len(entries)
            if not entries:
                continue
            values = entries
            if numbered and column.ordered:
                values = [value for _, value in entries]
            if column.measured:
                summary.measures[column.alias] = measure(values, extremes=column.extremes)
            if column.quantiles:
                summary.samples[column.alias] = entries
            if column.distinct:
                summary.values[column.alias] = entries
        return summary

    return summarise


def counter_of(columns: Sequence[Column]) -> int:
    """Which list of a bucket has an entry for every event."""
    return next((n for n, column in enumerate(columns) if column.always), len(columns))


def fold_source(
    window: Window,
    tree: Tree,
    groups: Sequence[Leaf],
    columns: Sequence[Column],
    source_at: int | None,
    *,
    filters: bool,
) -> str:
    """`fold(events, windows)`: group normalised events, in the order of the log."""
    loop = _Loop(window, tree, groups, columns, source_at, filters=filters)
    return "\n".join(loop.sessions() if window.kind == "session" else loop.panes())


class _Loop:
    """The parts that the loops have in common."""

    def __init__(
        self,
        window: Window,
        tree: Tree,
        groups: Sequence[Leaf],
        columns: Sequence[Column],
        source_at: int | None,
        *,
        filters: bool,
    ) -> None:
        self.window = window
        self.columns = columns
        self.filters = filters
        self.numbered = window.kind == "sliding" and any(each.ordered for each in columns)
        self.lists = len(columns) + (counter_of(columns) == len(columns))
        values = [f"v{n}" for n in range(len(groups))]
        self.key = values[0] if len(values) == 1 else f"({', '.join(values)})"
        self.group = f"({', '.join(values)}{',' if len(values) == 1 else ''})"
        self.source = "''" if source_at is None else f"str(v{source_at})"
        self.by_source = source_at is not None
        self.reads = [*tree.steps]
        for n, leaf in enumerate(groups):
            self.reads.append(f"v{n} = {leaf.place}")
            if leaf.optional:
                self.reads.append(
                    f"v{n} = None if v{n} is UNSET or v{n} is None else plain_group(v{n})"
                )

    def begin(self) -> list[str]:
        code = ["t = event.at"]
        if self.filters:
            code += ["if t is None:", "    continue"]
        if self.numbered:
            code.append("n += 1")
        return code

    def appends(self, append: Callable[[int], str]) -> Iterator[str]:
        for number, column in enumerate(self.columns):
            place = column.leaf.place
            ordered = self.window.kind == "sliding" and column.ordered
            if column.always:
                yield f"{append(number)}({f'(n, {place})' if ordered else place})"
            else:
                yield f"x = {place}"
                entry = "(n, x)" if ordered else "x"
                yield f"if x is not None and x is not UNSET: {append(number)}({entry})"
        if self.lists > len(self.columns):
            yield f"{append(len(self.columns))}(None)"

    def panes(self) -> list[str]:
        """Tumbling and sliding windows, and none: buckets by pane, then by group.

        `rows` are those of the pane from `low` to `high`, which is open; other events take the long
        way, which finds the pane and asks whether it has closed windows.
        """
        windowed, pane = bool(self.window.pane), self.window.pane
        code = ["def fold(events, windows):", "    late = {}", "    dropped = []", "    data = {}"]
        if self.numbered:
            code.append("    n = 0")
        if not self.by_source:
            code += ["    clock = windows.clock('')", "    latest = clock.latest",
                     "    next_close = clock.next_close"]  # fmt: skip
        if windowed:
            code.append("    low = high = 0")
            code += [] if self.by_source else ["    last = None"]
        else:
            code += ["    i = 0", "    rows = data.setdefault(0, {})"]
        body = [*self.begin(), *self.reads]
        if self.by_source:
            body += [f"s = {self.source}", "clock = windows.clocks.get(s) or windows.clock(s)"]
        if windowed and self.by_source:
            body += [*self._find_pane(pane), *self._advance()]
        elif windowed:  # an event of the same moment as its neighbour goes where that went
            inner = [*self._find_pane(pane), *self._advance()]
            body += ["if t is not last:", "    last = t", *(f"    {line}" for line in inner)]
        body += [
            "try:",
            f"    row = rows[{self.key}]",
            "except KeyError:",
            *(["    clock.latest = latest"] if windowed and not self.by_source else []),
            f"    row = bucket(windows, data, i, {self.key}, "
            f"{'s' if self.by_source else repr('')}, clock, late, {self.lists})",
            f"{', '.join(f'a{n}' for n in range(self.lists))}, = row",
            *self.appends(lambda n: f"a{n}"),
        ]
        code += ["    for event in events:", *(f"        {line}" for line in body)]
        if windowed and not self.by_source:
            code.append("    clock.latest = latest")
        return [
            *code,
            "    deltas = deltas_of(windows.window, data, late, summarise, source_of)",
            "    return Folded(deltas, sum(late.values()), dropped)",
        ]

    def _find_pane(self, pane: int) -> list[str]:
        closed = " or i < clock.open_from" if self.by_source else ""
        again = "" if self.by_source else "; last = None"
        return [
            f"if t < low or t >= high{closed}:",
            f"    i = t // {pane}",
            "    if i < clock.open_from:",
            *([] if self.by_source else ["        clock.latest = latest"]),
            f"        i = judge(windows, clock, i, {self.key}, late)",
            "        if i is None:",
            f"            low = high = i = 0{again}",
            "            dropped.append(event)",
            "            continue",
            f"        low = high = 0{again}",
            "    else:",
            f"        low = i * {pane}",
            f"        high = low + {pane}",
            "    rows = data.setdefault(i, {})",
        ]

    def _advance(self) -> list[str]:
        if self.by_source:
            return [
                "if t > clock.latest:", "    clock.latest = t", "    if t >= clock.next_close:",
                "        windows.passed(clock, s)",
            ]  # fmt: skip
        return [
            "if t > latest:", "    latest = t", "    if t >= next_close:",
            "        clock.latest = t", "        windows.passed(clock, '')",
            "        next_close = clock.next_close",
            "        if type(i) is int and i < clock.open_from: low = high = 0; last = None",
        ]  # fmt: skip

    def sessions(self) -> list[str]:
        """Sessions: each event finds, grows or joins its own."""
        body = [
            *self.begin(),
            *self.reads,
            f"s = {self.source}",
            f"found = windows.session({self.group}, s, t)",
            "if found is None:",
            "    dropped.append(event)",
            "    continue",
            "windows.advance(windows.clock(s), s, t)",
            "touched[id(found[1])] = found",
            "row = found[1].columns",
            "if row is None:",
            f"    row = found[1].columns = tuple([] for _ in range({self.lists}))",
            *self.appends(lambda n: f"row[{n}].append"),
        ]
        return [
            "def fold(events, windows):",
            "    dropped = []",
            "    touched = {}",
            "    for event in events:",
            *(f"        {line}" for line in body),
            "    return sessions_folded(touched.values(), dropped, summarise)",
        ]


def normalise_source(
    spec: PipelineSpec,
    tree: Tree,
    leaves: dict[str, Leaf],
    groups: list[Leaf],
    time: Leaf | None,
    names: dict[str, Any],
    test_of: Callable[[Any], Callable[[Any], bool]],
    *,
    strict: bool,
) -> str:
    """`normalise(events, horizon)`, and where there are such `ids` and `sources`."""
    code = ["def normalise(events, horizon):", "    filtered = 0", "    for event in events:"]
    code += [f"        {step}" for step in tree.steps]
    if time is None:
        code.append("        t = NO_TIME")
    else:
        code[2:2] = ["    last, t = NO_TIME, NO_TIME"]
        code += [
            f"        m = {time.place}",
            "        if m != last:",  # neighbours are often of the same second
            "            if type(m) is int and 0 <= m <= 9000000000:",
            "                t = m * 1000000",
            "            elif type(m) is float and 0.0 <= m <= 9e9:",
            "                t = int(m * 1000000.0 + 0.5)",
        ]
        if not strict:
            code += ["            elif m is UNSET or m is None:", "                t = NO_TIME"]
        code += ["            else:", "                t = micros(m)",
                 "            if t > horizon:", "                raise too_early()",
                 "            last = m"]  # fmt: skip
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
