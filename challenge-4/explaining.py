"""`explain` and `repr`: what a plan will do, in words, without doing it."""

from collections.abc import Callable
from typing import Any

from caching import CachedSource
from compiler import HEADS, MISSING, Prepared, iterate, prepare, segments
from expressions import Expr
from inlining import face_of, is_on
from metering import Meter
from sources import EVERYTHING, Op, Source, name_of

REPR_CHARACTERS = 200


class Explanation(str):
    """A text to print; `counts` and `seconds` per operation after `analyze` (0 is the source).

    The count of an operation that the source has taken over, or a neighbour, is None.
    """

    __slots__ = ("counts", "inlined", "merged", "pushed", "seconds", "segments", "sql")
    sql: str | None
    pushed: list[str]
    inlined: list[int]
    merged: list[str]
    segments: int
    counts: list[int | None]
    seconds: list[float]


def explain(source: Source, ops: tuple[Op, ...], *, analyze: bool) -> Explanation:
    """Describe the plan, and run it with a meter when asked to."""
    meter = Meter(len(ops) + 1) if analyze else None
    if meter is not None:
        stream = iterate(source, ops, meter)
        for _ in stream:
            pass
    return _explained(source, ops, meter)


def _explained(source: Source, ops: tuple[Op, ...], meter: Meter | None) -> Explanation:
    pushed, left = source.push(ops)
    try:
        prepared = prepare(pushed, left)
        lines, facts = _lines(source, pushed, len(ops), prepared, meter)
    finally:
        if pushed is not source:
            pushed.close()
    text = Explanation("\n".join(lines))
    for name, value in facts.items():
        setattr(text, name, value)
    return text


def _lines(
    source: Source, pushed: Source, ops: int, prepared: Prepared, meter: Meter | None
) -> tuple[list[str], dict[str, Any]]:
    inline = is_on()
    sql: str | None = getattr(pushed, "sql", None)
    border: list[str] = list(getattr(pushed, "pushed", ()))
    inlined: list[int] = []
    lines = [f"source   {source.describe()}{_measured(meter, 0)}"]
    if isinstance(pushed, CachedSource):
        inner = describe_plan("computed from ", *pushed.described)
        lines.append(f"         {inner}")
    if sql is not None:
        lines += [f"         sql: {sql}"]
        if parameters := getattr(pushed, "parameters", None):
            lines.append(f"         parameters: {len(parameters)}")
        lines += [f"         pushed into the source: {text}" for text in border]
    if prepared.window is not EVERYTHING:
        how = "by index" if prepared.source.is_sequence() else "by counting"
        lines.append(f"         the source skips and takes {how}: {_window(prepared.window)}")
    lines += [f"         merged: {text}" for text in prepared.merged]
    if prepared.source is not pushed and not prepared.source.is_sequence():
        lines.append(f"         read from {prepared.source.describe()}")
    count = 0
    shown = 0
    for part, numbers in segments(prepared.ops, prepared.numbers):
        if not part:
            continue
        count += 1
        lines.append(f"segment {count}")
        for op, number in zip(part, numbers, strict=True):
            shown += 1
            if shown > MAX_LINES:
                continue
            how, is_inlined = _how(op, inline)
            if is_inlined:
                inlined.append(number)
            label = "   " if number > ops else f"op {number}"
            lines.append(f"  {label} {call_text(op)}{how}{_measured(meter, number)}")
    if shown > MAX_LINES:
        lines.append(f"  ... {shown - MAX_LINES:,} more")
    counted = {0, *prepared.numbers}
    facts = {
        "sql": sql, "pushed": border, "inlined": inlined, "merged": prepared.merged,
        "segments": max(count, 1),
        "counts": [meter.counts[n] if n in counted else None for n in range(ops + 1)]
        if meter else [],
        "seconds": meter.seconds[: ops + 1] if meter else [],
    }  # fmt: skip
    return lines, facts


MAX_LINES = 200


def _how(op: Op, inline: bool) -> tuple[str, bool]:
    if op[0] == "row":
        return "  builds the mapping", False
    if op[0] == "sort":
        return "  materialises", False
    if op[0] in HEADS or len(op) < 2 or not callable(op[1]):
        return "", False
    if op[0] in ("tap", "scan", "reduce"):
        return "  called", False
    done = inline and face_of(op[1]) is not None
    return ("  inlined", True) if done else ("  called", False)


def _measured(meter: Meter | None, number: int) -> str:
    if meter is None:
        return ""
    return f"  -> {meter.counts[number]:,} in {meter.seconds[number] * 1000:.2f} ms"


def _window(window: range) -> str:
    stop = "" if window.stop >= EVERYTHING.stop else f"{window.stop:,}"
    return f"[{window.start:,}:{stop}{f':{window.step}' if window.step > 1 else ''}]"


def call_text(op: Op) -> str:
    """The operation as it was called."""
    name, *arguments = op
    if name == "pages":
        return f"paginate({arguments[0]})"
    if name == "map" and isinstance(arguments[0], Expr) and arguments[0].op == "record":
        fields = ", ".join(f"{field}={expr}" for field, expr in arguments[0].args[0].items())
        return f"select({fields})" if len(fields) <= 200 else f"select({fields[:197]}...)"
    if name == "sort":
        key = "" if arguments[0] is None else name_of(arguments[0])
        return (
            f"sort({key}{', ' if key and arguments[1] else ''}{'reverse' if arguments[1] else ''})"
        )
    if name in ("zip", "concat"):
        return f"{name}({', '.join(source.describe() for source in arguments[0])})"
    if name == "catch":
        return f"catch({', '.join(error.__name__ for error in arguments[0])})"
    if name == "row":
        return f"row({', '.join(arguments[0])})"
    texts = []
    for argument in arguments:
        if isinstance(argument, bool) or argument is None or argument is MISSING:
            continue
        texts.append(str(argument) if isinstance(argument, int) else name_of(argument))
    return f"{name}({', '.join(texts)})"


def describe_plan(kind: str, source: Source, ops: tuple[Op, ...]) -> str:
    """The plan on one line of at most REPR_CHARACTERS characters; nothing is evaluated."""
    text = f"{kind}({source.describe()})"
    shorten: Callable[[str], str] = lambda t: t  # noqa: E731
    for position, op in enumerate(ops):
        step = f".{shorten(call_text(op))}"
        more = f" … {len(ops) - position:,} more"
        if len(text) + len(step) + len(more) > REPR_CHARACTERS and (
            position + 1 < len(ops) or len(text) + len(step) > REPR_CHARACTERS
        ):
            return text[: REPR_CHARACTERS - len(more)] + more
        text += step
    return text[:REPR_CHARACTERS]
