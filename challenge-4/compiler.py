"""The executor: a plan's operations become ONE generator function, written for their shape.

    LazyCollection(rows).filter(lambda r: r["n"] > 5).map(double)     runs as

    def chain(run, a0, a1, a2):
        try:
            source = run.begin()
            for v in source:
                if not (v[a0] > a1):
                    continue
                v = a2(v)
                yield v
        except Exception as error: …                      # adds which operation, which element
        finally:
            run.end()

Constants are parameters, so that plans of the same shape share the code. `collect` runs a variant
that appends `v` to a list where this one yields it. Operations that need whole groups of elements
(batch, window, sort, zip, …) start a new segment that reads the one before. Everything here is
iterative, and many segments take turns (`relaying.py`): thousands of operations are no problem.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count as counting
from itertools import islice
from typing import Any, NamedTuple

from expressions import GUARD
from grouping import ASKING, GROUPINGS
from inlining import face_of, is_on
from metering import Meter
from notes import blame
from relaying import END, NEED, Stage, relay
from sources import EVERYTHING, LazyError, Op, Source
from writing import write_chain

MAX_SHAPES = 256  # generated functions kept
MAX_LOOPS = 8  # Python nests 20 blocks at most
MAX_REPLACED_LOOPS = 12  # that one `catch(replace=…)` covers: it needs all in one function
MAX_SEGMENT_OPS = 1000
MAX_NESTED = 60  # segments that read one another; more take turns


class TooManyKeysError(LazyError):
    """More different keys came than `distinct(max_keys=…)` may keep in memory."""


Segment = tuple[list[Op], list[int]]  # operations that run in one loop, and their numbers
Chain = Callable[..., Any]  # a generator function, or one that fills a list
HEADS = frozenset({"batch", *GROUPINGS})
_CALLING = frozenset({"map", "filter", "flat_map", "take_while", "skip_while", "keyed"})
_FAILING = _CALLING | {"distinct", "tap", "scan", "reduce", "row"}


class _Missing:
    """An argument that was not given; it stays itself in copies and pickles."""

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()


# --- from operations to segments --------------------------------------------------------------


class Prepared(NamedTuple):
    """A plan as it runs: what the source does itself, and the operations left, numbered from 1."""

    source: Source
    window: range
    ops: list[Op]
    numbers: list[int]
    merged: list[str]


def prepare(source: Source, ops: tuple[Op, ...]) -> Prepared:
    """Make the rewrites that change nothing: merge neighbours, let the source skip and take."""
    window = EVERYTHING
    rest: list[Op] = []
    numbers: list[int] = []
    merged: list[str] = []
    caught = False
    for number, op in zip(source.numbers or counting(1), ops, strict=False):
        name = op[0]
        if name in ("take", "skip", "slice"):
            if name == "slice" and (op[1] < 0 or (op[2] or 0) < 0):
                return prepare(source, tuple(_from_the_end(source, ops)))
            for part in _parts(op):
                name, value = part
                if name == "take" and value == 0:  # nothing before it has to run at all
                    source, window, rest, numbers = Source(()), EVERYTHING, [], []
                elif not rest and len(narrowed := _narrow(window, name, value)):
                    window = narrowed
                elif rest and rest[-1][0] == name and name in ("take", "skip"):
                    both = (rest[-1][1], value)
                    rest[-1] = (name, min(both) if name == "take" else sum(both))
                    merged.append(f"{numbers[-1]} and {number}: {name}({rest[-1][1]})")
                else:
                    rest.append(part)
                    numbers.append(number)
        else:
            caught = caught or name == "catch"
            rest.append(op)
            numbers.append(number)
    if caught:
        rest, numbers = _spread_catches(rest, numbers)
    return Prepared(source, window, rest, numbers, merged)


def _spread_catches(ops: list[Op], numbers: list[int]) -> Segment:
    """Let a catch that follows a group cover the segments before the group as well.

    What fails there is left out, or replaced, before it is grouped: each of these segments ends
    with a copy of the catch, which explain(analyze=True) does not count. One that leaves out is
    also copied wherever it covers more loops than a segment may have.
    """
    spread: list[tuple[Op, int]] = []
    catch: tuple[Op, int] | None = None  # the one that what comes before is covered by
    loops = 0
    for position in range(len(ops) - 1, -1, -1):
        op, number = ops[position], numbers[position]
        if op[0] == "flat_map" and catch is not None and catch[0][2] is MISSING:
            loops += 1
            if loops > MAX_LOOPS:
                spread.append(catch)
                loops = 1
        spread.append((op, number))
        if op[0] == "catch":
            catch, loops = ((*op, "copy"), number), 0
        elif op[0] in HEADS:
            loops = 0
            if catch is not None and _may_fail(ops, position):
                spread.append(catch)
    spread.reverse()
    return [op for op, _ in spread], [number for _, number in spread]


def _may_fail(ops: list[Op], end: int) -> bool:
    """Whether the segment that ends here has an operation that is not covered yet."""
    for name, *_ in reversed(ops[:end]):
        if name in HEADS or name == "catch":
            return False
        if name in _FAILING:
            return True
    return False


def _parts(op: Op) -> list[tuple[str, int]]:
    if op[0] != "slice":
        return [(op[0], op[1])] if op[0] == "take" or op[1] else []
    _, start, stop, step = op
    parts = [("skip", start)] if start else []
    if step > 1:
        parts.append(("stride", step))
    if stop is not None:
        parts.append(("take", len(range(start, stop, step))))
    return parts


def _narrow(window: range, name: str, value: int) -> range:
    """The window after one more step; its stop is where reading ends, not just the last element."""
    value = min(value, sys.maxsize)
    if name in ("skip", "stride"):
        chosen = window[value:] if name == "skip" else window[::value]
        # Slicing a range rounds its stop up to a whole step, which may be one element more.
        return range(chosen.start, min(chosen.stop, window.stop), chosen.step)
    if len(window) < value:
        return window
    return range(window.start, window[value - 1] + 1, window.step)


def _from_the_end(source: Source, ops: tuple[Op, ...]) -> Iterator[Op]:
    """Turn slices that count from the end into ones that do not."""
    size = source.size() or 0
    for op in ops:
        if op[0] == "slice":
            chosen = range(size)[op[1] : op[2] : op[3]]
            if (op[1] or 0) < 0 or (op[2] or 0) < 0:
                op = ("slice", chosen.start, max(chosen.start, chosen.stop), chosen.step)
            size = len(chosen)
        elif op[0] in ("take", "skip"):
            size = min(size, op[1]) if op[0] == "take" else max(0, size - op[1])
        yield op


def segments(ops: list[Op], numbers: list[int]) -> Iterator[Segment]:
    """Cut the operations where a generator of its own has to start; the first may be empty."""
    if len(ops) <= MAX_LOOPS and HEADS.isdisjoint([op[0] for op in ops]):
        yield ops, numbers
        return
    catches = _covering(ops)
    covered_loops = Counter(c for op, c in zip(ops, catches, strict=True) if op[0] == "flat_map")
    start = loops = 0
    for position, (name, *_) in enumerate(ops):
        catch = catches[position]
        alone = catch is None
        if name in HEADS or (position > start and _is_copy(ops[position - 1])):
            cut = True
        elif position > start and (alone or catch != catches[position - 1]):
            # Here nothing is separated from the catch that covers it.
            more = int(name == "flat_map") if alone else covered_loops[catch]
            cut = loops + more > MAX_LOOPS or position - start >= MAX_SEGMENT_OPS
        else:
            cut = False
        if cut:
            yield ops[start:position], numbers[start:position]
            start, loops = position, 0
        loops += name == "flat_map"
    yield ops[start:], numbers[start:]


def _covering(ops: list[Op]) -> list[int | None]:
    """For each operation the position of the catch that covers it in its own segment."""
    found: list[int | None] = []
    following: int | None = None
    for position in range(len(ops) - 1, -1, -1):
        if ops[position][0] == "catch":
            following = position
        found.append(following)
        if ops[position][0] in HEADS:
            following = None
    return found[::-1]


def replaced_loops(ops: tuple[Op, ...]) -> int:
    """The most flat_maps in one segment that a catch at the end would cover."""
    most = loops = 0
    for name, *_ in reversed(ops):
        if name == "catch":
            break
        loops = 0 if name in HEADS else loops + (name == "flat_map")
        most = max(most, loops)
    return most


def _is_copy(op: Op) -> bool:
    return len(op) == 4 and bool(op[0] == "catch")


# --- running ----------------------------------------------------------------------------------


class Run:
    """One iteration over one segment: what it reads, what it has open, who is to blame.

    A segment that asks for its elements has neither a source nor a segment before it to close.
    """

    __slots__ = ("numbers", "opened", "ops", "source", "upstream", "window")

    def __init__(
        self, source: Source, window: range, upstream: Any, ops: list[Op], numbers: list[int]
    ) -> None:
        self.source = source
        self.window = window
        self.upstream = upstream
        self.ops = ops
        self.numbers = numbers
        self.opened: list[Any] = []

    def begin(self) -> Iterator[Any]:
        """Open the source, or the segment before."""
        if self.upstream is None:
            return self.source.iterate(self.window, self.opened)
        iterator: Iterator[Any] = iter(self.upstream)
        return iterator

    def end(self) -> None:
        """Close it, whatever has happened."""
        if self.upstream is not None:
            self.upstream.close()
        elif self.opened:
            self.source.release(self.opened)


def iterate(source: Source, ops: tuple[Op, ...], meter: Meter | None = None) -> Iterator[Any]:
    """Run a plan. Nothing is opened before the first element is asked for."""
    if source.is_late:
        return _iterate_late(source, ops, meter)
    return Execution(prepare(source, ops), meter).stream()


def _iterate_late(source: Source, ops: tuple[Op, ...], meter: Meter | None) -> Iterator[Any]:
    pushed, left = source.push(ops)
    yield from iterate_pushed(pushed, left, meter)


def iterate_pushed(
    pushed: Source, left: tuple[Op, ...], meter: Meter | None = None
) -> Iterator[Any]:
    """Run what a source has left over, then close the source."""
    try:
        yield from Execution(prepare(pushed, left), meter).stream()
    finally:
        pushed.close()


def gather(source: Source, ops: tuple[Op, ...]) -> list[Any]:
    """Run a plan to its end; its last loop appends to the list, instead of yielding to one."""
    try:
        if not source.is_late:
            return Execution(prepare(source, ops)).gather()
        pushed, left = source.push(ops)
        try:
            return Execution(prepare(pushed, left)).gather()
        finally:
            pushed.close()
    except StopIteration as error:  # as in a generator: for a caller it would mean the end
        raise RuntimeError("StopIteration was raised outside of the operations.") from error


class Execution:
    """One iteration of a plan: the generators of its segments, each reading the one before."""

    __slots__ = ("inline", "meter", "segments", "source", "window")

    def __init__(self, prepared: Prepared, meter: Meter | None = None) -> None:
        self.source, self.window, ops, numbers, _ = prepared
        self.meter = meter
        self.inline = is_on()
        parts = list(segments(ops, numbers))
        if len(parts) > 1:
            if meter is None:
                parts = _join_concats(parts)
            parts = list(_apart(parts))
        self.segments = parts

    def stream(self) -> Iterator[Any]:
        """The elements, as they are asked for."""
        stream: Iterator[Any] = (
            self._taking_turns() if self._is_deep() else self._nested(self.segments)
        )
        return stream

    def gather(self) -> list[Any]:
        """The elements in a list."""
        *before, last = self.segments
        if _is_grouping(last) or self._is_deep():
            return list(self.stream())
        out: list[Any] = []
        self._loop(last, "before" if before else "source", self._nested(before), out)
        return out

    def _is_deep(self) -> bool:
        # Caches below the source nest as well: all together stay below 2 * MAX_NESTED.
        return len(self.segments) > MAX_NESTED >> self.source.depth

    def _nested(self, parts: list[Segment]) -> Any:
        """Each segment reads the one before it."""
        stream: Any = None
        for part in parts:
            if _is_grouping(part):
                (op,), (number,) = part
                stream = GROUPINGS[op[0]](stream, op, number, _open)
                if self.meter is not None:
                    stream = self.meter.measure(stream, number)
            else:
                stream = self._loop(part, "source" if stream is None else "before", stream)
        return stream

    def _taking_turns(self) -> Iterator[Any]:
        """Each segment asks for what it needs; only a `through` reads what is before it."""
        stages: list[Stage] = []
        for part in self.segments:
            if not _is_grouping(part):
                stages.append((self._loop(part, "asked" if stages else "source"), None))
                continue
            (op,), (number,) = part
            if op[0] == "through":
                before = relay(stages, self.meter)
                stages = [(GROUPINGS[op[0]](before, op, number, _open), number)]
            else:
                stages.append((ASKING[op[0]](op, number, _open), number))
        return relay(stages, self.meter)

    def _loop(
        self, part: Segment, reads: str, before: Any = None, out: list[Any] | None = None
    ) -> Any:
        """The generator of a segment; with a list, run it to its end."""
        ops, numbers = part
        arguments: list[Any] = [Run(self.source, self.window, before, ops, numbers)]
        if out is not None:
            arguments.append(out)
        shape: list[Any] = [reads, out is not None, self.meter is not None]
        shape.extend(_shape_of(op, self.inline, arguments) for op in ops)
        if self.meter is not None:
            arguments += self.meter, numbers
        return function_for(tuple(shape))(*arguments)


def _is_grouping(part: Segment) -> bool:
    return bool(part[0]) and part[0][0][0] in GROUPINGS


def _apart(parts: list[Segment]) -> Iterator[Segment]:
    """Groupings as segments of their own; the first segment is one that reads the source."""
    if not parts[0][0] and parts[1][0][0][0] not in GROUPINGS:
        del parts[0]
    for ops, numbers in parts:
        if not _is_grouping((ops, numbers)):
            yield ops, numbers
            continue
        yield ops[:1], numbers[:1]
        if len(ops) > 1:
            yield ops[1:], numbers[1:]


def _join_concats(parts: list[Segment]) -> list[Segment]:
    """Neighbouring concats run as one: a thousand of them are not a thousand segments."""
    joined: list[Segment] = []
    for part, numbers in parts:
        if part and part[0][0] == "concat" and joined:
            before = joined[-1][0]
            if len(before) == 1 and before[0][0] == "concat":
                joined.pop()
                part = [("concat", before[0][1] + part[0][1]), *part[1:]]
        joined.append((part, numbers))
    return joined


def _open(source: Source) -> Iterator[Any]:
    return iterate(source, ())


def _shape_of(op: Op, inline: bool, arguments: list[Any]) -> Any:
    """The part of an operation that its code depends on; the rest goes into the arguments."""
    name = op[0]
    if name in _CALLING:
        face = face_of(op[1]) if inline else None
        if face is None:
            arguments.append(op[1])
            return name, None, False
        arguments.extend(face.constants)
        if face.guarded:
            arguments.append(op[1].evaluate)
        return name, face.template, face.guarded
    if name == "distinct":
        _, key, max_keys = op
        computed = None if key is None else _shape_of(("keyed", key), inline, arguments)
        if max_keys is not None:
            arguments.append(max_keys)
        return name, computed, max_keys is not None
    if name in ("scan", "reduce"):
        arguments.extend(op[1:])
        return name, op[2] is MISSING
    if name == "catch":
        arguments.extend(op[1:3] if op[2] is not MISSING else op[1:2])
        return name, op[2] is not MISSING, callable(op[2]), len(op) == 3
    if name == "batch":
        arguments.append(op[1])
        return name, op[2]
    if name == "row":
        arguments.extend(op[1])
        return name, len(op[1])
    arguments.extend(arg for arg in op[1:] if arg is not None)
    return name


_functions: dict[tuple[Any, ...], Chain] = {}
_names = counting()


def function_for(shape: tuple[Any, ...]) -> Chain:
    """The generator function for a shape, generated once."""
    function = _functions.get(shape)
    if function is None:
        function = _generate(shape)
        if len(_functions) >= MAX_SHAPES:
            for old in list(_functions)[: MAX_SHAPES // 4]:
                if (gone := _functions.pop(old, None)) is not None:
                    linecache.cache.pop(gone.__code__.co_filename, None)
        _functions[shape] = function
    return function


def source_of(function: Chain) -> str:
    """The generated code, as tracebacks show it."""
    return "".join(linecache.getlines(function.__code__.co_filename))


def _generate(shape: tuple[Any, ...]) -> Chain:
    text, owners = write_chain(shape)
    filename = f"<lazy chain {next(_names)}>"
    namespace: dict[str, Any] = {**_NAMESPACE, "OWNERS": owners}
    exec(compile(text, filename, "exec"), namespace)  # noqa: S102  (our own text: see Face)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    chain: Chain = namespace["chain"]
    return chain


def release(sub: Any) -> None:
    """Close an iterator that a function gave to flat_map."""
    if hasattr(sub, "__next__") and hasattr(sub, "close"):
        sub.close()


_NAMESPACE: dict[str, Any] = {
    "GUARD": GUARD,
    "NEED": NEED,
    "END": END,
    "TooManyKeysError": TooManyKeysError,
    "TOO_MANY_KEYS": "distinct(max_keys={0}) has met more than {0:,} different keys. Filter before "
    "it, or raise max_keys.",
    "SHORT_BATCH": "The last batch has {} elements, and strict=True asks for whole ones.",
    "blame": blame,
    "islice": islice,
    "release": release,
}  # fmt: skip
