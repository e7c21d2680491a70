"""From what a source answers to products: prices, schemas, shapes."""

import datetime as dt
import json
import random
from decimal import Decimal
from typing import Any

import pytest

from fetch_settings import Source
from resilience import Failed
from simulators import atlas_product, bazar_product, corner_product, price_of
from sources import item_url, normalise, read_ids, read_page, read_price, retry_after_seconds

pytestmark = pytest.mark.unit
NOW = dt.datetime(2026, 1, 15, 10, tzinfo=dt.UTC)


def source(**options: Any) -> Source:
    given = {
        "name": "shop", "url": "http://127.0.0.1:1/p", "records": "items", "pages": "pages",
        "fields": {"id": "id", "name": "name", "price": "price", "stock": "stock"},
    } | options  # fmt: skip
    return Source.model_validate(given)


@pytest.mark.parametrize(
    ("text", "mark", "amount", "currency"),
    [
        ("$1,299.00", "auto", "1299.00", "USD"),
        ("1.299,00 €", "auto", "1299.00", "EUR"),
        ("€ 12,50", "auto", "12.50", "EUR"),
        ("£0.99", "auto", "0.99", "GBP"),
        ("CHF 1'299.50", "auto", "1299.50", "CHF"),
        ("1 299,5 EUR", "auto", "1299.5", "EUR"),
        ("1\u202f299\u00a0€", "auto", "1299", "EUR"),
        ("1,234,567", "auto", "1234567", None),
        ("1.234", "auto", "1234", None),
        ("1.234", ".", "1.234", None),
        ("1,234", ",", "1.234", None),
        ("0.125", "auto", "0.125", None),
        ("12.5", "auto", "12.5", None),
        ("12", "auto", "12", None),
        ("$.50", "auto", "0.50", "USD"),
        (",500", ",", "0.500", None),
        (".125", "auto", "0.125", None),
        ("1.299,- €", "auto", "1299", "EUR"),
        ("Fr. 5.-", "auto", "5", "CHF"),
        ("12,50 zł", "auto", "12.50", "PLN"),
        (12.5, "auto", "12.5", None),
        (0, "auto", "0", None),
    ],
)
def test_prices_are_read_with_sign_and_either_decimal_mark(
    text: Any, mark: str, amount: str, currency: str | None
) -> None:
    assert read_price(text, mark) == (Decimal(amount), currency)


@pytest.mark.parametrize(
    "text",
    ["", "call us", "-5", "$-5", "- 5", "1.2.3,4", "1,23,456", "12,50,00.1", "5 apples", "1" * 80,
     "5-", "5 - 10 €", "€ 5-",
     True, None, [1], {}, float("inf"), 1e300, "٣", "1e5"],
)  # fmt: skip
def test_what_is_no_price_is_no_price(text: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (its text is for people)
        read_price(text)


def test_a_price_written_with_two_decimals_is_read_back() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        amount = Decimal(chance.randrange(10 ** chance.randint(1, 11))).scaleb(-2)
        text = f"{amount:,.2f}"
        for mark in ".,":
            written = text if mark == "." else text.translate(str.maketrans(",.", ".,"))
            assert read_price(written) == (amount, None)
            assert read_price(written, mark) == (amount, None)


def test_three_schemas_become_one_product(sources: dict[str, Source]) -> None:
    for name, make in (
        ("atlas", atlas_product), ("bazar", bazar_product), ("corner", corner_product),
    ):  # fmt: skip
        for number in range(1, 60):
            product, faults = normalise(sources[name], make(7, number), NOW)
            assert faults == []
            assert product.source == name
            if name != "corner" or number % 49:
                assert float(product.price or 0) == price_of(7, name, number)
                assert product.currency == ("EUR" if name == "bazar" else "USD")
            else:
                assert product.price is None
            missing = name == "corner" and number % 7 == 0
            assert (product.stock is None) == (product.category is None) == missing


@pytest.fixture
def sources() -> dict[str, Source]:
    from fetch_settings import SHIPPED_CONFIG, load

    return {each.name: each for each in load(config=SHIPPED_CONFIG).settings.sources}


def test_a_record_without_id_or_name_is_reported_and_costs_its_neighbours_nothing() -> None:
    records = [{"id": 1, "name": "a"}, {"id": 2}, {"name": "x"}, 5, {"id": "3", "name": " b "},
               {"id": True, "name": "c"}, {"id": "", "name": "c"}]  # fmt: skip
    page = read_page(source(), json.dumps({"items": records, "pages": 1}).encode(), NOW)

    assert [(product.id, product.name) for product in page.products] == [("1", "a"), ("3", "b")]
    assert [kind for kind, _ in page.faults] == ["invalid_product"] * 5


def test_an_unreadable_optional_part_is_none_and_is_reported() -> None:
    record = {"id": 1, "name": "a", "price": "call us", "stock": "many"}
    page = read_page(source(), json.dumps({"items": [record], "pages": 1}).encode(), NOW)

    (product,) = page.products
    assert (product.price, product.stock) == (None, None)
    assert [kind for kind, _ in page.faults] == ["bad_field", "bad_field"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"items": {}}', b'{"items": NaN}', b'{"items": ["\xff"]}',
     b"[" * 100_000, b'{"items": [], "pages": -1}', b'{"items": [], "pages": 1e9}',
     b'{"items": [' + b"{}," * 20_000 + b'{}], "pages": 1}',
     b'{"items": [], "pages": 10000000000}', b'{"items": [], "pages": true}', b'"\\ud800"'],
)  # fmt: skip
def test_a_document_of_another_shape_failed(body: bytes) -> None:
    with pytest.raises(Failed):
        read_page(source(), body, NOW)


def test_a_cursor_is_a_short_text_or_the_end() -> None:
    cursor = source(paging="cursor", next="next")
    expectations: list[tuple[Any, str | None]] = [
        ("abc", "abc"),
        (7, "7"),
        (None, None),
        ("", None),
    ]
    for value, expected in expectations:
        body = json.dumps({"items": [], "next": value}).encode()
        assert read_page(cursor, body, NOW).next == expected
    wrong: list[Any] = [["x"], "x" * 3000]
    for value in wrong:
        with pytest.raises(Failed):
            read_page(cursor, json.dumps({"items": [], "next": value}).encode(), NOW)


def test_an_id_cannot_leave_its_place_in_the_path() -> None:
    single = source(paging="single", ids="ids", item_url="http://127.0.0.1:1/p/{id}")
    assert read_ids(single, b'{"ids": [1, "a-b", 1]}') == ["1", "a-b"]
    for bad in ("../x", "a/b", "a?b", "", "a" * 200, "a%2fb", None, True, 10**30):
        with pytest.raises(Failed):
            read_ids(single, json.dumps({"ids": [bad]}).encode())
    assert item_url(single, "a@b:c") == "http://127.0.0.1:1/p/a%40b%3Ac"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, None), ("2", 2), ("1e9", 1e9), ("-3", None), ("0", 0), ("nan", None), ("soon", None),
     ("", None), ("inf", float("inf")), ("Thu, 15 Jan 2026 09:59:59 GMT", None),
     ("Thu, 15 Jan 2026 10:00:30 GMT", 30), ("Thu, 99 Jan 2026 10:00:00 GMT", None),
     ("Thu, 15 Jan 2026 10:00:00 -99999999999999", None)],
)  # fmt: skip
def test_a_retry_after_is_seconds_or_a_date(text: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(text, lambda: NOW) == seconds
