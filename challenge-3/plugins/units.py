"""Conversion of units, exact where the definition is (an inch is 25.4 mm)."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from utils import Processor

# Dimension, factor to its base unit, offset: base = value * factor + offset.
UNITS: dict[str, tuple[str, float, float]] = {
    "m": ("length", 1.0, 0.0), "km": ("length", 1000.0, 0.0), "cm": ("length", 0.01, 0.0),
    "mm": ("length", 0.001, 0.0), "in": ("length", 0.0254, 0.0), "ft": ("length", 0.3048, 0.0),
    "yd": ("length", 0.9144, 0.0), "mi": ("length", 1609.344, 0.0),
    "nmi": ("length", 1852.0, 0.0),
    "g": ("mass", 0.001, 0.0), "kg": ("mass", 1.0, 0.0), "t": ("mass", 1000.0, 0.0),
    "oz": ("mass", 0.028349523125, 0.0), "lb": ("mass", 0.45359237, 0.0),
    "s": ("time", 1.0, 0.0), "min": ("time", 60.0, 0.0), "h": ("time", 3600.0, 0.0),
    "d": ("time", 86_400.0, 0.0),
    "m/s": ("speed", 1.0, 0.0), "km/h": ("speed", 1 / 3.6, 0.0), "mph": ("speed", 0.44704, 0.0),
    "kn": ("speed", 1852 / 3600, 0.0),
    "K": ("temperature", 1.0, 0.0), "C": ("temperature", 1.0, 273.15),
    "F": ("temperature", 5 / 9, 459.67 * 5 / 9),
    "Pa": ("pressure", 1.0, 0.0), "hPa": ("pressure", 100.0, 0.0),
    "bar": ("pressure", 100_000.0, 0.0), "psi": ("pressure", 6894.757293168, 0.0),
    "B": ("data", 1.0, 0.0), "kB": ("data", 1e3, 0.0), "MB": ("data", 1e6, 0.0),
    "KiB": ("data", 1024.0, 0.0), "MiB": ("data", 1024.0**2, 0.0),
}  # fmt: skip

Finite = Annotated[float, Field(ge=-1e150, le=1e150, strict=True)]  # far from what overflows


class Quantity(BaseModel):
    """Values to convert; a gap (null) stays a gap."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={
        "examples": [{"values": [13, None, 5355], "unit": "ft", "to": "m"}],
    })  # fmt: skip

    values: list[Finite | None] = Field(max_length=100_000)
    unit: str = Field(max_length=16)
    to: str = Field(max_length=16)

    def model_post_init(self, _: Any) -> None:
        """Refuse units that are not known, or that do not measure the same thing."""
        for name in (self.unit, self.to):
            if name not in UNITS:
                raise ValueError(f"the units are {', '.join(UNITS)}")
        if UNITS[self.unit][0] != UNITS[self.to][0]:
            raise ValueError(f"a {UNITS[self.unit][0]} is no {UNITS[self.to][0]}")


class Converted(BaseModel):
    """The values in the unit that was asked for."""

    values: list[float | None]
    unit: str
    dimension: str


class ConvertUnits(Processor[Quantity, Converted]):
    """Converts lists of values between units of one dimension."""

    version = "1.0.0"
    description = "Converts lists of values between units of one dimension."
    author = "challenge-3"

    def process(self, data: Quantity) -> Converted:
        """The same values, to 12 significant digits."""
        dimension, factor, offset = UNITS[data.unit]
        _, to_factor, to_offset = UNITS[data.to]

        def convert(value: float) -> float:
            return float(f"{(value * factor + offset - to_offset) / to_factor:.12g}")

        values = [None if value is None else convert(value) for value in data.values]
        return Converted(values=values, unit=data.to, dimension=dimension)
