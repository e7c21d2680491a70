"""What a user of the Python interface is promised."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples

pytestmark = [pytest.mark.integration, pytest.mark.anyio]


class TestResults:
    def test_functions_run_elsewhere_and_their_results_come_back(self, scheduler: Any) -> None:
        import os

        assert scheduler.submit(samples.add, 1, b=2).result(10) == 3
        assert scheduler.submit(samples.pid).result(10) != os.getpid()

    def test_lambdas_and_closures_run_in_processes(self, scheduler: Any) -> None:
        factor = 3

        assert scheduler.submit(lambda x: x * factor, 14).result(10) == 42

    def test_an_exception_arrives_with_its_remote_traceback(self, scheduler: Any) -> None:
        with pytest.raises(ValueError, match="boom") as caught:
            scheduler.submit(samples.boom).result(10)

        assert "samples.py" in str(caught.value.__cause__)

    async def test_schedule_task_tells_how_it_ended_without_raising(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task, TaskState

        async with make_scheduler() as scheduler:
            good = await scheduler.schedule_task(Task(id="good", func=samples.add, args=(1, 2)))
            bad = await scheduler.schedule_task(Task(id="bad", func=samples.boom))

        assert (good.output, good.status, good.error, good.attempts) == (
            3, TaskState.COMPLETED, None, 1,
        )  # fmt: skip
        assert good.duration >= 0
        assert (bad.output, bad.status, str(bad.error)) == (None, "failed", "boom")
        assert isinstance(bad.error, ValueError)

    async def test_handles_can_be_awaited_in_any_number(self, scheduler: Any) -> None:
        handles = [await scheduler.asubmit(samples.echo, n) for n in range(50)]

        assert await asyncio.gather(*handles) == list(range(50))
        with pytest.raises(ValueError, match="boom"):
            await scheduler.submit(samples.boom)

    def test_result_with_a_timeout_leaves_the_task_alone(
        self, scheduler: Any, tmp_path: Path
    ) -> None:
        handle = scheduler.submit(samples.wait_for, str(tmp_path / "go"))
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        (tmp_path / "go").touch()

        assert handle.result(10) == str(tmp_path / "go")

    def test_callbacks_run_once_in_order_even_if_one_fails_or_comes_late(
        self, scheduler: Any
    ) -> None:
        seen: list[Any] = []
        done = threading.Event()
        handle = scheduler.submit(samples.noop)
        handle.add_done_callback(lambda h: seen.append((1, h)))
        handle.add_done_callback(lambda _: 1 / 0)
        handle.add_done_callback(lambda _: seen.append(2))
        handle.add_done_callback(lambda _: done.set())
        assert done.wait(10)
        handle.add_done_callback(lambda _: seen.append(3))

        assert seen == [(1, handle), 2, 3]

    def test_waiting_for_a_task_in_a_callback_is_refused_instead_of_hanging(
        self, scheduler: Any
    ) -> None:
        found: list[BaseException] = []
        done = threading.Event()

        def callback(_: Any) -> None:
            try:
                scheduler.submit(samples.noop).result()
            except RuntimeError as error:
                found.append(error)
            done.set()

        scheduler.submit(samples.noop).add_done_callback(callback)

        assert done.wait(10)
        assert "cannot wait" in str(found[0])

    def test_nothing_of_an_ended_task_is_kept_alive(self, scheduler: Any, soon: Any) -> None:
        class Argument:
            pass

        argument = Argument()
        seen = weakref.ref(argument)
        scheduler.submit_call(lambda value: None, (argument,), kind="io").result(10)
        del argument

        soon(lambda: gc.collect() is not None and seen() is None)


class TestWhatCannotBePickled:
    def test_an_argument_is_named_and_nothing_is_stored(self, scheduler: Any) -> None:
        from utils import NotSerializable

        with pytest.raises(NotSerializable, match=r"Argument 2 .*lock"):
            scheduler.submit(samples.add, 1, threading.Lock())

        assert scheduler.get_statistics()["total"] == 0

    @pytest.mark.parametrize(
        ("func", "error", "text"),
        [
            (samples.return_lock, "ResultNotSerializable", "lock"),
            (samples.raise_two, "RemoteError", "1 and 2"),
            (samples.raise_unpicklable, "RemoteError", "stays here"),
            (samples.leave, "SystemExit", "4"),
        ],
    )
    def test_a_result_or_error_that_cannot_travel_fails_clearly_and_the_worker_lives(
        self, make_scheduler: Callable[..., Any], func: Any, error: str, text: str
    ) -> None:
        scheduler = make_scheduler(num_workers=1).run()
        before = scheduler.submit(samples.pid).result(10)

        outcome = scheduler.submit(func).outcome(10)

        assert outcome.status == "failed"
        assert type(outcome.error).__name__ == error
        assert text in str(outcome.error)
        assert scheduler.submit(samples.pid).result(10) == before

    def test_a_result_that_explodes_here_leaves_the_engine_alive(self, scheduler: Any) -> None:
        with pytest.raises(RuntimeError, match="unpickled elsewhere"):
            scheduler.submit(samples.return_explosive).result(10)

        assert scheduler.submit(samples.add, 1, 2).result(10) == 3

    def test_a_result_over_the_limit_fails_and_large_ones_below_it_arrive(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import ResultTooLarge

        scheduler = make_scheduler(result_limit=3_000_000).run()

        assert len(scheduler.submit(samples.sized, 2_900_000).result(20)) == 2_900_000
        with pytest.raises(ResultTooLarge, match="3,000,000"):
            scheduler.submit(samples.sized, 3_100_000).result(20)
        assert len(scheduler.submit(samples.echo, bytes(5_000_000)[:2_000_000]).result(20)) == 2e6

    def test_threads_of_a_private_store_take_what_cannot_be_pickled(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import NotSerializable, Task

        lock = threading.Lock()
        private, lasting = make_scheduler(store=None).run(), make_scheduler().run()

        assert private.submit(Task(func=lock.acquire, kind="io")).result(10) is True
        with pytest.raises(NotSerializable):
            lasting.submit(Task(func=lock.acquire, kind="io"))


class TestIdentity:
    async def test_a_known_id_with_the_same_request_is_that_task(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import DuplicateTask, Task

        async with make_scheduler() as scheduler:
            task = Task(id="a", func=samples.append, args=(str(tmp_path / "runs"), "x"))
            first = await scheduler.schedule_task(task)
            again = await scheduler.schedule_task(task)
            with pytest.raises(DuplicateTask, match="'a'"):
                await scheduler.schedule_task(Task(id="a", func=samples.add, args=(1, 1)))

        assert (first.output, again.output) == ("x", "x")
        assert (tmp_path / "runs").read_text() == "x\n"

    def test_an_idempotency_key_means_one_task_and_another_request_is_refused(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import IdempotencyConflict, Task

        def task(value: int) -> Task:
            return Task(func=samples.echo, args=(value,), idempotency_key="k")

        scheduler = make_scheduler().run()
        handles = [scheduler.submit(task(1)) for _ in range(5)]
        handles += scheduler.submit_many([task(1), task(1)])
        with pytest.raises(IdempotencyConflict):
            scheduler.submit(task(2))
        path = scheduler.store.path
        scheduler.shutdown()
        after = make_scheduler(store=path).run()

        assert len({handle.id for handle in handles}) == 1
        assert after.submit(task(1)).id == handles[0].id
        assert after.submit(task(1)).result(10) == 1
        with pytest.raises(IdempotencyConflict):
            after.submit(task(2))

    def test_unknown_ids_are_key_errors(self, scheduler: Any) -> None:
        for ask in (
            scheduler.get_task_status, scheduler.cancel_task, scheduler.retry_task,
            scheduler.handle,
        ):  # fmt: skip
            with pytest.raises(KeyError, match="no task 'nobody'"):
                ask("nobody")

    def test_a_registered_name_stands_for_its_function_and_defaults(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import NotRegistered, Registry, Task, TaskPriority, task

        registry = Registry()
        task(name="add", registry=registry, priority=TaskPriority.HIGH, timeout=7)(samples.add)
        scheduler = make_scheduler(registry=registry).run()
        try:
            handle = scheduler.submit("add", 1, 2)
            assert handle.result(10) == 3
            status = scheduler.get_task_status(handle.id)
            assert (status["name"], status["priority"], status["timeout"]) == ("add", 1, 7)
            with pytest.raises(NotRegistered, match="there are: add"):
                scheduler.submit(Task(func="subtract"))
        finally:
            del samples.add.__registered__  # type: ignore[attr-defined]


class TestPriority:
    def test_behind_a_blocked_worker_tasks_start_in_the_order_of_a_stable_sort(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        import random

        from utils import Task, TaskPriority

        scheduler = make_scheduler(num_workers=1).run()
        go, log = tmp_path / "go", str(tmp_path / "order")
        blocker = scheduler.submit(samples.wait_for, str(go))
        chance = random.Random(3)
        wanted = [(chance.choice(list(TaskPriority)), n) for n in range(200)]
        handles = [
            scheduler.submit(Task(func=samples.append, args=(log, str(n)), priority=level))
            for level, n in wanted
        ]
        go.touch()
        blocker.result(10)
        for handle in handles:
            handle.result(10)

        expected = [str(n) for _, n in sorted(wanted, key=lambda each: each[0])]
        assert Path(log).read_text().split() == expected

    @pytest.mark.parametrize("priority", ["critical", "CRITICAL", 0])
    def test_priorities_have_names_and_numbers(self, scheduler: Any, priority: Any) -> None:
        task_id = scheduler.submit_task(samples.noop, priority=priority)
        assert scheduler.get_task_status(task_id)["priority"].name == "CRITICAL"
        with pytest.raises(ValueError, match="CRITICAL, HIGH, NORMAL, LOW"):
            scheduler.submit_task(samples.noop, priority="urgent")


class TestBlockedProcesses:
    def test_io_and_async_tasks_finish_while_all_processes_are_blocked(
        self, scheduler: Any, tmp_path: Path
    ) -> None:
        from utils import Task

        async def double(x: int) -> int:
            await asyncio.sleep(0)
            return 2 * x

        go = tmp_path / "go"
        blocked = [scheduler.submit(samples.wait_for, str(go)) for _ in range(4)]
        io = [scheduler.submit(Task(func=samples.echo, args=(n,), kind="io")) for n in range(100)]
        coroutines = [scheduler.submit(double, n) for n in range(100)]

        assert [handle.result(10) for handle in io] == list(range(100))
        assert [handle.result(10) for handle in coroutines] == [2 * n for n in range(100)]
        assert not any(handle.done() for handle in blocked)
        go.touch()
        for handle in blocked:
            handle.result(10)

    def test_undeclared_functions_run_in_processes_unless_asked_otherwise(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        import os

        scheduler = make_scheduler(default_kind="io").run()

        assert scheduler.submit(samples.pid).result(10) == os.getpid()
        assert scheduler.submit_call(samples.pid, kind="cpu").result(10) != os.getpid()

    def test_a_task_may_submit_and_wait_with_one_worker_from_a_thread(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(num_workers=1, store=None).run()

        def outer() -> int:
            return int(scheduler.submit(samples.add, 1, 2).result(10)) + 1

        assert scheduler.submit(Task(func=outer, kind="io")).result(10) == 4


class TestBounds:
    def test_one_more_than_max_tasks_is_refused_until_one_has_ended(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import SchedulerFull, Task

        scheduler = make_scheduler(max_tasks=3).run()
        go = str(tmp_path / "go")
        handles = [scheduler.submit(samples.wait_for, go) for _ in range(3)]
        with pytest.raises(SchedulerFull, match="max_tasks"):
            scheduler.submit(samples.noop)
        with pytest.raises(SchedulerFull):
            scheduler.submit_many([Task(func=samples.noop)])
        waiting = threading.Thread(
            target=lambda: handles.append(scheduler.submit_call(samples.noop, block=True))
        )
        waiting.start()
        Path(go).touch()
        waiting.join(10)
        for handle in handles:
            handle.result(10)

        assert len(handles) == 4
        assert scheduler.submit(samples.add, 1, 1).result(10) == 2

    def test_a_refused_batch_leaves_nothing_and_takes_no_room(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import CyclicDependency, Task, UnknownDependency

        scheduler = make_scheduler(max_tasks=4).run()
        for _ in range(5):
            with pytest.raises(UnknownDependency, match="'nobody'"):
                scheduler.submit_many(
                    [Task(func=samples.noop), Task(func=samples.noop, dependencies=["nobody"])]
                )
            with pytest.raises(CyclicDependency, match=r"'a' -> 'b' -> 'a'|'b' -> 'a' -> 'b'"):
                scheduler.submit_many(
                    [
                        Task("a", samples.noop, dependencies=["b"]),
                        Task("b", samples.noop, dependencies=["a"]),
                    ]
                )
            with pytest.raises(CyclicDependency, match="itself"):
                scheduler.submit(Task("c", samples.noop, dependencies=["c"]))

        assert scheduler.store.counts() == {}
        assert scheduler.submit(samples.add, 1, 1).result(10) == 2

    @pytest.mark.parametrize(
        "options",
        [
            {"num_workers": 0}, {"num_workers": -1}, {"thread_workers": 0}, {"max_tasks": 0},
            {"durability": "maybe"}, {"default_timeout": 0}, {"default_kind": "gpu"},
            {"max_crashes": 0}, {"num_workers": 1.5},
        ],
    )  # fmt: skip
    def test_options_that_make_no_sense_are_refused(self, options: dict[str, Any]) -> None:
        from utils import TaskScheduler

        with pytest.raises(ValueError, match=next(iter(options)) + "|number of workers"):
            TaskScheduler(**options)

    @pytest.mark.parametrize(
        ("task", "error"),
        [
            ({"func": None}, TypeError),
            ({"func": 5}, TypeError),
            ({"func": samples.noop, "timeout": -1}, ValueError),
            ({"func": samples.noop, "timeout": float("nan")}, ValueError),
            ({"func": samples.noop, "delay": -1}, ValueError),
            ({"func": samples.noop, "id": ""}, ValueError),
            ({"func": samples.noop, "kind": "gpu"}, ValueError),
            ({"func": samples.noop, "dependencies": [5]}, TypeError),
        ],
    )
    def test_tasks_that_make_no_sense_are_refused(
        self, scheduler: Any, task: dict[str, Any], error: type[Exception]
    ) -> None:
        from utils import Task

        with pytest.raises(error):
            scheduler.submit(Task(**task))


class TestContext:
    def test_a_running_task_tells_its_progress_and_keeps_lines(
        self, scheduler: Any, tmp_path: Path
    ) -> None:
        from utils import Task

        marker = tmp_path / "told"
        for kind in ("cpu", "io"):
            handle = scheduler.submit(Task(func=samples.tell, args=(str(marker),), kind=kind))
            assert handle.result(10) == 1
            status = scheduler.get_task_status(handle.id)
            assert (status["progress"], status["log"]) == (0.5, ["one", "two"])

    def test_outside_of_a_task_there_is_no_context(self) -> None:
        from utils import current_task

        with pytest.raises(LookupError, match="inside a running task"):
            current_task()


class TestShutdown:
    def test_it_drains_then_refuses_and_may_be_repeated(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import SchedulerClosed

        scheduler = make_scheduler().run()
        handles = [scheduler.submit(samples.nap, 0.01) for _ in range(20)]
        threads = [threading.Thread(target=scheduler.shutdown) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        scheduler.shutdown()

        assert [handle.result(0) for handle in handles] == [0.01] * 20
        with pytest.raises(SchedulerClosed):
            scheduler.submit(samples.noop)
        with pytest.raises(SchedulerClosed):
            scheduler.scale_workers(3)
        assert handles[0].status() == "completed"  # a store that lasts can still be read

    def test_without_waiting_it_is_quick_and_leaves_the_work_in_the_store(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import SchedulerClosed

        scheduler = make_scheduler().run()
        marker = tmp_path / "go"
        handles = [scheduler.submit(samples.wait_for, str(marker)) for _ in range(5)]
        scheduler.get_task_status(handles[-1].id)
        began = time.monotonic()
        scheduler.shutdown(wait=False)
        took = time.monotonic() - began
        with pytest.raises(SchedulerClosed):
            handles[0].result(5)
        marker.touch()
        after = make_scheduler(store=scheduler.store.path).run()

        assert took < 2  # loaded machines included
        assert [after.handle(each.id).result(10) for each in handles] == [str(marker)] * 5
        assert after.get_task_status(handles[0].id)["attempts"] == 1

    def test_after_its_timeout_running_tasks_are_killed_and_stay_queued(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        scheduler = make_scheduler().run()
        handle = scheduler.submit(samples.spin, str(tmp_path / "spins"))
        soon((tmp_path / "spins").exists)
        scheduler.shutdown(timeout=0.05)
        after = make_scheduler(store=scheduler.store.path).initialize()

        assert after.get_task_status(handle.id)["state"] == "queued"

    def test_cancel_pending_cancels_what_has_not_begun(
        self, make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(num_workers=1).run()
        go, marker = tmp_path / "go", tmp_path / "runs"
        running = scheduler.submit(samples.wait_for, str(go), str(marker))
        later = [scheduler.submit(samples.noop) for _ in range(5)]
        later.append(scheduler.submit(Task(func=samples.noop, delay=3600)))
        soon(marker.exists)
        closing = threading.Thread(target=lambda: scheduler.shutdown(cancel_pending=True))
        closing.start()
        assert [handle.outcome(10).status for handle in later] == ["cancelled"] * 6
        go.touch()
        closing.join(10)

        assert running.result(0) == str(go)

    def test_a_forgotten_scheduler_frees_its_processes(self, soon: Any) -> None:
        import psutil

        from utils import TaskScheduler

        scheduler = TaskScheduler(1)
        pid = scheduler.submit(samples.pid).result(10)
        del scheduler
        gc.collect()

        soon(lambda: not psutil.pid_exists(pid))

    def test_an_exception_in_the_body_still_ends_it(self) -> None:
        from utils import TaskScheduler

        with pytest.raises(ZeroDivisionError), TaskScheduler(1) as scheduler:
            handle = scheduler.submit(samples.add, 1, 2)
            raise ZeroDivisionError
        assert handle.result(0) == 3
