"""The queue serves by priority, then by order of acceptance."""

import random

import pytest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_pushes_returns_and_removals_equals_a_sorted_list(seed: int) -> None:
    from ready_queue import ReadyQueue

    chance = random.Random(seed)
    queue, model, levels = ReadyQueue(), set(), {}
    taken: list[tuple[int, int]] = []
    for seq in range(1, 600):
        level = levels[seq] = chance.randrange(4)
        queue.push(level, seq)
        model.add((level, seq))
        action = chance.random()
        if action < 0.4 and model:
            assert (queue.peek(), queue.pop()) == (min(model)[1], min(model)[1])
            taken.append(min(model))
            model.discard(min(model))
        elif action < 0.55 and taken:  # comes back with its old number
            back = taken.pop(chance.randrange(len(taken)))
            queue.push(*back)
            model.add(back)
        elif action < 0.7 and model:
            gone = chance.choice(sorted(model))
            queue.remove(gone[1])
            model.discard(gone)
            taken.append(gone)
        assert len(queue) == len(model)
        assert queue.by_level() == [sum(p == n for p, _ in model) for n in range(4)]
    left = []
    while (following := queue.peek()) is not None:
        assert queue.pop() == following
        left.append((levels[following], following))
    assert left == sorted(model)


def test_many_removals_do_not_stay_in_memory() -> None:
    from ready_queue import ReadyQueue

    queue = ReadyQueue()
    queue.extend(2, range(10_000))
    for seq in range(9_999):
        queue.remove(seq)

    assert len(queue) == 1
    assert sum(map(len, queue._arrived)) < 5_000
    assert queue.peek() == 9_999
    assert queue.upcoming(5) == [9_999]


def test_an_empty_queue_says_so() -> None:
    from ready_queue import ReadyQueue

    queue = ReadyQueue()
    assert queue.peek() is None
    assert queue.upcoming(3) == []
    with pytest.raises(IndexError):
        queue.pop()
