"""`as_executor()` behaves as the standard library's executors, and better where a worker dies."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

import pytest
import samples

pytestmark = pytest.mark.integration


@pytest.fixture
def executor(make_scheduler: Callable[..., Any]) -> Any:
    return make_scheduler(max_tasks=200).run().as_executor()


def keywords(self: int, fn: int, *args: Any, **kwargs: Any) -> Any:
    return self, fn, args, kwargs


def test_arguments_may_have_any_name(executor: Any) -> None:
    future = executor.submit(keywords, 1, fn=2, priority=3, task=4)

    assert isinstance(executor, concurrent.futures.Executor)
    assert future.result(10) == (1, 2, (), {"priority": 3, "task": 4})


def test_map_keeps_the_order_and_raises_an_error_at_its_place(executor: Any) -> None:
    assert list(executor.map(samples.add, range(500), range(500), chunksize=7)) == [
        2 * n for n in range(500)
    ]
    results = executor.map(divmod, [1, 1, 1], [2, 0, 1])
    assert next(results) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(samples.echo, [1], chunksize=0)


def test_map_with_a_timeout_gives_what_came_in_time(executor: Any, tmp_path: Path) -> None:
    go = str(tmp_path / "go")
    found = []
    with pytest.raises(TimeoutError):
        found.extend(executor.map(samples.many_then_wait, [go] * 3, [1, 2, 0], timeout=3))
    Path(go).touch()
    assert found == ["1", "2"]


def test_map_with_a_buffer_takes_only_so_much_ahead(executor: Any) -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(20):
            taken.append(n)
            yield n

    results = executor.map(samples.echo, numbers(), buffersize=4)
    assert next(results) == 0
    assert len(taken) <= 5
    assert list(results) == list(range(1, 20))
    with pytest.raises(ValueError, match="buffersize"):
        executor.map(samples.echo, [1], buffersize=0)


def test_after_shutdown_nothing_is_taken_and_the_scheduler_goes_on(
    make_scheduler: Callable[..., Any],
) -> None:
    scheduler = make_scheduler().run()
    with scheduler.as_executor() as executor:
        future = executor.submit(samples.nap, 0.05)
    assert future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(samples.noop)
    executor.shutdown()
    assert scheduler.submit(samples.add, 1, 1).result(10) == 2


@pytest.mark.parametrize("wait_too", [True, False])
def test_shutdown_may_cancel_what_has_not_begun(
    make_scheduler: Callable[..., Any], tmp_path: Path, soon: Any, wait_too: bool
) -> None:
    go, marker = tmp_path / "go", tmp_path / "marker"
    executor = make_scheduler(num_workers=1).run().as_executor()
    running = executor.submit(samples.wait_for, str(go), str(marker))
    later = [executor.submit(samples.noop) for _ in range(10)]
    soon(marker.exists)
    ending = threading.Thread(target=lambda: executor.shutdown(wait=wait_too, cancel_futures=True))
    ending.start()
    soon(lambda: all(future.cancelled() for future in later))
    go.touch()
    ending.join(10)

    assert running.result(10) == str(go)


def test_waiting_knows_first_completed_first_exception_and_all(
    executor: Any, tmp_path: Path
) -> None:
    go = str(tmp_path / "go")
    slow = executor.submit(samples.wait_for, go)
    quick, bad = executor.submit(samples.noop), executor.submit(samples.boom)
    assert quick in wait([slow, quick], 10, FIRST_COMPLETED).done
    done, left = wait([slow, bad], 10, FIRST_EXCEPTION)
    assert (done, left) == ({bad}, {slow})
    assert wait([slow], 0.01, ALL_COMPLETED).not_done == {slow}
    Path(go).touch()
    assert wait([slow, quick, bad], 10).not_done == set()
    assert set(concurrent.futures.as_completed([slow, slow, bad], 10)) == {slow, bad}


def test_cancel_is_true_before_and_while_it_runs_and_false_after(
    executor: Any, tmp_path: Path, soon: Any
) -> None:
    marker = tmp_path / "marker"
    running = executor.submit(samples.spin, str(marker))
    soon(marker.exists)
    done = executor.submit(samples.noop)
    done.result(10)

    assert (running.cancel(), running.cancelled(), running.cancel()) == (True, True, True)
    assert (done.cancel(), done.cancelled()) == (False, False)
    with pytest.raises(concurrent.futures.CancelledError):
        running.result(1)


def test_callbacks_run_once_also_when_added_late(executor: Any) -> None:
    seen: list[int] = []
    future = executor.submit(samples.noop)
    future.add_done_callback(lambda _: seen.append(1))
    future.result(10)
    wait([future])
    future.add_done_callback(lambda _: seen.append(2))
    assert seen in ([1, 2], [2, 1])


def test_an_error_keeps_its_remote_traceback(executor: Any) -> None:
    error = executor.submit(samples.boom).exception(10)
    assert isinstance(error, ValueError)
    assert "in boom" in str(error.__cause__)


def test_what_cannot_be_pickled_is_refused_at_the_submit_and_others_go_on(executor: Any) -> None:
    with pytest.raises(TypeError, match="lock"):
        executor.submit(samples.echo, threading.Lock())
    assert executor.submit(samples.echo, 1).result(10) == 1


@pytest.mark.parametrize("func", [samples.exit_now, samples.use_c_stack])
def test_a_dying_worker_does_not_break_the_pool(executor: Any, func: Any) -> None:
    others = [executor.submit(samples.echo, n) for n in range(50)]
    bad = executor.submit(func)
    assert type(bad.exception(20)).__name__ == "WorkerCrashed"
    assert [future.result(10) for future in others] == list(range(50))
    assert executor.submit(samples.echo, 5).result(10) == 5


def test_a_full_scheduler_makes_submit_wait_instead_of_failing(executor: Any) -> None:
    futures = [executor.submit(samples.echo, n) for n in range(1_000)]  # 200 fit at a time
    assert [future.result(20) for future in futures] == list(range(1_000))


def test_a_future_runs_while_its_task_does_and_is_settled_once(
    executor: Any, tmp_path: Path, soon: Any, caplog: pytest.LogCaptureFixture
) -> None:
    go, marker = tmp_path / "go", tmp_path / "marker"
    future = executor.submit(samples.wait_for, str(go), str(marker))
    soon(marker.exists)
    assert (future.running(), future.done()) == (True, False)
    go.touch()
    future.result(10)
    spinning = [executor.submit(samples.spin) for _ in range(3)]
    threads = [threading.Thread(target=each.cancel) for each in spinning for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert (future.running(), future.done()) == (False, True)
    assert all(each.cancelled() for each in spinning)
    assert [record for record in caplog.records if "future" in record.name] == []


def test_a_future_may_be_cancelled_from_a_callback(executor: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    other = executor.submit(samples.spin, str(marker))
    said: list[bool] = []
    first = executor.submit(samples.noop)
    first.add_done_callback(lambda _: said.append(other.cancel()))

    assert wait([first, other], 10).not_done == set()
    assert (said, other.cancelled()) == ([True], True)


def test_a_result_that_cannot_be_unpickled_here_is_the_error_of_its_future_only(
    executor: Any,
) -> None:
    assert isinstance(executor.submit(samples.return_explosive).exception(10), RuntimeError)
    assert executor.submit(samples.echo, 3).result(10) == 3


@pytest.mark.parametrize("func", [samples.return_lock, samples.raise_unpicklable, samples.leave])
def test_what_cannot_travel_back_is_the_error_of_its_future_only(executor: Any, func: Any) -> None:
    error = executor.submit(func).exception(10)

    assert type(error).__name__ in ("ResultNotSerializable", "RemoteError", "SystemExit")
    assert executor.submit(samples.echo, 3).result(10) == 3


@pytest.mark.parametrize(
    ("what", "error"),
    [("crash", "WorkerCrashed"), ("exit", "SystemExit"), ("raise", "OSError")],
)
def test_what_happens_while_arguments_are_unpickled_is_the_error_of_that_future_only(
    executor: Any, what: str, error: str
) -> None:
    others = [executor.submit(samples.echo, n) for n in range(20)]
    bad = executor.submit(samples.echo, samples.Acts(what))

    assert type(bad.exception(20)).__name__ == error
    assert [future.result(20) for future in others] == list(range(20))
    assert executor.submit(samples.echo, 5).result(10) == 5


@pytest.mark.parametrize(
    ("what", "error"),
    [("crash", "WorkerCrashed"), ("exit", "SystemExit"), ("raise", "ResultNotSerializable")],
)
def test_what_happens_while_a_result_is_pickled_is_the_error_of_that_future_only(
    executor: Any, what: str, error: str
) -> None:
    bad = executor.submit(samples.return_acting, what)
    others = [executor.submit(samples.echo, n) for n in range(20)]

    assert type(bad.exception(20)).__name__ == error
    assert [future.result(20) for future in others] == list(range(20))


def test_a_shutdown_waits_for_calls_that_cannot_be_unpickled(
    make_scheduler: Callable[..., Any],
) -> None:
    scheduler = make_scheduler().run()
    with scheduler.as_executor() as executor:
        futures = [executor.submit(samples.echo, samples.Acts("raise")) for _ in range(5)]

    assert [type(future.exception(0)) for future in futures] == [OSError] * 5


def test_a_future_cannot_be_set_from_outside_once_it_is_done(executor: Any) -> None:
    future = executor.submit(samples.echo, 1)
    future.result(10)
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_result(2)
    assert future.result(0) == 1


def test_large_arguments_do_not_block_while_a_worker_dies(executor: Any) -> None:
    large = bytes(2_000_000)
    futures = [executor.submit(len, large) for _ in range(10)]
    bad = executor.submit(samples.exit_now)
    futures += [executor.submit(len, large) for _ in range(10)]

    assert type(bad.exception(20)).__name__ == "WorkerCrashed"
    assert [future.result(20) for future in futures] == [len(large)] * 20


def test_futures_of_a_scheduler_that_ends_are_settled(
    make_scheduler: Callable[..., Any], tmp_path: Path
) -> None:
    from utils import SchedulerClosed

    scheduler = make_scheduler().run()
    executor = scheduler.as_executor()
    future = executor.submit(samples.wait_for, str(tmp_path / "never"))
    scheduler.shutdown(wait=False)

    assert isinstance(future.exception(10), SchedulerClosed)
    executor.shutdown(cancel_futures=True)


def test_options_of_the_view_are_those_of_its_tasks(make_scheduler: Callable[..., Any]) -> None:
    import os

    scheduler = make_scheduler(store=None).run()
    with scheduler.as_executor(kind="io", priority="HIGH") as executor:
        assert executor.submit(os.getpid).result(10) == os.getpid()
