"""Processes: killed for a reason, replaced at once, never at the cost of a bystander."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import samples

pytestmark = pytest.mark.integration


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class TestTimeouts:
    @pytest.mark.parametrize("start_method", ["zygote", "spawn"])
    @pytest.mark.parametrize(
        ("func", "marked"),
        [(samples.spin, True), (samples.long_sleep, False), (samples.long_c_loop, False),
         (samples.stubborn, True)],
    )  # fmt: skip
    def test_whatever_a_task_does_it_ends_in_time(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, func: Any, marked: bool,
        start_method: str,
    ) -> None:  # fmt: skip
        from utils import Task, TaskTimedOut

        scheduler = make_scheduler(num_workers=1, start_method=start_method).run()
        scheduler.submit(samples.noop).result(20)
        args = (str(tmp_path / "pid"),) if marked else ()

        began = time.monotonic()
        outcome = scheduler.submit(Task(func=func, args=args, timeout=0.15)).outcome(10)
        took = time.monotonic() - began

        assert outcome.status == "timed_out"
        assert isinstance(outcome.error, TaskTimedOut)
        assert 0.15 <= took < 0.15 + 1.5  # the goal of 0.1 s is the benchmark's
        assert scheduler.submit(samples.add, 1, 1).result(20) == 2

    def test_the_time_counts_from_the_real_start_not_from_the_submit(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(num_workers=1).run()
        handles = [
            scheduler.submit(Task(func=samples.nap, args=(0.06,), timeout=0.4)) for _ in range(12)
        ]

        assert [handle.outcome(20).status for handle in handles] == ["completed"] * 12

    def test_io_and_async_tasks_time_out_and_their_slots_come_back(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        import asyncio

        from utils import Task

        release = threading.Event()

        async def forever() -> None:
            while not release.is_set():  # its loop is closed at the end of the test
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()

        scheduler = make_scheduler(store=None, thread_workers=1).run()
        thread = scheduler.submit(Task(func=release.wait, kind="io", timeout=0.05))
        coroutine = scheduler.submit(Task(func=forever, timeout=0.05))

        assert thread.outcome(10).status == coroutine.outcome(10).status == "timed_out"
        assert scheduler.submit(Task(func=samples.add, args=(1, 1), kind="io")).result(10) == 2
        assert scheduler.get_statistics()["threads_abandoned"] == 1
        release.set()

    def test_a_coroutine_that_blocks_its_loop_does_not_hold_up_others_for_ever(
        self, make_scheduler: Callable[..., Any], monkeypatch: Any
    ) -> None:
        import backends
        from utils import Task

        release = threading.Event()
        entered = threading.Event()

        async def block() -> None:
            entered.set()
            release.wait(60)

        async def quick() -> int:
            return 1

        monkeypatch.setattr(backends, "LOOP_SECONDS", 0.05)
        scheduler = make_scheduler(store=None).run()
        blocking = scheduler.submit(Task(func=block, timeout=0.1))
        assert entered.wait(10)
        behind = [scheduler.submit(quick) for _ in range(5)]

        assert blocking.outcome(10).status == "timed_out"
        assert [handle.outcome(10).output for handle in behind] == [1] * 5
        assert [handle.outcome(0).attempts for handle in behind] == [1] * 5
        release.set()


class TestCancelling:
    def test_a_running_lambda_is_ended_and_the_worker_replaced(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        from utils import DistributedScheduler, TaskCancelled

        scheduler = make_scheduler(DistributedScheduler, num_workers=1)
        scheduler.initialize()
        marker = str(tmp_path / "pid")
        task_id = scheduler.submit_task(lambda: samples.spin(marker))
        scheduler.run()
        soon(lambda: Path(marker).exists() and Path(marker).read_text())

        began = time.monotonic()
        assert scheduler.cancel_task(task_id) is True
        assert time.monotonic() - began < 1
        assert scheduler.cancel_task(task_id) is True
        soon(lambda: gone(int(Path(marker).read_text())))
        with pytest.raises(TaskCancelled):
            scheduler.handle(task_id).result(5)
        done = scheduler.submit(samples.add, 1, 1)
        assert done.result(10) == 2
        assert done.cancel() is False

    def test_what_lies_in_a_workers_buffer_is_cancelled_without_hurting_what_runs(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        scheduler = make_scheduler(num_workers=1, max_tasks=10_000).run()
        for handle in [scheduler.submit(samples.many_then_wait, "", n) for n in range(1, 50)]:
            handle.result(10)  # now the name is known to be short
        go = str(tmp_path / "go")
        blocker = scheduler.submit(samples.many_then_wait, go, 0)
        behind = [scheduler.submit(samples.many_then_wait, "", n) for n in range(1, 20)]

        assert [handle.cancel() for handle in behind[:10]] == [True] * 10
        Path(go).touch()
        assert blocker.result(10) == go
        assert [handle.result(10) for handle in behind[10:]] == [str(n) for n in range(11, 20)]
        assert blocker.outcome(0).attempts == 1
        assert scheduler.get_statistics()["worker_deaths"] == 0

    @pytest.mark.load
    def test_cancelled_is_what_cancel_says_at_any_moment(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        scheduler = make_scheduler(max_tasks=20_000).run()
        chance = random.Random(5)
        verdicts: dict[str, bool] = {}
        handles = []
        for n in range(2_000):
            handles.append(scheduler.submit(samples.nap, 0.0002 if n % 10 else 0.003))
            if n % 50 == 0:
                handles[-1].outcome(30)  # so that others meet tasks that run, or have ended
            if chance.random() < 0.3:
                handle = chance.choice(handles[-30:])
                verdicts[handle.id] = handle.cancel()
        for handle in handles:
            outcome = handle.outcome(30)
            said = verdicts.get(handle.id, False)
            assert (outcome.status == "cancelled") == said, (outcome, said)
        assert any(verdicts.values())
        assert not all(verdicts.values())


class TestCrashes:
    def test_a_killed_worker_costs_its_task_one_crash_and_others_nothing(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        scheduler = make_scheduler(max_tasks=2_000).run()
        marker, go = tmp_path / "pid", tmp_path / "go"
        victim = scheduler.submit(samples.wait_for, str(go), str(marker))
        pid = int(soon(lambda: marker.exists() and marker.read_text()))
        others = [scheduler.submit(samples.nap, 0.001) for _ in range(500)]
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        soon(lambda: gone(pid))
        soon(lambda: sum(w["state"] in ("busy", "idle")
             for w in scheduler.get_statistics()["workers"]) == 2)  # fmt: skip
        replaced = time.monotonic() - began
        go.touch()

        assert victim.result(20) == str(go)
        assert all(handle.outcome(20).attempts == 1 for handle in others)
        status = scheduler.get_task_status(victim.id)
        assert (status["attempts"], status["crashes"]) == (1, 1)
        assert replaced < 3

    def test_a_poison_task_runs_max_crashes_times_and_fails_by_name(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import RetryPolicy, Task, WorkerCrashed

        scheduler = make_scheduler(max_crashes=3).run()
        log = str(tmp_path / "runs")
        others = [scheduler.submit(samples.echo, n) for n in range(100)]

        with pytest.raises(WorkerCrashed, match=r"3 times.*signal 9"):
            scheduler.submit(
                Task(func=samples.die, args=(log,), retry=RetryPolicy(max_attempts=5))
            ).result(20)
        with pytest.raises(WorkerCrashed, match="exit code 3"):
            scheduler.submit(samples.exit_now).result(20)

        assert Path(log).read_text().split() == ["died"] * 3
        assert [handle.result(10) for handle in others] == list(range(100))

    def test_what_was_finished_before_the_kill_is_not_run_again(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        scheduler = make_scheduler(num_workers=1).run()
        log = str(tmp_path / "runs")
        for handle in [scheduler.submit(samples.append, log, str(n)) for n in range(50)]:
            handle.result(10)
        before = [scheduler.submit(samples.append, log, str(n)) for n in range(50, 60)]
        survivor = scheduler.submit(samples.die_once, str(tmp_path / "once"))

        assert survivor.result(20) == "survived"
        assert [handle.result(10) for handle in before] == [str(n) for n in range(50, 60)]
        assert sorted(map(int, Path(log).read_text().split())) == list(range(60))

    @pytest.mark.kill
    def test_a_hundred_killed_workers_lose_nothing_of_twenty_thousand_tasks(
        self, make_scheduler: Callable[..., Any], soon: Callable[..., Any]
    ) -> None:
        scheduler = make_scheduler(max_tasks=30_000, max_crashes=50).run()
        chance = random.Random(11)
        handles = [scheduler.submit(samples.echo, n) for n in range(14_000)]
        killed: set[int] = set()
        rest = iter(range(14_000, 20_000))

        def fresh() -> list[int]:  # one that dies before it is ready is replaced later and later
            workers = scheduler.get_statistics()["workers"]
            return sorted({w["pid"] for w in workers if w["state"] != "starting"} - killed - {None})

        for _ in range(100):
            handles += [scheduler.submit(samples.echo, n) for n in islice(rest, 60)]
            killed.add(pid := chance.choice(soon(fresh, 60)))
            os.kill(pid, signal.SIGKILL)
        handles += [scheduler.submit(samples.echo, n) for n in rest]
        assert [handle.result(60) for handle in handles] == list(range(20_000))
        assert all(handle.outcome(0).attempts == 1 for handle in handles)
        assert scheduler.get_statistics()["worker_deaths"] == 100

    def test_a_killed_zygote_is_replaced_with_its_workers(
        self, make_scheduler: Callable[..., Any], soon: Any
    ) -> None:
        scheduler = make_scheduler(num_workers=1).run()
        worker = scheduler.submit(samples.pid).result(10)
        parent = psutil.Process(worker).parent()
        assert parent is not None
        parent.kill()
        soon(lambda: gone(worker))

        assert scheduler.submit(samples.add, 1, 1).result(20) == 2

    @pytest.mark.parametrize("start_method", ["zygote", "spawn"])
    def test_a_task_that_forks_does_not_become_two_workers(
        self, make_scheduler: Callable[..., Any], start_method: str
    ) -> None:
        scheduler = make_scheduler(num_workers=1, start_method=start_method).run()

        assert scheduler.submit(samples.fork_and_return).result(20) == "parent"
        assert [scheduler.submit(samples.echo, n).result(20) for n in range(20)] == list(range(20))

    def test_killing_a_task_ends_its_descendants(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        scheduler = make_scheduler(num_workers=1).run()
        marker = tmp_path / "pids"
        handle = scheduler.submit(samples.grandchildren, str(marker))
        pids = [int(pid) for pid in soon(lambda: marker.exists() and marker.read_text()).split()]

        assert len(pids) == 3
        assert handle.cancel() is True
        soon(lambda: all(gone(pid) for pid in pids))


class TestPrefetch:
    def test_what_is_stuck_behind_a_long_task_is_taken_back_and_runs_elsewhere(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        scheduler = make_scheduler(num_workers=2, max_tasks=10_000).run()
        for handle in [scheduler.submit(samples.many_then_wait, "", n) for n in range(1, 400)]:
            handle.result(10)
        go = str(tmp_path / "go")
        mixed = [
            scheduler.submit(samples.many_then_wait, go, 0 if n == 5 else n) for n in range(1, 300)
        ]
        done = [handle.result(10) for n, handle in enumerate(mixed, 1) if n != 5]

        assert len(done) == 298
        assert not mixed[4].done()
        Path(go).touch()
        assert mixed[4].result(10) == go

    def test_a_critical_task_does_not_wait_behind_a_backlog(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task, TaskPriority

        scheduler = make_scheduler(max_tasks=10_000).run()
        low = [
            scheduler.submit(Task(func=samples.nap, args=(0.01,), priority=TaskPriority.LOW))
            for _ in range(150)
        ]
        critical = scheduler.submit(Task(func=samples.noop, priority=TaskPriority.CRITICAL))
        critical.result(10)

        assert sum(not handle.done() for handle in low) > 100


class TestScaling:
    def test_up_and_down_under_load_loses_nothing_and_runs_nothing_twice(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        scheduler = make_scheduler(num_workers=1, max_tasks=10_000).run()
        log = str(tmp_path / "runs")
        handles = []
        for number in (8, 1, 5, 2):
            handles += [scheduler.submit(samples.append, log, str(n)) for n in range(300)]
            scheduler.scale_workers(number)
        for handle in handles:
            handle.result(30)

        assert len(Path(log).read_text().split()) == 1200
        soon(lambda: len(scheduler.get_statistics()["workers"]) == 2)
        with pytest.raises(ValueError, match="number of workers"):
            scheduler.scale_workers(0)

    def test_going_down_waits_for_what_runs(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        scheduler = make_scheduler(num_workers=3).run()
        go = str(tmp_path / "go")
        handles = [scheduler.submit(samples.wait_for, go) for _ in range(3)]
        soon(lambda: scheduler.get_statistics()["states"]["running"] == 3)
        scheduler.scale_workers(1)
        draining = scheduler.get_statistics()["workers"]
        Path(go).touch()

        assert sum(w["state"] == "draining" for w in draining) == 2
        assert [handle.outcome(10).attempts for handle in handles] == [1, 1, 1]
        soon(lambda: len(scheduler.get_statistics()["workers"]) == 1)
