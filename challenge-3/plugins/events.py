"""Sensor and sales events: is one right, and what is it in the form that all others have?"""

import datetime as dt
import math
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from utils import APIContractBase, Finding, InvalidInput, Transformer, ValidationReport, Validator

EARLIEST = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
LARGEST = 1e15
METRICS = {  # unit of the normal form, least and greatest value that a sensor can mean
    "temperature": ("C", -90.0, 1100.0),
    "pressure": ("hPa", 0.0, 11_000.0),
    "speed": ("m/s", 0.0, 400.0),
    "length": ("m", -500.0, 50_000.0),
    "duration": ("s", -86_400.0, 31_622_400.0),
}
TO_NORMAL = {  # factor and offset: normal = value * factor + offset
    "C": ("C", 1.0, 0.0), "K": ("C", 1.0, -273.15), "F": ("C", 5 / 9, -160 / 9),
    "hPa": ("hPa", 1.0, 0.0), "Pa": ("hPa", 0.01, 0.0), "bar": ("hPa", 1000.0, 0.0),
    "inHg": ("hPa", 33.8639, 0.0),
    "m/s": ("m/s", 1.0, 0.0), "km/h": ("m/s", 1 / 3.6, 0.0), "kn": ("m/s", 1852 / 3600, 0.0),
    "m": ("m", 1.0, 0.0), "km": ("m", 1000.0, 0.0), "ft": ("m", 0.3048, 0.0),
    "mi": ("m", 1609.344, 0.0),
    "s": ("s", 1.0, 0.0), "min": ("s", 60.0, 0.0), "h": ("s", 3600.0, 0.0),
}  # fmt: skip
SENSOR_EXAMPLE = {
    "sensor": "t-17", "metric": "temperature", "value": 71.6, "unit": "F",
    "at": "2026-01-15T10:00:03+01:00",
}  # fmt: skip
SALE_EXAMPLE = {
    "order": "A-1001", "sku": " tea-02 ", "quantity": 3, "price": "4.50", "currency": "eur",
    "at": "2026-01-15T10:00:03Z",
}  # fmt: skip


class Reading(BaseModel):
    """A reading in the normal form: SI units (degrees Celsius, hPa), UTC."""

    model_config = ConfigDict(extra="forbid")

    sensor: str = Field(min_length=1, max_length=64)
    metric: Literal["temperature", "pressure", "speed", "length", "duration"]
    value: float = Field(allow_inf_nan=False)
    unit: Literal["C", "hPa", "m/s", "m", "s"]
    at: AwareDatetime


class Sale(BaseModel):
    """A sale in the normal form: money in cents, codes in upper case, UTC."""

    model_config = ConfigDict(extra="forbid")

    order: str
    sku: str
    quantity: int = Field(ge=1)
    price_cents: int = Field(ge=0)
    total_cents: int = Field(ge=0)
    currency: str = Field(pattern=r"^[A-Z]{3}$")
    at: AwareDatetime


def findings_of_sensor(data: dict[str, Any]) -> list[Finding]:
    """Everything that is wrong with a sensor event, not only the first."""
    found = _texts(data, "sensor", "metric", "unit")
    metric, unit = _word(data, "metric"), _word(data, "unit")
    if metric and metric not in METRICS:
        found.append(Finding("/metric", f"The metric is none of {', '.join(METRICS)}."))
    if unit and unit not in TO_NORMAL:
        found.append(Finding("/unit", f"The unit is none of {', '.join(TO_NORMAL)}."))
    value = data.get("value")
    if not _is_number(value):
        found.append(Finding("/value", "There is no finite number."))
    elif value is not None and metric in METRICS and unit in TO_NORMAL:
        normal_unit, least, greatest = METRICS[metric]
        own_unit, factor, offset = TO_NORMAL[unit]
        if own_unit != normal_unit:
            found.append(Finding("/unit", f"This is no unit of {metric}."))
        elif not least <= value * factor + offset <= greatest:
            found.append(
                Finding("/value", f"Outside {least:g} to {greatest:g} {normal_unit}.")
            )  # fmt: skip
    return [*found, *_moments(data)]


def findings_of_sale(data: dict[str, Any]) -> list[Finding]:
    """Everything that is wrong with a sales event."""
    found = _texts(data, "order", "sku")
    quantity = data.get("quantity")
    if not isinstance(quantity, int) or isinstance(quantity, bool) or quantity < 1:
        found.append(Finding("/quantity", "There is no whole number of at least 1."))
    if _cents(data.get("price")) is None:
        found.append(Finding("/price", "There is no amount of at most two decimals."))
    currency = data.get("currency")
    if not isinstance(currency, str) or not (len(currency.strip()) == 3 and currency.isascii()):
        found.append(Finding("/currency", "There is no code of three letters."))
    return [*found, *_moments(data)]


def _word(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    return value if isinstance(value, str) else ""


def _texts(data: dict[str, Any], *names: str) -> list[Finding]:
    return [
        Finding(f"/{name}", "There is no text of 1 to 64 characters.")
        for name in names
        if not isinstance(data.get(name), str) or not 1 <= len(data[name].strip()) <= 64
    ]


def _moments(data: dict[str, Any]) -> list[Finding]:
    moment = _moment(data.get("at"))
    if moment is None:
        return [Finding("/at", "There is no time with an offset, such as 2026-01-15T10:00:00Z.")]
    return [] if moment >= EARLIEST else [Finding("/at", "It lies before the year 2000.")]


def _moment(text: Any) -> dt.datetime | None:
    try:
        moment = dt.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    try:
        return moment.astimezone(dt.UTC) if moment.tzinfo is not None else None
    except OverflowError:
        return None


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < LARGEST and math.isfinite(value)


def _cents(price: Any) -> int | None:
    text = str(price) if isinstance(price, (int, float, str)) else ""
    whole, _, part = text.strip().partition(".")
    if not (whole.isascii() and whole.isdigit()) or len(whole) > 12 or len(part) > 2:
        return None
    return int(whole) * 100 + int(part.ljust(2, "0")) if (part or "0").isdigit() else None


class ValidateSensor(Validator[dict[str, Any]]):
    """Checks a sensor event: names, unit, range of the metric, time."""

    version = "1.0.0"
    description = "Checks a sensor event: names, unit, range of the metric, time."
    author = "challenge-3"
    example = SENSOR_EXAMPLE

    def validate(self, data: dict[str, Any]) -> ValidationReport:
        """All that is wrong, with pointers."""
        return ValidationReport.of(findings_of_sensor(data))


class NormaliseSensor(Transformer[dict[str, Any], Reading]):
    """Brings a valid sensor event to SI units and UTC."""

    version = "1.0.0"
    description = "Brings a valid sensor event to SI units and UTC."
    author = "challenge-3"
    example = SENSOR_EXAMPLE

    def transform(self, data: dict[str, Any]) -> Reading:
        """The reading; InvalidInput for an event that ValidateSensor refuses."""
        if found := findings_of_sensor(data):
            raise InvalidInput(found)
        unit, factor, offset = TO_NORMAL[data["unit"]]
        return Reading.model_validate(
            {
                "sensor": data["sensor"].strip(),
                "metric": data["metric"],
                "value": round(data["value"] * factor + offset, 6),
                "unit": unit,
                "at": _moment(data["at"]),
            }
        )


class ValidateSale(Validator[dict[str, Any]]):
    """Checks a sales event: names, quantity, price, currency, time."""

    version = "1.0.0"
    description = "Checks a sales event: names, quantity, price, currency, time."
    author = "challenge-3"
    example = SALE_EXAMPLE

    def validate(self, data: dict[str, Any]) -> ValidationReport:
        """All that is wrong, with pointers."""
        return ValidationReport.of(findings_of_sale(data))


class NormaliseSale(Transformer[dict[str, Any], Sale]):
    """Brings a valid sales event to cents, upper-case codes and UTC."""

    version = "1.0.0"
    description = "Brings a valid sales event to cents, upper-case codes and UTC."
    author = "challenge-3"
    example = SALE_EXAMPLE

    def transform(self, data: dict[str, Any]) -> Sale:
        """The sale; InvalidInput for an event that ValidateSale refuses."""
        if found := findings_of_sale(data):
            raise InvalidInput(found)
        cents = _cents(data["price"]) or 0
        return Sale.model_validate(
            {
                "order": data["order"].strip(),
                "sku": data["sku"].strip().upper(),
                "quantity": data["quantity"],
                "price_cents": cents,
                "total_cents": cents * data["quantity"],
                "currency": data["currency"].strip().upper(),
                "at": _moment(data["at"]),
            }
        )


class SensorIntake(APIContractBase):
    """Checks and normalises in one plugin: what an API in front of sensors needs."""

    version = "1.0.0"
    description = "Checks a sensor event and brings it to SI units and UTC."
    author = "challenge-3"
    example = SENSOR_EXAMPLE

    def validate(self, data: dict[str, Any]) -> ValidationReport:
        """All that is wrong, with pointers."""
        return ValidationReport.of(findings_of_sensor(data))

    def process(self, data: dict[str, Any]) -> Reading:
        """The reading in the normal form."""
        return NormaliseSensor().transform(data)
