"""Rows of figures, and how they are shown."""

from collections.abc import Iterable
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


def table(rows: Iterable[Row]) -> str:
    """The rows as text in columns."""
    lines = [("", "figure", "rounds from - to", "beside it", "ratio", "goal", "")]
    for each in rows:
        spread = ""
        if len(each.samples) > 1:
            spread = f"{_number(min(each.samples))} - {_number(max(each.samples))}"
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
