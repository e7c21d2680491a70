"""Every action in every state; retries and delays on a clock that is turned by hand."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import samples

pytestmark = pytest.mark.integration
STATES = (
    "pending",
    "queued",
    "running",
    "retrying",
    "completed",
    "failed",
    "cancelled",
    "timed_out",
)
ENDED = ("completed", "failed", "cancelled", "timed_out")


@pytest.fixture
def in_state(
    make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
) -> Callable[[str], tuple[Any, str]]:
    """A scheduler with a task in the state that was asked for."""
    from utils import DistributedScheduler, RetryPolicy, Task

    go = str(tmp_path / "go")
    tasks = {
        "pending": Task("t", samples.noop, delay=3600),
        "queued": Task("t", samples.noop),
        "running": Task("t", samples.wait_for, (go,)),
        "retrying": Task("t", samples.boom, retry=RetryPolicy(2, base=3600, jitter="none")),
        "completed": Task("t", samples.noop),
        "failed": Task("t", samples.boom),
        "cancelled": Task("t", samples.noop),
        "timed_out": Task("t", samples.long_sleep, timeout=0.02),
    }

    def make(state: str) -> tuple[Any, str]:
        scheduler = make_scheduler(DistributedScheduler, num_workers=1).initialize()
        scheduler.submit(tasks[state])
        if state == "cancelled":
            scheduler.cancel_task("t")
        if state != "queued":
            scheduler.run()
        soon(lambda: scheduler.get_task_status("t")["state"] == state)
        return scheduler, go

    return make


@pytest.mark.parametrize("state", STATES)
def test_cancel_ends_what_is_unfinished_and_leaves_what_has_ended(
    in_state: Callable[[str], Any], state: str
) -> None:
    scheduler, _ = in_state(state)

    said = scheduler.cancel_task("t")

    found = scheduler.get_task_status("t")["state"]
    assert said is (state not in ENDED or state == "cancelled")
    assert found == (state if state in ENDED else "cancelled")
    assert scheduler.handle("t").outcome(5).status == found


@pytest.mark.parametrize("state", STATES)
def test_retry_runs_what_has_ended_and_refuses_what_has_not(
    in_state: Callable[[str], Any], state: str, soon: Any
) -> None:
    from utils import TaskNotEnded

    scheduler, _ = in_state(state)
    if state not in ENDED:
        with pytest.raises(TaskNotEnded, match=state):
            scheduler.retry_task("t")
        assert scheduler.get_task_status("t")["state"] == state
        return

    outcome = scheduler.retry_task("t").outcome(10)

    assert outcome.status == {"cancelled": "completed"}.get(state, state)
    status = scheduler.get_task_status("t")
    assert (status["run"], status["attempts"]) == (2, 1)


@pytest.mark.parametrize("state", STATES)
def test_cleanup_deletes_only_what_has_ended(in_state: Callable[[str], Any], state: str) -> None:
    scheduler, _ = in_state(state)

    assert scheduler.cleanup(0) == (1 if state in ENDED else 0)
    assert sum(scheduler.get_statistics()["states"].values()) == (0 if state in ENDED else 1)
    with pytest.raises(ValueError, match="ended"):
        scheduler.cleanup(0, states=["queued"])


@pytest.mark.parametrize("state", STATES)
def test_a_restart_keeps_the_state_and_runs_again_what_ran(
    in_state: Callable[[str], Any], make_scheduler: Callable[..., Any], state: str
) -> None:
    scheduler, _ = in_state(state)
    scheduler.shutdown(wait=False)

    from utils import DistributedScheduler

    after = make_scheduler(DistributedScheduler, store=scheduler.store.path).initialize()

    expected = "queued" if state == "running" else state
    assert after.get_task_status("t")["state"] == expected
    assert after.get_statistics()["states"][expected] == 1


@pytest.mark.parametrize("state", STATES)
def test_the_same_submit_again_is_the_same_task_in_every_state(
    in_state: Callable[[str], Any], state: str
) -> None:
    from utils import DuplicateTask, Task

    scheduler, _ = in_state(state)
    with pytest.raises(DuplicateTask):
        scheduler.submit(Task("t", samples.add, (1, 2)))
    assert scheduler.get_statistics()["total"] == 1


@pytest.mark.unit
def test_transitions_outside_the_table_cannot_be_made() -> None:
    from errors import IllegalTransition
    from tasks import LEGAL, TaskState, check_transition

    for before in (None, *TaskState):
        for after in TaskState:
            if after in LEGAL[before]:
                check_transition("t", before, after)
            else:
                with pytest.raises(IllegalTransition, match="'t'"):
                    check_transition("t", before, after)


class TestRetries:
    def test_delays_double_to_their_limit_and_attempts_are_exact(
        self, make_scheduler: Callable[..., Any], clock: Any, soon: Any, tmp_path: Path
    ) -> None:
        from utils import RetryPolicy, Task

        scheduler = make_scheduler(clock=clock).run()
        policy = RetryPolicy(max_attempts=5, base=10, factor=2, max_delay=30, jitter="none")
        path = str(tmp_path / "runs")
        handle = scheduler.submit(Task(func=samples.fail_times, args=(path, 4), retry=policy))

        for attempt, delay in enumerate((10, 20, 30, 30), 1):
            soon(lambda n=attempt: scheduler.get_task_status(handle.id)["attempts"] == n)
            status = scheduler.get_task_status(handle.id)
            assert (status["attempts"], status["run_at"]) == (attempt, clock.now + delay)
            assert status["error"] == f"RuntimeError: failure {attempt}"
            clock.advance(delay - 0.5)
            scheduler.get_statistics()
            assert handle.status() == "retrying"
            clock.advance(0.5)

        assert handle.result(10) == 5
        assert handle.outcome(0).attempts == 5

    def test_when_the_budget_is_used_up_it_fails_with_the_last_error(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import RetryPolicy, Task

        scheduler = make_scheduler().run()
        policy = RetryPolicy(max_attempts=3, base=0)
        path = str(tmp_path / "runs")

        outcome = scheduler.submit(
            Task(func=samples.fail_times, args=(path, 9), retry=policy)
        ).outcome(10)

        assert (outcome.status, outcome.attempts, str(outcome.error)) == ("failed", 3, "failure 3")

    def test_full_jitter_is_between_nothing_and_the_delay(self) -> None:
        from utils import RetryPolicy

        policy = RetryPolicy(max_attempts=9, base=4, factor=2, max_delay=20)
        chance = Random(1)
        for attempts, longest in ((1, 4), (2, 8), (3, 16), (4, 20), (5000, 20)):
            delays = [policy.delay(attempts, chance) for _ in range(200)]
            assert 0 <= min(delays) < longest * 0.2
            assert longest * 0.8 < max(delays) <= longest

    @pytest.mark.parametrize(
        "options",
        [{"max_attempts": 0}, {"base": -1}, {"factor": 0.5}, {"max_delay": -1}, {"jitter": "some"}],
    )
    def test_policies_that_make_no_sense_are_refused(self, options: dict[str, Any]) -> None:
        from utils import RetryPolicy

        with pytest.raises(ValueError, match=next(iter(options))):
            RetryPolicy(**options)

    def test_a_restart_neither_loses_nor_shortens_the_wait(
        self, make_scheduler: Callable[..., Any], clock: Any, soon: Any, tmp_path: Path
    ) -> None:
        from utils import RetryPolicy, Task

        policy = RetryPolicy(max_attempts=2, base=100, jitter="none")
        path = str(tmp_path / "runs")
        first = make_scheduler(clock=clock).run()
        handle = first.submit(Task(func=samples.fail_times, args=(path, 1), retry=policy))
        soon(lambda: handle.status() == "retrying")
        first.shutdown()
        clock.advance(60)
        second = make_scheduler(store=first.store.path, clock=clock).run()
        again = second.handle(handle.id)
        second.get_statistics()
        assert again.status() == "retrying"
        clock.advance(40)

        assert again.result(10) == 2


class TestTime:
    def test_a_delayed_task_starts_at_its_time_also_after_a_restart(
        self, make_scheduler: Callable[..., Any], clock: Any
    ) -> None:
        from utils import Task

        first = make_scheduler(clock=clock).run()
        parent = first.submit(Task(func=samples.echo, args=(1,), delay=50))
        child = first.submit(Task(func=samples.echo, dependencies=[parent], run_at=clock.now + 100))
        first.get_statistics()
        first.shutdown()
        second = make_scheduler(store=first.store.path, clock=clock).run()
        clock.advance(50)
        assert second.handle(parent.id).result(10) == 1
        assert second.get_task_status(child.id)["state"] == "pending"
        clock.advance(50)

        assert second.handle(child.id).result(10) == 1

    def test_results_expire_and_say_so_but_not_before_children_have_them(
        self, make_scheduler: Callable[..., Any], clock: Any, monkeypatch: Any
    ) -> None:
        import engine
        from utils import ResultExpired, Task

        monkeypatch.setattr(engine, "TIDY_SECONDS", 0.0)
        scheduler = make_scheduler(clock=clock, result_ttl=100).run()
        parent = scheduler.submit(samples.echo, 1)
        child = scheduler.submit(
            Task(func=samples.echo, dependencies=[parent], run_at=clock.now + 200)
        )
        lonely = scheduler.submit(samples.echo, 2)
        assert (parent.result(10), lonely.result(10)) == (1, 2)
        clock.advance(150)
        scheduler.get_statistics()
        scheduler.get_statistics()

        with pytest.raises(ResultExpired):
            scheduler.handle(lonely.id).result(10)
        clock.advance(50)
        assert scheduler.handle(child.id).result(10) == 1

    def test_cleanup_goes_by_age_and_spares_parents_of_unfinished_tasks(
        self, make_scheduler: Callable[..., Any], clock: Any
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(clock=clock).run()
        old = scheduler.submit(samples.noop)
        parent = scheduler.submit(samples.noop)
        child = scheduler.submit(Task(func=samples.noop, dependencies=[parent], delay=10_000))
        old.result(10)
        parent.result(10)
        clock.advance(1000)
        young = scheduler.submit(samples.noop)
        young.result(10)

        assert scheduler.cleanup(500) == 1
        assert scheduler.cleanup(500) == 0
        for kept in (parent, child, young):
            scheduler.get_task_status(kept.id)
        with pytest.raises(KeyError):
            scheduler.get_task_status(old.id)
        assert scheduler.get_statistics()["states"] == {
            **dict.fromkeys(STATES, 0), "completed": 2, "pending": 1,
        }  # fmt: skip


def test_the_guarantees_hold_inside_a_running_event_loop_with_threads(
    make_scheduler: Callable[..., Any],
) -> None:
    async def main() -> list[int]:
        async with make_scheduler(store=None) as scheduler:
            handles = await scheduler.asubmit_many([])
            handles = [await scheduler.asubmit(samples.add, n, 1) for n in range(20)]
            return list(await asyncio.gather(*handles))

    assert asyncio.run(main()) == list(range(1, 21))
