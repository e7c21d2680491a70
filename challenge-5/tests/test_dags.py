"""Dependencies: any graph, results in order, failures and cancellations to the last descendant."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples

pytestmark = pytest.mark.integration


def value_of(number: int, *parents: int) -> int:
    if number % 7 == 3:
        raise ValueError(f"task {number}")
    return number + sum(parents)


def test_parents_results_come_positionally_in_the_order_of_dependencies(scheduler: Any) -> None:
    from utils import Task

    scheduler.submit_many(
        [
            Task("child", samples.together, dependencies=["b", "a"]),
            Task("a", samples.echo, ("A",)),
            Task("b", samples.echo, ("B",)),
        ]
    )

    assert scheduler.handle("child").result(10) == ["B", "A"]


def test_with_arguments_only_placeholders_are_replaced(scheduler: Any) -> None:
    from utils import Result, Task

    parent = scheduler.submit(samples.echo, 20)
    other = scheduler.submit(samples.echo, 1)
    child = scheduler.submit(
        Task(func=samples.together, args=(1, {"x": [Result(parent.id)]}), dependencies=[other])
    )
    plain = scheduler.submit(samples.add, 2, Result(parent.id))

    assert child.result(10) == [1, {"x": [20]}]
    assert plain.result(10) == 22
    assert scheduler.get_task_status(child.id)["dependencies"] == [other.id, parent.id]


def test_a_set_of_one_passes_its_result_and_a_larger_set_asks_for_a_list(scheduler: Any) -> None:
    parent = scheduler.submit_task(samples.echo, (5,))
    child = scheduler.submit_task(lambda data: data * 2, dependencies={parent})
    no_parameters = scheduler.submit_task(samples.noop, dependencies={parent, child})

    assert scheduler.handle(child).result(10) == 10
    assert scheduler.handle(no_parameters).result(10) is None
    with pytest.raises(ValueError, match="give a list"):
        scheduler.submit_task(samples.together, dependencies={parent, child})


def test_results_reach_children_in_threads_and_coroutines(scheduler: Any) -> None:
    from utils import Result, Task

    async def double(x: int) -> int:
        return 2 * x

    parent = scheduler.submit(samples.echo, 4)
    coroutine = scheduler.submit(Task(func=double, dependencies=[parent]))
    thread = scheduler.submit(
        Task(func=samples.add, args=(1,), kwargs={"b": Result(coroutine.id)}, kind="io")
    )

    assert thread.result(10) == 9


def test_a_failure_reaches_all_descendants_with_its_root_cause(
    scheduler: Any, tmp_path: Path
) -> None:
    from utils import DependencyFailed, Task

    go = str(tmp_path / "go")
    scheduler.submit_many(
        [
            Task("root", lambda: (samples.wait_for(go), 1 / 0)),
            Task("child", samples.together, dependencies=["root"]),
            Task("grandchild", samples.together, dependencies=["child"]),
        ]
    )
    Path(go).touch()
    outcome = scheduler.handle("grandchild").outcome(10)
    late = scheduler.submit(Task("late", samples.noop, dependencies=["grandchild"])).outcome(10)

    for found, parent in ((outcome, "child"), (late, "grandchild")):
        assert found.status == "failed"
        assert isinstance(found.error, DependencyFailed)
        assert found.error.parent == parent
        assert "ZeroDivisionError: division by zero" in found.error.cause
        assert found.attempts == 0


def test_a_cancelled_or_timed_out_parent_ends_its_children(scheduler: Any) -> None:
    from utils import Task

    slow = scheduler.submit(Task(func=samples.long_sleep, timeout=0.05))
    after_slow = scheduler.submit(Task(func=samples.noop, dependencies=[slow]))
    parent = scheduler.submit(Task(func=samples.noop, delay=3600))
    child = scheduler.submit(Task(func=samples.noop, dependencies=[parent]))
    grandchild = scheduler.submit(Task(func=samples.noop, dependencies=[child]))

    assert parent.cancel() is True
    assert grandchild.outcome(10).status == "cancelled"
    assert after_slow.outcome(10).status == "failed"
    assert "timeout" in str(after_slow.outcome(0).error)


def test_a_diamond_of_a_thousand_nodes(scheduler: Any) -> None:
    from utils import Task

    tasks = [Task("0", samples.echo, (0,))]
    tasks += [Task(f"m{n}", samples.together, dependencies=["0"]) for n in range(1, 999)]
    tasks.append(Task("end", samples.together, dependencies=[f"m{n}" for n in range(1, 999)]))
    random.Random(2).shuffle(tasks)
    scheduler.submit_many(tasks)

    assert scheduler.handle("end").result(30) == [[0]] * 998


@pytest.mark.parametrize("seed", range(4))
def test_generated_graphs_equal_a_sequential_reference(
    make_scheduler: Callable[..., Any], seed: int
) -> None:
    from utils import DistributedScheduler, Task

    chance = random.Random(seed)
    scheduler = make_scheduler(DistributedScheduler, max_tasks=10_000)
    number = 300
    parents = {
        n: sorted(chance.sample(range(n), min(n, chance.choice((0, 1, 1, 2, 5)))))
        for n in range(number)
    }
    cancelled = set(chance.sample(range(number), 12))
    scheduler.initialize()  # nothing runs before the cancels, so that the reference is exact
    tasks = [
        Task(f"{seed}-{n}", lambda *found, n=n: value_of(n, *found),
             dependencies=[f"{seed}-{p}" for p in parents[n]],
             kind=chance.choice(("cpu", "io")))
        for n in range(number)
    ]  # fmt: skip
    chance.shuffle(tasks)
    scheduler.submit_many(tasks)
    for n in cancelled:
        assert scheduler.cancel_task(f"{seed}-{n}") is True
    scheduler.run()

    expected: dict[int, Any] = {}
    for n in range(number):
        states = [expected[p] for p in parents[n]]
        if n in cancelled or "cancelled" in states:
            expected[n] = "cancelled"
        elif "failed" in states:
            expected[n] = "failed"
        else:
            try:
                expected[n] = value_of(n, *states)
            except ValueError:
                expected[n] = "failed"
    for n in range(number):
        outcome = scheduler.handle(f"{seed}-{n}").outcome(30)
        found = outcome.output if outcome.status == "completed" else outcome.status
        assert found == expected[n], n
    assert {"cancelled", "failed"} <= {value for value in expected.values() if value}
