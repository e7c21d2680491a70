"""What a result looks like where only JSON is known."""

import pickle
from typing import Any

import pytest

pytestmark = pytest.mark.unit


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


def explode() -> None:
    raise RuntimeError


class Explosive:
    def __reduce__(self) -> Any:
        return explode, ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": (1, None, True)}, {"a": [1, None, True]}),
        ({1: {2.5}, None: b"x"}, {"1": [2.5], "None": "x"}),
        ([float("nan"), float("-inf")], ["nan", "-inf"]),
        ("\udcff", r"\udcff"),
        (Odd(), "<odd>"),
        ([Odd], None),
        (2**64, 2**64),
        (Explosive(), "(cannot be shown: RuntimeError)"),
    ],
)
def test_values_are_shown_as_json_can_have_them(value: Any, expected: Any) -> None:
    import json

    from views import shown

    found = shown(pickle.dumps(value))
    json.dumps(found, allow_nan=False).encode()
    if expected is not None:
        assert found == expected


def test_what_is_too_deep_or_holds_itself_or_is_too_large_is_shown_in_part() -> None:
    from views import shown

    ring: list[Any] = []
    ring.append(ring)
    found = shown(pickle.dumps(ring))
    for _ in range(100):
        (found,) = found
    assert found == "…"
    assert shown(pickle.dumps(10**5000)).startswith("0x")
