"""Statistics of a column with gaps: exact sums, percentiles, and how much is missing."""

import math
import statistics
from typing import Annotated

from pydantic import BaseModel, Field

from utils import Processor

Finite = Annotated[float, Field(ge=-1e150, le=1e150, strict=True)]  # their squares do not overflow


class Summary(BaseModel):
    """The figures; null where nothing was there to count."""

    count: int
    missing: int
    least: float | None
    greatest: float | None
    total: float | None
    mean: float | None
    deviation: float | None = Field(description="Of the sample; null for fewer than two values.")
    p25: float | None
    median: float | None
    p75: float | None


class Describe(Processor[list[Finite | None], Summary]):
    """Describes a column of numbers; a gap (null) is counted and left out."""

    version = "1.0.0"
    description = "Describes a column of numbers; a gap (null) is counted and left out."
    author = "challenge-3"
    example = (3.5, None, 4.25, 10, 7)

    def process(self, data: list[Finite | None]) -> Summary:
        """Sums are exact (fsum); percentiles are interpolated between neighbours."""
        values = sorted(value for value in data if value is not None)
        missing = len(data) - len(values)
        if not values:
            return Summary(
                count=0, missing=missing, least=None, greatest=None, total=None, mean=None,
                deviation=None, p25=None, median=None, p75=None,
            )  # fmt: skip
        total = math.fsum(values)
        return Summary(
            count=len(values),
            missing=missing,
            least=values[0],
            greatest=values[-1],
            total=total,
            mean=total / len(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
            p25=_at(values, 0.25),
            median=_at(values, 0.5),
            p75=_at(values, 0.75),
        )


def _at(values: list[float], share: float) -> float:
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)
