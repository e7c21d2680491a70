"""What tasks, callers and disks may do to the scheduler, and what it does not do then: end."""

import itertools
import os
import resource
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples

pytestmark = pytest.mark.integration
SURROGATE = "file-\udcff.txt"  # as file names come that are not UTF-8


def parent_of(pid: int) -> int:
    import psutil

    return int(psutil.Process(pid).ppid())


def works(scheduler: Any) -> bool:
    return bool(scheduler.submit(samples.add, 1, 1).result(20) == 2)


class TestCallers:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"run_at": "soon"}, TypeError),
            ({"run_at": float("nan")}, ValueError),
            ({"run_at": float("inf")}, ValueError),
            ({"run_at": -1}, ValueError),
            ({"delay": float("inf")}, ValueError),
            ({"delay": "1"}, TypeError),
            ({"timeout": "1"}, TypeError),
            ({"retry": 3}, TypeError),
            ({"name": ("a",)}, TypeError),
            ({"name": SURROGATE}, ValueError),
            ({"name": "x" * 201}, ValueError),
            ({"id": SURROGATE}, ValueError),
            ({"id": 5}, TypeError),
            ({"idempotency_key": ("a",)}, TypeError),
            ({"idempotency_key": SURROGATE}, ValueError),
            ({"idempotency_key": ""}, ValueError),
        ],
    )
    def test_what_could_not_be_stored_is_refused_at_the_submit(
        self, scheduler: Any, options: dict[str, Any], error: type[Exception]
    ) -> None:
        from utils import Task

        (name,) = options
        with pytest.raises(error, match=name):
            scheduler.submit(Task(func=samples.noop, **options))

        assert scheduler.store.counts() == {}
        assert works(scheduler)

    def test_a_placeholder_makes_a_parent_of_any_age_and_an_unknown_one_is_refused(
        self, scheduler: Any
    ) -> None:
        from utils import Result, UnknownDependency

        old = scheduler.submit(samples.echo, 20)
        assert old.result(10) == 20
        assert scheduler.submit(samples.add, 1, Result(old.id)).result(10) == 21
        assert scheduler.submit_call(samples.add, (1, Result(old.id))).result(10) == 21
        with pytest.raises(UnknownDependency, match="'nobody'"):
            scheduler.submit(samples.echo, [Result("nobody")])
        with pytest.raises(TypeError, match="id or a handle"):
            scheduler.submit(samples.echo, Result(5))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"Result\(handle.id\)"):
            scheduler.submit(samples.echo, old)
        assert works(scheduler)

    @pytest.mark.parametrize("number", [0, -1, 513, "3", 2.0, True, None])
    def test_numbers_of_workers_that_make_no_sense_change_nothing(
        self, scheduler: Any, number: Any
    ) -> None:
        with pytest.raises(ValueError, match="number of workers"):
            scheduler.scale_workers(number)
        assert scheduler.get_statistics()["slots"]["cpu"] == 2
        assert works(scheduler)

    def test_a_cleanup_of_the_future_is_refused(self, scheduler: Any) -> None:
        for seconds in (-1, float("nan")):
            with pytest.raises(ValueError, match="older_than"):
                scheduler.cleanup(seconds)

    def test_a_task_may_wait_longer_than_the_system_can_sleep(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(result_ttl=None).run()
        handle = scheduler.submit(Task(func=samples.noop, delay=400 * 86_400))

        assert works(scheduler)
        assert handle.status() == "pending"

    def test_a_jump_of_the_clock_is_noticed_without_being_told(
        self, make_scheduler: Callable[..., Any], clock: Any, monkeypatch: Any
    ) -> None:
        import engine
        from utils import Task

        monkeypatch.setattr(engine, "CLOCK_SECONDS", 0.01)
        scheduler = make_scheduler(clock=clock).run()
        handle = scheduler.submit(Task(func=samples.echo, args=(1,), delay=3600))
        scheduler.get_statistics()
        clock.now += 3600  # nobody wakes the engine

        assert handle.result(10) == 1

    def test_a_callback_that_exits_ends_nothing(self, scheduler: Any) -> None:
        handle = scheduler.submit(samples.noop)
        handle.add_done_callback(lambda _: sys.exit(1))
        handle.result(10)

        assert works(scheduler)

    def test_many_short_waits_for_a_long_task_leave_nothing_behind(
        self, scheduler: Any, tmp_path: Path, soon: Any
    ) -> None:
        go = str(tmp_path / "go")
        first = scheduler.submit(samples.wait_for, go)
        seen = []
        for _ in range(20):
            handle = scheduler.handle(first.id)
            for each in (handle, first):
                with pytest.raises(TimeoutError):
                    each.result(0.001)
                assert not each.awaited()
            seen.append(weakref.ref(handle))
        del handle, each

        soon(lambda: all(ref() is None for ref in seen))
        Path(go).touch()
        assert first.result(10) == go

    def test_a_long_cycle_is_named_in_a_short_sentence(self, scheduler: Any) -> None:
        from utils import CyclicDependency, Task

        number = 5_000
        ring = [
            Task(f"t{n}", samples.noop, dependencies=[f"t{(n + 1) % number}"])
            for n in range(number)
        ]
        with pytest.raises(CyclicDependency, match="4,991 more") as caught:
            scheduler.submit_many(ring)

        assert len(str(caught.value)) < 300
        assert scheduler.store.counts() == {}

    def test_a_container_that_holds_itself_is_an_argument_like_any(self, scheduler: Any) -> None:
        ring: list[Any] = [1]
        ring.append(ring)

        assert len(scheduler.submit(samples.echo, ring).result(10)) == 2

    def test_input_beyond_the_limit_is_refused_or_fails_the_task(
        self, make_scheduler: Callable[..., Any], monkeypatch: Any
    ) -> None:
        import dispatch
        import payloads
        from utils import NotSerializable, ResultTooLarge, Task

        scheduler = make_scheduler().run()
        parents = [scheduler.submit(samples.sized, 60_000) for _ in range(2)]
        child = Task(func=samples.noop, dependencies=parents)
        monkeypatch.setattr(payloads, "INPUT_BYTES", 100_000)
        monkeypatch.setattr(dispatch, "INPUT_BYTES", 100_000)

        with pytest.raises(NotSerializable, match="100,000 are allowed"):
            scheduler.submit(samples.echo, bytes(100_001))
        with pytest.raises(ResultTooLarge, match="parents"):
            scheduler.submit(child).result(10)
        assert works(scheduler)

    def test_a_deep_chain_and_a_wide_fan_end_with_their_root(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(max_tasks=10_000).run()
        tasks = [Task("root", samples.boom)]
        tasks += [
            Task(f"c{n}", samples.noop, dependencies=[f"c{n - 1}" if n else "root"])
            for n in range(3_000)
        ]
        tasks += [Task(f"f{n}", samples.noop, dependencies=["root"]) for n in range(3_000)]
        scheduler.submit_many(tasks)

        for last in ("c2999", "f2999"):
            assert "boom" in scheduler.handle(last).outcome(30).error.cause
        assert scheduler.get_statistics()["states"]["failed"] == 6_001


def say_surrogates() -> None:
    from context import current_task

    current_task().log(SURROGATE)
    current_task().progress(0.5, SURROGATE)
    raise ValueError(SURROGATE)


def leave_a_thread_that_talks() -> int:
    from context import current_task

    task = current_task()

    def talk() -> None:
        while True:
            task.log("late")

    threading.Thread(target=talk, daemon=True).start()
    return os.getpid()


def talk_from_a_fork() -> None:
    from context import current_task

    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            current_task().log("child")
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    raise RuntimeError(os.read(reading, 1000).decode())


def talk_much() -> None:
    from context import current_task

    for n in range(20_000):
        current_task().log(f"{n}")


def use_memory() -> bytes:
    limit = 700 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return bytes(2**31)


def interrupt() -> None:
    raise KeyboardInterrupt("by the task")


def kill_the_group() -> None:
    os.killpg(0, signal.SIGKILL)


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def leave_the_session() -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.2)
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


def raise_no_text() -> None:
    raise NoText({"not": "a text"}, 5)


class TestTasks:
    @pytest.mark.parametrize("kind", ["cpu", "io"])
    def test_what_they_say_is_kept_whatever_its_characters(self, scheduler: Any, kind: Any) -> None:
        from utils import Task

        handle = scheduler.submit(Task(func=say_surrogates, kind=kind))

        assert handle.outcome(10).status == "failed"
        status = scheduler.get_task_status(handle.id)
        assert (status["error"], status["log"]) == (
            r"ValueError: file-\udcff.txt", [r"file-\udcff.txt"],
        )  # fmt: skip
        assert works(scheduler)

    def test_an_exception_larger_than_a_result_may_be_arrives_as_its_text(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import RemoteError

        scheduler = make_scheduler(result_limit=100_000).run()
        error = scheduler.submit(samples.boom, "x" * 200_000).exception(10)

        assert isinstance(error, RemoteError)
        assert str(error).startswith("ValueError: xxx")
        assert len(str(error)) < 3_000

    def test_a_coroutine_that_stops_its_loop_stops_nobody_else(self, scheduler: Any) -> None:
        import asyncio

        async def stop() -> int:
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0.01)
            return 1

        async def other() -> int:
            await asyncio.sleep(0.01)
            return 2

        handles = [scheduler.submit(each) for each in (stop, other, stop, other)]

        assert [handle.result(10) for handle in handles] == [1, 2, 1, 2]

    @pytest.mark.parametrize("kind", ["io", "cpu"])
    def test_a_fork_that_returns_is_no_second_scheduler(self, scheduler: Any, kind: Any) -> None:
        from utils import Task

        handle = scheduler.submit(Task(func=samples.fork_and_return, kind=kind))

        assert handle.result(20) == "parent"
        assert works(scheduler)

    def test_without_descriptors_a_task_still_completes_or_times_out(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(num_workers=1).run()

        assert scheduler.submit(samples.close_descriptors, 7).result(10) == 7
        marker = tmp_path / "closed"
        args = (None, str(marker))
        stuck = scheduler.submit(Task(func=samples.close_descriptors, args=args, timeout=1))
        assert stuck.outcome(10).status == "timed_out"
        assert marker.exists()
        held = scheduler.submit(samples.close_descriptors, None, str(marker))
        assert held.cancel() is True
        assert works(scheduler)

    def test_a_thread_that_is_left_behind_disturbs_no_later_task(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        scheduler = make_scheduler(num_workers=1).run()
        pid = scheduler.submit(leave_a_thread_that_talks).result(10)
        later = [scheduler.submit(samples.echo, "x" * n) for n in range(100)]

        assert [handle.result(20) for handle in later] == ["x" * n for n in range(100)]
        assert scheduler.get_task_status(later[-1].id)["log"] == []
        assert scheduler.submit(samples.pid).result(20) == pid

    def test_a_fork_of_a_task_cannot_speak_for_it(self, scheduler: Any) -> None:
        with pytest.raises(RuntimeError, match="forked by the task"):
            scheduler.submit(talk_from_a_fork).result(10)

    @pytest.mark.parametrize("kind", ["cpu", "io"])
    def test_the_last_lines_of_a_chatty_task_are_kept(self, scheduler: Any, kind: Any) -> None:
        from utils import Task

        handle = scheduler.submit(Task(func=talk_much, kind=kind))
        handle.result(30)
        lines = scheduler.get_task_status(handle.id)["log"]

        assert (len(lines), lines[-1]) == (100, "19999")

    @pytest.mark.parametrize(
        ("func", "status", "error"),
        [
            (use_memory, "failed", "MemoryError"),
            (interrupt, "failed", "KeyboardInterrupt"),
            (kill_the_group, "failed", "WorkerCrashed"),
            (kill_the_parent, "failed", "WorkerCrashed"),
            (leave_the_session, "timed_out", "TaskTimedOut"),
            (raise_no_text, "failed", "NoText"),
        ],
    )
    def test_whatever_they_do_they_end_and_the_next_one_runs(
        self, make_scheduler: Callable[..., Any], func: Any, status: str, error: str
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(num_workers=1, max_crashes=2).run()
        outcome = scheduler.submit(Task(func=func, timeout=2)).outcome(30)

        assert (outcome.status, type(outcome.error).__name__) == (status, error)
        assert works(scheduler)


def move_away(scheduler: Any) -> Callable[[], None]:
    """Take the files of a store away from under it; the answer puts them back."""
    moved = []
    for suffix in ("", "-wal", "-shm"):
        path = Path(f"{scheduler.store.path}{suffix}")
        moved.append((path.rename(f"{path}.away"), path))

    def back() -> None:
        for away, path in moved:
            away.rename(path)

    return back


class TestSystem:
    def test_files_that_are_removed_are_noticed_and_it_goes_on_when_they_are_back(
        self, make_scheduler: Callable[..., Any], soon: Any
    ) -> None:
        from utils import SchedulerFull, StoreUnavailable, Task

        scheduler = make_scheduler(max_tasks=2).run()
        assert works(scheduler)
        back = move_away(scheduler)
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            scheduler.submit_many([Task("a", samples.add, (1, 2))])
        with pytest.raises(StoreUnavailable, match="Nothing new is accepted"):
            scheduler.submit(samples.noop)
        assert not scheduler.engine.works()
        back()
        soon(scheduler.engine.works)

        assert scheduler.handle("a").result(10) == 3  # it had been taken, and shows now
        spins = [scheduler.submit(samples.spin) for _ in range(2)]  # room for two, as before
        with pytest.raises(SchedulerFull):
            scheduler.submit(samples.noop)
        for handle in spins:
            assert handle.cancel()

    def test_a_full_disk_refuses_loses_nothing_and_it_goes_on_when_there_is_room(
        self, make_scheduler: Callable[..., Any], soon: Any
    ) -> None:
        from utils import StoreUnavailable, Task

        scheduler = make_scheduler(max_tasks=10_000).run()
        assert works(scheduler)

        def limit(pages: int) -> None:  # SQLite answers as on a full disk
            scheduler.engine.ask(
                lambda: scheduler.store._writer.execute(f"PRAGMA max_page_count = {pages}")
            )

        limit(60)
        accepted: list[str] = []
        refused: list[str] = []
        for number in range(200):
            task = Task(f"t{number}", samples.sized, (10_000,))
            try:
                scheduler.submit_many([task])
                accepted.append(task.id or "")
            except StoreUnavailable as error:
                refused.append(str(error))
        assert "full" in refused[0]
        assert not scheduler.engine.works()
        assert scheduler.get_task_status(accepted[0])["id"] == accepted[0]  # reading goes on
        limit(1_000_000)
        soon(scheduler.engine.works)

        assert [len(scheduler.handle(each).result(20)) for each in accepted] == (
            [10_000] * len(accepted)
        )
        assert works(scheduler)

    def test_a_shutdown_does_not_wait_for_ever_for_a_store_that_takes_nothing(
        self, make_scheduler: Callable[..., Any], monkeypatch: Any
    ) -> None:
        import engine
        from utils import SchedulerClosed, StoreUnavailable, Task

        monkeypatch.setattr(engine, "GIVE_UP_SECONDS", 0.1)
        scheduler = make_scheduler().run()
        assert works(scheduler)
        back = move_away(scheduler)
        handle = scheduler.submit(samples.noop)
        with pytest.raises(StoreUnavailable):
            scheduler.submit_many([Task(func=samples.noop)])
        scheduler.shutdown()  # returns
        back()

        with pytest.raises(SchedulerClosed):
            handle.result(1)

    def test_without_descriptors_a_worker_is_replaced_once_there_are_some(
        self, make_scheduler: Callable[..., Any], soon: Any
    ) -> None:
        scheduler = make_scheduler(num_workers=1).run()
        pid = scheduler.submit(samples.pid).result(10)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        held: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            soon(lambda: scheduler.engine.backends["cpu"].deaths == 1)
            assert scheduler.engine.works()
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

        assert works(scheduler)

    def test_workers_that_cannot_start_are_tried_again_later_and_later(
        self, make_scheduler: Callable[..., Any], monkeypatch: Any, tmp_path: Path, soon: Any
    ) -> None:
        import launchers

        scheduler = make_scheduler(num_workers=1).run()
        folder = launchers.FOLDER
        starts: list[float] = []
        original = launchers.ZygoteLauncher.__init__

        def count(self: Any) -> None:
            starts.append(time.monotonic())
            original(self)

        pid = scheduler.submit(samples.pid).result(10)
        monkeypatch.setattr(launchers.ZygoteLauncher, "__init__", count)
        monkeypatch.setattr(launchers, "FOLDER", tmp_path)  # there is no zygote.py
        os.kill(parent_of(pid), signal.SIGKILL)
        soon(lambda: len(starts) >= 4)
        waits = [after - before for before, after in itertools.pairwise(starts)]
        monkeypatch.setattr(launchers, "FOLDER", folder)

        assert all(wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=False))
        assert works(scheduler)

    def test_a_refused_batch_gives_its_room_back_also_when_nobody_waits_any_more(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        import asyncio

        from utils import Task

        scheduler = make_scheduler(max_tasks=2).run()

        async def give_up() -> None:
            bad = Task(func=samples.noop, dependencies=["nobody"])
            asked = asyncio.ensure_future(scheduler.asubmit(bad))
            await asyncio.sleep(0)
            asked.cancel()

        for _ in range(5):
            asyncio.run(give_up())
        scheduler.get_statistics()

        assert [scheduler.submit(samples.echo, n) for n in range(2)][1].result(10) == 1


class TestSlots:
    @pytest.mark.unit
    @pytest.mark.parametrize("seed", range(5))
    def test_records_come_out_as_they_went_in_however_the_ring_wraps(self, seed: int) -> None:
        from mmap import mmap
        from random import Random

        from slots import DONE, SLOT_BYTES, Slot

        chance = Random(seed)
        memory = mmap(-1, SLOT_BYTES)
        worker, engine = Slot(memory), Slot(memory)
        sent: list[tuple[int, bytes]] = []
        taken: list[tuple[int, bytes]] = []
        for index in range(1, 2_000):
            payload = chance.randbytes(chance.choice((0, 1, 33, 1_000, 60_000)))
            while not worker.put(DONE, index, 1.0, 2.0, payload):
                taken += [(record[1], record[4]) for record in engine.take()]
            sent.append((index, payload))
        taken += [(record[1], record[4]) for record in engine.take()]

        assert taken == sent
        assert engine.take() == []

    @pytest.mark.unit
    def test_what_is_claimed_stays_and_what_is_revoked_is_refused(self) -> None:
        from mmap import mmap

        from slots import SLOT_BYTES, Slot

        memory = mmap(-1, SLOT_BYTES)
        worker, engine = Slot(memory), Slot(memory)
        assert engine.running() == (0, 0.0)
        assert worker.claim(1, 5.0)
        engine.revoke(2, 5)
        assert engine.running() == (1, 5.0)
        engine.revoke(3, 7)  # it has not passed the range before: that one grows

        assert [worker.claim(n, 6.0) for n in range(2, 9)] == [False] * 5 + [True, True]
        assert engine.running() == (8, 6.0)


def fail_then_die_then_succeed(path: str) -> int:
    """The first run raises, the second ends its process, the third returns."""
    runs = len(samples.append(path, "x") and Path(path).read_text().splitlines())
    if runs == 1:
        raise ValueError("first")
    if runs == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return runs


class TestRaces:
    def test_a_timeout_at_the_moment_of_completion_has_one_outcome(
        self, make_scheduler: Callable[..., Any]
    ) -> None:
        from utils import Task

        scheduler = make_scheduler(num_workers=2).run()
        handles = [
            scheduler.submit(Task(func=samples.nap, args=(0.01,), timeout=0.01 + n % 10 / 5_000))
            for n in range(150)
        ]
        outcomes = [handle.outcome(30) for handle in handles]

        for outcome in outcomes:
            row = scheduler.store.find(outcome.id)
            assert row["state"] == outcome.status
            assert (scheduler.store.result(row["seq"]) is not None) == (outcome.output == 0.01)
            ends = [e for e in scheduler.store.history(row["seq"]) if e["to_state"] not in
                    ("queued", "running")]  # fmt: skip
            assert [e["to_state"] for e in ends] == [outcome.status]
        assert "timed_out" in {outcome.status for outcome in outcomes}

    def test_failures_and_crashes_have_budgets_of_their_own(
        self, make_scheduler: Callable[..., Any], tmp_path: Path
    ) -> None:
        from utils import RetryPolicy, Task

        scheduler = make_scheduler(max_crashes=2).run()
        retry = RetryPolicy(max_attempts=2, base=0)
        task = Task(func=fail_then_die_then_succeed, args=(str(tmp_path / "runs"),), retry=retry)
        handle = scheduler.submit(task)

        assert handle.result(30) == 3
        status = scheduler.get_task_status(handle.id)
        assert (status["attempts"], status["crashes"]) == (2, 1)

    def test_a_key_from_many_threads_is_one_task(self, scheduler: Any) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from utils import Task

        def submit(_: int) -> str:
            task = Task(func=samples.add, args=(1, 2), idempotency_key="k")
            return str(scheduler.submit(task).id)

        with ThreadPoolExecutor(16) as pool:
            ids = set(pool.map(submit, range(200)))

        assert len(ids) == 1
        assert scheduler.handle(*ids).result(10) == 3
        assert scheduler.get_statistics()["total"] == 1

    @pytest.mark.parametrize("wait", [True, False])
    def test_submits_during_a_shutdown_are_taken_or_refused_and_never_hang(
        self, make_scheduler: Callable[..., Any], wait: bool
    ) -> None:
        from utils import SchedulerClosed, SchedulerFull, Task

        scheduler = make_scheduler(max_tasks=300).run()
        taken: list[Any] = []
        refused: list[Exception] = []
        begun = threading.Barrier(9)

        def submit(number: int) -> None:
            begun.wait()
            while True:
                try:
                    if number % 2:
                        taken.append(scheduler.submit_call(samples.echo, (1,), block=True))
                    else:
                        taken.extend(scheduler.submit_many([Task(func=samples.echo, args=(1,))]))
                except SchedulerFull:
                    time.sleep(0.001)
                except SchedulerClosed as error:
                    refused.append(error)
                    return

        threads = [threading.Thread(target=submit, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        begun.wait()
        scheduler.submit(samples.noop).result(20)
        scheduler.shutdown(wait=wait)
        for thread in threads:
            thread.join(30)

        assert len(refused) == 8
        for handle in taken:
            error = handle.exception(5)
            assert error is None if wait else error is None or isinstance(error, SchedulerClosed)

    def test_the_guard_may_be_killed_at_any_moment(
        self, make_scheduler: Callable[..., Any], soon: Any
    ) -> None:
        import random

        import psutil

        scheduler = make_scheduler(max_tasks=30_000, max_crashes=50).run()
        chance = random.Random(5)
        handles = [scheduler.submit(samples.echo, n) for n in range(2_000)]
        killed = 0
        while killed < 5:
            first = len(handles)
            handles += [scheduler.submit(samples.echo, n) for n in range(first, first + 50)]
            guards = [
                process for process in psutil.Process().children()
                if any("zygote.py" in part for part in process.cmdline())
            ]  # fmt: skip
            for guard in guards:
                guard.kill()
                killed += 1
            time.sleep(chance.uniform(0, 0.1))  # the random moment is what is tested

        assert [handle.result(60) for handle in handles] == list(range(len(handles)))
        assert {handle.outcome(0).attempts for handle in handles} == {1}
        soon(lambda: len(scheduler.get_statistics()["workers"]) == 2)

    @pytest.mark.unit
    def test_threads_of_a_task_write_their_records_one_at_a_time(self) -> None:
        import socket

        import worker
        from slots import NOTE

        inside: list[int] = []
        most: list[int] = []

        class Watched:
            def put(self, *_: Any) -> bool:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.005)  # as if the interpreter went to another thread here
                inside.pop()
                return True

        ours, theirs = socket.socketpair()
        with ours, theirs:
            serving = worker._Worker(ours, Watched(), 1_000)  # type: ignore[arg-type]
            threads = [
                threading.Thread(target=serving.report, args=(NOTE, n, 0.0, 0.0, b""))
                for n in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert most == [1] * 8
