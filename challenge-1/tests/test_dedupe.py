"""Keys are remembered long enough, in bounded memory."""

import random

import pytest

from dedupe import KeyHash, SeenKeys, pack_keys, unpack_keys

pytestmark = pytest.mark.unit


def test_at_least_the_last_capacity_keys_are_known_at_every_moment() -> None:
    seen = SeenKeys(300)
    keys = random.Random(1).sample(range(1, 2**63), 3000)
    for count, key in enumerate(keys, 1):
        assert key not in seen
        seen.add(key)
        if count % 97 == 0:
            assert all(known in seen for known in keys[max(0, count - 300) : count])


def test_old_keys_are_forgotten_so_that_memory_stays_bounded() -> None:
    seen = SeenKeys(300)
    for key in range(1, 100_000):
        seen.add(key)

    assert len(seen) <= 400
    assert 1 not in seen


def test_keys_that_fall_on_the_same_slot_are_told_apart() -> None:
    seen = SeenKeys(100)
    slots = len(seen._generations[0]._slots)
    clashing = [n * slots - 1 for n in range(1, 31)]  # on the last one: the next is the first
    seen.update(clashing[:15])

    assert all(key in seen for key in clashing[:15])
    assert not any(key in seen for key in clashing[15:])


@pytest.mark.parametrize("expected", [None, 2, 900])
@pytest.mark.parametrize("count", [5, 250, 900])
def test_absorbed_keys_are_the_newest_ones(count: int, expected: int | None) -> None:
    seen, newer = SeenKeys(300), SeenKeys(300, expected)
    seen.update(range(1, 301))
    newer.update(range(1001, 1001 + count))

    seen.absorb(newer)

    last = [*range(1, 301), *range(1001, 1001 + count)][-300:]
    assert all(key in seen for key in last)


def test_keys_survive_packing_and_depend_on_the_secret() -> None:
    one, other = KeyHash(b"a" * 16), KeyHash(b"b" * 16)
    keys = [one(f"event-{number}") for number in range(100)]

    assert list(unpack_keys(pack_keys(keys))) == keys
    assert len(set(keys)) == 100
    assert one("event-1") != other("event-1")
    assert one("event-1") != KeyHash(b"a" * 16, "orders")("event-1")
