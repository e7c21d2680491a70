"""Rows of figures, and how they are shown."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """A figure, what stands beside it, and whether its goals are met; None: it has none.

    The ratio is the figure divided by what stands beside it.
    """

    what: str
    unit: str
    figure: float
    samples: list[float] = field(default_factory=list)
    beside: str = ""
    reference: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None


def row(
    what: str,
    unit: str,
    samples: Sequence[float],
    *,
    beside: str = "",
    references: Sequence[float] = (),
    least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    times: float | None = None,
) -> Row:
    """A row out of the medians of the rounds, with its goals."""
    figure = statistics.median(samples)
    reference = statistics.median(references) if references else None
    ratio = figure / reference if reference else None
    suffix = unit if unit.startswith("/") else f" {unit}"
    goals: list[str] = []
    kept: list[bool] = []
    if least is not None:
        goals.append(f">= {least:,.12g}{suffix}")
        kept.append(figure >= least)
    if below is not None:
        goals.append(f"< {below:g}{suffix}")
        kept.append(figure < below)
    if at_most is not None:
        goals.append(f"<= {at_most:g}{suffix}")
        kept.append(figure <= at_most)
    if times is not None and ratio is not None:
        goals.append(f">= {times:g}x")
        kept.append(ratio >= times)
    return Row(
        what, unit, figure, list(samples), beside, reference, ratio,
        ", ".join(goals), all(kept) if kept else None,
    )  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """The rows as text in columns."""
    lines = [("", "figure", "rounds from - to", "beside it", "ratio", "goal", "")]
    for each in rows:
        low, high = min(each.samples), max(each.samples)
        spread = f"{_number(low)} - {_number(high)}" if len(each.samples) > 1 else ""
        beside = each.beside
        if each.reference is not None:
            beside += f" {_number(each.reference)}"
        lines.append(
            (
                each.what,
                f"{_number(each.figure)} {each.unit}",
                spread,
                beside,
                "" if each.ratio is None else f"{each.ratio:.2f}x",
                each.goal,
                {True: "met", False: "MISSED", None: ""}[each.met],
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"
