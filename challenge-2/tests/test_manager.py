"""What the manager promises: order, what surfaces, deadlines, losses, names."""

import asyncio
import contextlib
import contextvars
import pickle
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from stopwatch import Stopwatch

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


class Probe:
    """A context manager that writes down what happens to it."""

    def __init__(self, name: str, log: list[str], **how: Any) -> None:
        self.name = name
        self.log = log
        self.how = how
        self.told: Any = None
        self.task: Any = None

    async def __aenter__(self) -> str:
        self.task = asyncio.current_task()
        self.log.append(f"enter {self.name}")
        try:
            await asyncio.sleep(self.how.get("acquire", 0))
        except asyncio.CancelledError:
            self.log.append(f"cancelled {self.name}")
            raise
        if error := self.how.get("acquire_error"):
            raise error
        self.log.append(f"ready {self.name}")
        return f"value of {self.name}"

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        assert asyncio.current_task() is self.task
        self.told = error
        self.log.append(f"leave {self.name}")
        await asyncio.sleep(self.how.get("release", 0))
        if failure := self.how.get("release_error"):
            raise failure
        self.log.append(f"left {self.name}")
        return self.how.get("truthy")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def make(log: list[str]) -> Any:
    """A manager of probes: `make(db={}, cache={"needs": ("db",), "release_error": …})`."""

    def build(probes: dict[str, dict[str, Any]], **options: Any) -> Any:
        from utils import ResourceManager

        manager = ResourceManager(**options)
        manager.probes = {}  # type: ignore[attr-defined]
        for name, how in probes.items():
            how = dict(how)
            declared = {
                key: how.pop(key)
                for key in ("needs", "optional", "acquire_timeout", "release_timeout")
                if key in how
            }
            probe = manager.probes[name] = Probe(name, log, **how)  # type: ignore[attr-defined]
            manager.add(probe, name, **declared)
        return manager

    return build


class TestOrder:
    async def test_needs_are_ready_first_and_released_last(self, make: Any, log: Any) -> None:
        async with make(
            {
                "d": {"needs": ("b", "c")},
                "b": {"needs": ("a",)},
                "c": {"needs": ("a",), "acquire": 0.02},
                "a": {},
            }
        ):
            log.append("body")

        assert [entry for entry in log if entry.startswith("ready")] == [
            "ready a", "ready b", "ready c", "ready d",
        ]  # fmt: skip
        order = [entry for entry in log if entry.startswith("left")]
        assert order[0] == "left d"
        assert order[-1] == "left a"

    def test_siblings_overlap_both_ways(self, make: Any, virtually: Any) -> None:
        probes = {f"r{i}": {"acquire": 0.05, "release": 0.05} for i in range(100)}

        async def main(loop: Any) -> Any:
            async with make(probes, clock=loop.time) as scope:
                pass
            return scope.report

        report, _ = virtually(main)
        assert report.start_s == pytest.approx(0.05)
        assert report.stop_s == pytest.approx(0.05)
        assert report.sum_s == pytest.approx(10)
        assert report.saved_s == pytest.approx(report.sum_s - report.wall_s)

    async def test_a_node_starts_the_moment_its_needs_are_ready(self, make: Any, log: Any) -> None:
        async with make({"slow": {"acquire": 0.05}, "fast": {}, "user": {"needs": ("fast",)}}):
            pass

        assert log.index("ready user") < log.index("ready slow")

    async def test_names_may_be_declared_in_any_order(self, make: Any) -> None:
        async with make({"b": {"needs": ("a",)}, "a": {}}) as scope:
            assert scope.b == "value of b"
            assert scope["a"] == "value of a"

    async def test_a_cycle_is_refused_where_it_is_closed_and_printed(self, make: Any) -> None:
        from utils import DependencyCycle

        manager = make({"a": {"needs": ("c",)}, "b": {"needs": ("a",)}})

        with pytest.raises(DependencyCycle, match="c -> b -> a -> c") as caught:
            manager.add(Probe("c", []), "c", ("b",))

        assert caught.value.cycle == ("c", "b", "a", "c")

    async def test_a_resource_that_needs_itself_is_refused(self, make: Any) -> None:
        from utils import DependencyCycle

        with pytest.raises(DependencyCycle, match="a -> a"):
            make({"a": {"needs": ("a",)}})

    async def test_an_unknown_name_is_refused_before_anything_is_touched(
        self, make: Any, log: Any
    ) -> None:
        from utils import UnknownResource

        manager = make({"a": {}, "b": {"needs": ("databse",)}})

        with pytest.raises(UnknownResource, match="'b' needs 'databse'"):
            await manager.__aenter__()

        assert log == []

    async def test_a_long_chain_needs_no_recursion(self, make: Any) -> None:
        count = 5000
        manager = make(
            {f"r{i}": {"needs": (f"r{i + 1}",)} if i < count else {} for i in range(count + 1)}
        )

        async with manager:
            pass

        assert len(manager.report.critical_path) == count + 1


class TestStartFails:
    async def test_one_of_five(self, make: Any, log: Any) -> None:
        from utils import AcquireError

        cause = OSError("refused")
        manager = make(
            {"r1": {}, "r2": {}, "bad": {"acquire": 0.02, "acquire_error": cause},
             "s1": {"acquire": 1}, "s2": {"acquire": 1}, "never": {"needs": ("bad",)}}
        )  # fmt: skip

        with pytest.raises(AcquireError, match="bad") as caught:
            await manager.__aenter__()

        assert isinstance(caught.value, ConnectionError)
        assert caught.value.resource == "bad"
        assert caught.value.__cause__ is cause
        assert caught.value.report
        assert caught.value.report.resources["r1"].state == "released"
        assert sorted(log[-6:]) == sorted(
            ["cancelled s1", "cancelled s2", "leave r1", "leave r2", "left r1", "left r2"]
        )
        assert "enter never" not in log
        assert manager.probes["r1"].told is caught.value

    async def test_several_at_once_form_a_group_that_splits(self, make: Any) -> None:
        from utils import AcquireError, AcquireErrorGroup

        manager = make(
            {
                "a": {"acquire_error": OSError(1)},
                "b": {"acquire_error": ValueError(2)},
                "c": {"acquire": 1},
            }
        )

        with pytest.raises(AcquireErrorGroup) as caught:
            await manager.__aenter__()

        found: list[BaseException] = []
        kind: Any = None
        try:
            raise caught.value
        except* ConnectionError as group:
            found, kind = list(group.exceptions), type(group)
        assert kind is AcquireErrorGroup
        assert {e.resource for e in found if isinstance(e, AcquireError)} == {"a", "b"}
        assert all(isinstance(e, AcquireError) and e.report for e in found)

    async def test_a_release_error_in_the_clean_up_is_a_note(self, make: Any) -> None:
        from utils import AcquireError

        manager = make(
            {
                "good": {"release_error": OSError("stuck")},
                "bad": {"acquire": 0.01, "acquire_error": OSError("no")},
            }
        )

        with pytest.raises(AcquireError) as caught:
            await manager.__aenter__()

        assert any("'good'" in note and "stuck" in note for note in caught.value.__notes__)

    async def test_what_a_cancelled_sibling_raises_is_not_hidden(self) -> None:
        from utils import AcquireError, ResourceManager

        @contextlib.asynccontextmanager
        async def sour() -> AsyncIterator[None]:
            try:
                await asyncio.sleep(1)
                yield
            finally:
                raise RuntimeError("sour")

        manager = ResourceManager()
        manager.add(Probe("bad", [], acquire=0.01, acquire_error=OSError("no")), "bad")
        manager.add(sour(), "sour")

        with pytest.raises(AcquireError) as caught:
            await manager.__aenter__()

        assert caught.value.resource == "bad"
        assert any("sour" in note for note in caught.value.__notes__)

    async def test_an_optional_one_is_left_out(self, make: Any) -> None:
        manager = make(
            {
                "cache": {"acquire_error": OSError("no"), "optional": True},
                "user": {"needs": ("cache",)},
            }
        )

        async with manager as scope:
            assert scope.cache is None
            assert scope.user == "value of user"

        assert "OSError: no" in manager.report.resources["cache"].error

    async def test_attempts_are_repeated_and_counted(self) -> None:
        from utils import ResourceManager, Retry

        tries = []

        def flaky() -> Any:
            tries.append(1)
            return Probe("x", [], acquire_error=OSError("not yet") if len(tries) < 3 else None)

        manager = ResourceManager()
        manager.add(flaky, "x", retry=Retry(3, delay=0.001))

        async with manager as scope:
            assert scope.x == "value of x"
        assert manager.report.resources["x"].attempts == 3

    async def test_wait_gives_a_server_time_to_come_up(self) -> None:
        from utils import AcquireError, ResourceManager

        came_up = time.monotonic() + 0.2

        def server() -> Any:
            if time.monotonic() < came_up:
                raise ConnectionRefusedError("not yet")
            return Probe("x", [])

        manager = ResourceManager()
        manager.add(server, "x", wait=5)
        async with manager:
            pass
        assert manager.report.resources["x"].attempts > 1

        with pytest.raises(AcquireError):
            async with ResourceManager(lambda: 1 / 0):
                pass


class TestWhatSurfaces:
    async def test_the_bodys_own_exception_with_the_release_errors_as_notes(
        self, make: Any
    ) -> None:
        original = ValueError("body")
        context = original.__context__
        manager = make({n: {"release_error": OSError(n)} for n in ("a", "b", "c")})

        with pytest.raises(ValueError, match="body") as caught:
            async with manager:
                raise original

        assert caught.value is original
        assert original.__context__ is context
        assert sorted(note.split("'")[1] for note in original.__notes__) == ["a", "b", "c"]
        assert all(probe.told is original for probe in manager.probes.values())

    async def test_one_release_error_alone(self, make: Any) -> None:
        from utils import ReleaseError

        cause = OSError("stuck")
        with pytest.raises(ReleaseError, match="'a'") as caught:
            async with make({"a": {"release_error": cause}, "b": {}}):
                pass

        assert caught.value.resource == "a"
        assert caught.value.__cause__ is cause

    async def test_several_release_errors_form_a_group(self, make: Any) -> None:
        from utils import ReleaseErrorGroup

        with pytest.raises(ReleaseErrorGroup) as caught:
            async with make({n: {"release_error": OSError(n)} for n in "ab"}):
                pass

        matched, rest = caught.value.split(lambda e: getattr(e, "resource", None) == "a")
        assert type(matched) is type(rest) is ReleaseErrorGroup

    async def test_cancellation_ranks_above_the_body_and_the_releases(self, make: Any) -> None:
        started = asyncio.Event()
        manager = make({"a": {"release": 0.05, "release_error": OSError("stuck")}, "b": {}})

        async def run() -> None:
            async with manager:
                started.set()
                raise ValueError("body")

        task = asyncio.create_task(run())
        await started.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task

        assert task.cancelled()
        notes = "\n".join(caught.value.__notes__)
        assert "ValueError: body" in notes
        assert "'a'" in notes
        assert task.cancelling() == 1

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    async def test_what_ends_programs_ranks_highest(self, make: Any, kind: Any) -> None:
        manager = make({"a": {"release_error": kind()}, "b": {"release_error": OSError("stuck")}})

        with pytest.raises(kind) as caught:
            async with manager:
                raise ValueError("body")

        notes = "\n".join(caught.value.__notes__)
        assert "'b'" in notes
        assert "ValueError: body" in notes

    @pytest.mark.parametrize("phase", ["acquire_error", "release_error"])
    async def test_what_ends_programs_is_not_hidden_in_a_group(self, make: Any, phase: str) -> None:
        group = BaseExceptionGroup(
            "several", [KeyError("one"), BaseExceptionGroup("inner", [KeyboardInterrupt()])]
        )

        with pytest.raises(KeyboardInterrupt) as caught:
            async with make({"a": {phase: group}}):
                pass

        assert "'a' ended with BaseExceptionGroup" in caught.value.__notes__[0]

    async def test_an_outer_timeout_is_a_timeout_although_a_release_fails(self, make: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                async with make({"a": {"release_error": OSError("stuck")}}):
                    await asyncio.sleep(1)

        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    async def test_a_truthy_exit_of_an_owner_is_ignored_and_counted(self, make: Any) -> None:
        manager = make({"a": {"truthy": True}})

        with pytest.raises(ValueError, match="body"):
            async with manager:
                raise ValueError("body")

        assert manager.report.suppressed == 1

    async def test_no_reference_to_the_error_is_kept(self, make: Any) -> None:
        manager = make({"a": {}})
        with contextlib.suppress(ValueError):
            async with manager:
                raise ValueError("body")

        assert manager.running.error is None
        assert manager.running.caller.unwinding is None


class TestCallerAffinity:
    async def test_a_timeout_among_the_resources_acts_on_the_body(self, make: Any) -> None:
        manager = make({"a": {}})
        manager.add(asyncio.timeout(0.02), "limit", affinity="caller")

        with pytest.raises(TimeoutError):
            async with manager:
                await asyncio.sleep(1)

        assert isinstance(manager.probes["a"].told, asyncio.CancelledError)
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    async def test_a_timeout_that_expires_during_release_surfaces_too(self, make: Any) -> None:
        manager = make({"a": {"release": 0.1, "needs": ("limit",)}})
        manager.add(asyncio.timeout(0.03), "limit", affinity="caller")

        with pytest.raises(TimeoutError):
            async with manager:
                pass

    async def test_anyio_scopes_and_task_groups_are_resources(self) -> None:
        import anyio

        from utils import ResourceManager

        manager = ResourceManager()
        manager.add(anyio.create_task_group(), "one")
        manager.add(anyio.create_task_group(), "two", ("one",))
        manager.add(anyio.move_on_after(0.02), "limit", affinity="caller")
        done = []

        async with manager as scope:
            scope.two.start_soon(anyio.sleep, 0)
            await asyncio.sleep(1)
            done.append("body")

        assert done == []

    async def test_they_are_left_last_in_first_out_and_after_what_needs_them(
        self, log: Any
    ) -> None:
        from utils import ResourceManager

        manager = ResourceManager()
        for name in ("c1", "c2"):
            manager.add(Probe(name, log), name, affinity="caller")
        manager.add(Probe("user", log), "user", ("c2",))

        async with manager:
            pass

        order = [entry for entry in log if entry.startswith("left")]
        assert order == ["left user", "left c2", "left c1"]

    async def test_a_failure_of_another_cancels_the_callers_acquire(self, log: Any) -> None:
        from utils import AcquireError, ResourceManager

        manager = ResourceManager()
        manager.add(Probe("mine", log, acquire=1), "mine", affinity="caller")
        manager.add(Probe("bad", log, acquire=0.01, acquire_error=OSError("no")), "bad")

        with pytest.raises(AcquireError, match="bad"):
            await manager.__aenter__()

        assert "cancelled mine" in log
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


class TestDeadlines:
    def test_an_acquire_that_hangs_is_cancelled_at_its_deadline(
        self, make: Any, virtually: Any
    ) -> None:
        from utils import AcquireTimeout

        async def main(loop: Any) -> Any:
            started = loop.time()
            with pytest.raises(AcquireTimeout, match=r"'a'.*0\.1 s") as caught:
                await make(
                    {"a": {"acquire": 60}, "b": {}}, acquire_timeout=0.1, clock=loop.time
                ).__aenter__()
            return caught, loop.time() - started

        (caught, seconds), _ = virtually(main)
        assert seconds == pytest.approx(0.1, abs=0.001)
        assert caught.value.resource == "a"
        assert isinstance(caught.value, (ConnectionError, TimeoutError))

    def test_the_whole_start_has_one_deadline(self, make: Any, virtually: Any) -> None:
        from utils import AcquireTimeout

        chain = {f"r{i}": {"acquire": 0.08, "needs": (f"r{i - 1}",) if i else ()} for i in range(5)}

        async def main(loop: Any) -> float:
            started: float = loop.time()
            with pytest.raises(AcquireTimeout):
                await make(
                    chain, acquire_timeout=0.2, release_grace=0.01, clock=loop.time
                ).__aenter__()
            return float(loop.time() - started)

        assert virtually(main)[0] == pytest.approx(0.2, abs=0.001)

    def test_a_short_deadline_of_its_own_holds_for_what_begins_late(
        self, make: Any, virtually: Any
    ) -> None:
        from utils import AcquireTimeout, ReleaseTimeout

        late: dict[str, Any] = {
            "base": {"acquire": 0.3},
            "late": {"needs": ("base",), "acquire": 60},
        }
        early: dict[str, Any] = {
            "base": {"release": 60},
            "user": {"needs": ("base",), "release": 0.3},
        }

        async def main(loop: Any) -> list[float]:
            moments = [loop.time()]
            late["late"]["acquire_timeout"] = early["base"]["release_timeout"] = 0.1
            with pytest.raises(AcquireTimeout, match="'late'"):
                await make(late, clock=loop.time).__aenter__()
            moments.append(loop.time())
            with pytest.raises(ReleaseTimeout, match="'base'"):
                async with make(early, clock=loop.time):
                    pass
            return [*moments, loop.time()]

        began, acquired, released = virtually(main)[0]
        assert acquired - began == pytest.approx(0.4, abs=0.001)
        assert released - acquired == pytest.approx(0.4, abs=0.001)

    async def test_a_resource_may_have_its_own_deadlines(self, make: Any) -> None:
        from utils import AcquireTimeout

        with pytest.raises(AcquireTimeout, match="'b'"):
            await make(
                {"a": {"acquire": 0.2}, "b": {"acquire": 60, "acquire_timeout": 0.05}}
            ).__aenter__()
        async with make({"a": {"acquire": 0.1, "acquire_timeout": 1}}, acquire_timeout=0.05):
            pass

    def test_a_release_that_hangs_delays_only_what_it_depends_on(
        self, make: Any, log: Any, virtually: Any
    ) -> None:
        from utils import ReleaseTimeout

        probes = {"base": {}, "hangs": {"release": 60, "needs": ("base",)}, "other": {}}

        async def main(loop: Any) -> float:
            started: float = loop.time()
            with pytest.raises(ReleaseTimeout, match="'hangs'"):
                async with make(probes, release_timeout=0.1, clock=loop.time):
                    pass
            return float(loop.time() - started)

        assert virtually(main)[0] == pytest.approx(0.1, abs=0.001)
        assert log.index("left other") < log.index("leave base")

    async def test_what_ignores_its_cancellation_is_abandoned_counted_and_named(self) -> None:
        from engine import abandoned_tasks
        from utils import ReleaseTimeout, ResourceManager

        class Stubborn:
            async def __aenter__(self) -> None: ...

            async def __aexit__(self, *details: Any) -> None:
                until = time.monotonic() + 0.5
                while (left := until - time.monotonic()) > 0:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(left)

        manager = ResourceManager(release_timeout=0.05, release_grace=0.05)
        manager.add(Stubborn(), "mule")
        started = Stopwatch()
        with pytest.raises(ReleaseTimeout, match=r"'mule'.*abandoned"):
            async with manager:
                pass

        assert started.seconds() < 0.25
        assert manager.report.abandoned == 1
        assert manager.report.resources["mule"].abandoned
        await asyncio.wait(set(abandoned_tasks))
        assert not abandoned_tasks

    async def test_what_an_abandoned_one_needed_has_its_own_deadline(self) -> None:
        from engine import abandoned_tasks
        from utils import ReleaseErrorGroup, ResourceManager

        end = asyncio.Event()

        class Stubborn:
            async def __aenter__(self) -> None: ...

            async def __aexit__(self, *details: Any) -> None:
                while not end.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await end.wait()

        manager = ResourceManager(release_timeout=0.05, release_grace=0.02)
        for number in range(4):
            manager.add(Stubborn(), f"m{number}", (f"m{number - 1}",) if number else ())
        async with asyncio.timeout(5):
            with pytest.raises(ReleaseErrorGroup):
                async with manager:
                    pass

        assert manager.report.abandoned == 4
        end.set()
        await asyncio.wait(set(abandoned_tasks))

    async def test_an_abandoned_acquire_that_completes_later_is_released(self) -> None:
        from engine import abandoned_tasks
        from utils import AcquireTimeout, ResourceManager

        log: list[str] = []

        class Late:
            async def __aenter__(self) -> None:
                until = time.monotonic() + 0.4
                while (left := until - time.monotonic()) > 0:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(left)
                log.append("acquired")

            async def __aexit__(self, *details: Any) -> None:
                log.append("released")

        manager = ResourceManager(Late(), acquire_timeout=0.05, release_grace=0.05)
        started = Stopwatch()
        with pytest.raises(AcquireTimeout):
            await manager.__aenter__()

        assert started.seconds() < 0.25
        assert manager.report.abandoned == 1
        assert log == []
        await asyncio.wait(set(abandoned_tasks))
        assert log == ["acquired", "released"]

    async def test_a_close_that_blocks_its_thread_delays_nobody(self, log: Any) -> None:
        from utils import ReleaseTimeout, ResourceManager

        release = threading.Event()

        @contextlib.contextmanager
        def blocking() -> Iterator[None]:
            yield
            release.wait(5)

        manager = ResourceManager(release_timeout=0.1, release_grace=0.1)
        manager.add(blocking(), "blocks")
        manager.add(Probe("other", log, release=0.02), "other")
        started = Stopwatch()
        with pytest.raises(ReleaseTimeout, match=r"'blocks'.*abandoned"):
            async with manager:
                pass

        assert started.seconds() < 0.4
        assert "left other" in log
        release.set()
        while any("resource" in thread.name for thread in threading.enumerate()):
            await asyncio.sleep(0.01)


class TestLost:
    async def test_a_task_group_that_dies_cancels_the_body(self, make: Any) -> None:
        from utils import ResourceLost

        async def dies() -> None:
            await asyncio.sleep(0.01)
            raise KeyError("dead")

        @contextlib.asynccontextmanager
        async def pump() -> AsyncIterator[int]:
            async with asyncio.TaskGroup() as group:
                group.create_task(dies())
                yield 1

        manager = make({"a": {}})
        manager.add(pump(), "pump")
        with pytest.raises(ResourceLost, match="'pump'") as caught:
            async with manager:
                await asyncio.sleep(5)

        assert isinstance(caught.value.__cause__, ExceptionGroup)
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
        assert manager.report.lost == 1

    async def test_an_outer_cancellation_wins_over_a_loss(self, make: Any) -> None:
        manager = make({"a": {}})

        async def run() -> None:
            async with manager as scope:
                scope.lost("a", OSError("dead"))
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(1)

        task = asyncio.create_task(run())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    async def test_a_body_that_ends_before_it_is_cut_short_still_hears_of_it(
        self, make: Any
    ) -> None:
        from utils import ResourceLost

        with pytest.raises(ResourceLost):
            async with make({"a": {}}) as scope:
                scope.lost("a", OSError("dead"))
        await asyncio.sleep(0)

    async def test_the_bodys_own_error_outranks_the_loss(self, make: Any) -> None:
        with pytest.raises(ValueError, match="body") as caught:
            async with make({"a": {}}) as scope:
                scope.lost("a", OSError("dead"))
                raise ValueError("body")

        assert any("'a' was lost" in note for note in caught.value.__notes__)

    async def test_on_lost_mark_only_refuses_access(self, make: Any) -> None:
        from utils import ResourceLost

        async with make({"a": {}, "b": {}}, on_lost="mark") as scope:
            scope.lost("a", OSError("dead"))
            await asyncio.sleep(0)
            with pytest.raises(ResourceLost, match="dead"):
                scope.a  # noqa: B018
            assert scope.b == "value of b"


class TestLifeCycle:
    async def test_access_before_and_after_is_refused(self, make: Any) -> None:
        from utils import ResourceClosed

        manager = make({})
        handle = manager.add(Probe("a", []), "a")
        with pytest.raises(ResourceClosed, match="not ready"):
            handle.value  # noqa: B018
        async with manager as scope:
            assert handle.value == scope.get("a", str) == "value of a"
        with pytest.raises(ResourceClosed, match="closed"):
            scope.a  # noqa: B018

    async def test_unknown_names(self, make: Any) -> None:
        async with make({"a": {}}) as scope:
            with pytest.raises(KeyError):
                scope["b"]
            with pytest.raises(AttributeError):
                scope.b  # noqa: B018
            with pytest.raises(TypeError):
                scope.get("a", int)
            assert "a" in scope
            assert "b" not in scope

    async def test_a_manager_is_used_once(self, make: Any) -> None:
        manager = make({"a": {}})
        async with manager:
            with pytest.raises(RuntimeError, match="used once"):
                await manager.__aenter__()
        with pytest.raises(RuntimeError, match="used once"):
            await manager.__aenter__()

    async def test_aclose_may_be_called_often_and_at_the_same_time(
        self, make: Any, log: Any
    ) -> None:
        async with make({"a": {"release": 0.02}}) as scope:
            await asyncio.gather(scope.aclose(), scope.aclose(), scope.aclose())
            await scope.aclose()

        assert log.count("left a") == 1

    async def test_entered_in_one_loop_it_cannot_be_left_in_another(self, make: Any) -> None:
        manager = make({"a": {}})
        await manager.__aenter__()
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(manager.aclose()))
        await manager.aclose()

    async def test_more_can_be_acquired_on_demand(self, make: Any, log: Any) -> None:
        from utils import AcquireError, ResourceClosed

        async with make({"a": {}}) as scope:
            assert await scope.acquire(Probe("late", log), "late", ("a",)) == "value of late"
            assert scope.late == "value of late"
            with pytest.raises(AcquireError, match="'bad'"):
                await scope.acquire(Probe("bad", log, acquire_error=OSError("no")), "bad")
            with pytest.raises(ValueError, match="exists already"):
                await scope.acquire(Probe("late", log), "late")
            await scope.acquire(Probe("bad", log), "bad")

        assert log.index("left late") < log.index("leave a")
        with pytest.raises(ResourceClosed):
            await scope.acquire(Probe("x", log))

    async def test_a_cancelled_acquire_on_demand_leaks_nothing(self, make: Any, log: Any) -> None:
        async with make({}) as scope:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await scope.acquire(Probe("late", log, acquire=1), "late")
            assert log[-1] == "cancelled late"
            assert "late" not in scope

    async def test_one_that_is_still_being_acquired_at_the_end_is_cancelled(
        self, make: Any, log: Any
    ) -> None:
        from utils import AcquireError

        async with make({}) as scope:
            task = asyncio.create_task(scope.acquire(Probe("late", log, acquire=5), "late"))
            await asyncio.sleep(0.01)
        with pytest.raises(AcquireError, match="when the manager stopped"):
            await task

    async def test_a_child_closes_before_the_resources_of_its_parent(
        self, make: Any, log: Any
    ) -> None:
        manager = make({"a": {}})
        child = make({"b": {}, "c": {"needs": ("a",)}}, name="child")

        async with manager as scope:
            inner = await scope.nest(child)
            assert inner.b == "value of b"
            assert inner.a == "value of a"
            with pytest.raises(RuntimeError):
                await scope.nest(manager)
            with pytest.raises(RuntimeError):
                await scope.nest(child)
            assert scope.get_metrics()["nested"][0]["manager"] == "child"

        assert log.index("left b") < log.index("leave a")
        assert manager.report.children[0].name == "child"

    async def test_a_release_error_of_a_child_surfaces_with_those_of_its_parent(
        self, make: Any
    ) -> None:
        from utils import ReleaseError

        with pytest.raises(ReleaseError, match="'b'") as caught:
            async with make({"a": {"release_error": OSError("no")}}) as scope:
                await scope.nest(make({"b": {"release_error": OSError("no")}}))

        assert any("'a'" in note for note in getattr(caught.value, "__notes__", ()))

    async def test_what_is_set_in_a_context_variable(self) -> None:
        from utils import ResourceManager

        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

        @contextlib.asynccontextmanager
        async def setting() -> AsyncIterator[None]:
            token = variable.set("set")
            yield
            variable.reset(token)

        manager = ResourceManager()
        manager.add(setting(), "setting")
        manager.add(lambda setting: variable.get(), "seen")
        async with manager as scope:
            assert scope.seen == "set"
            # From 3.12 on owners run in the caller's own context.
            assert variable.get() == ("set" if sys.version_info >= (3, 12) else "unset")


class TestKindsOfResources:
    async def test_every_kind_can_be_entered(self) -> None:
        from utils import Resource, ResourceManager

        left = []

        class Own(Resource[str]):
            needs = ("base",)

            async def acquire(self, deps: Any) -> str:
                return f"own of {deps.base}"

            async def release(self, value: str, exc: Any) -> None:
                left.append(value)

        class Plain(Resource[int]):
            def acquire(self, deps: Any) -> int:
                return len(deps)

        async def generator(base: str) -> AsyncIterator[str]:
            yield f"generated from {base}"
            left.append("generator")

        def sync_generator() -> Iterator[str]:
            yield threading.current_thread().name
            left.append("sync generator")

        async def coroutine(deps: Any) -> str:
            return f"awaited {sorted(deps)}"

        @contextlib.contextmanager
        def sync() -> Iterator[int]:
            yield threading.get_ident()
            left.append("sync")

        manager = ResourceManager()
        manager.add(lambda: "base", "base")
        manager.add(Own(), "own")
        manager.add(Plain(), "plain", ("base", "own"))
        manager.add(generator, "generator")
        manager.add(sync_generator, "sync_generator")
        manager.add(generator("direct"), "direct")
        manager.add(coroutine, "coroutine", ("base", "own"))
        manager.add(lambda one, two: (one, two), "positional", ("base", "own"))
        manager.add(sync(), "sync")
        manager.add(contextlib.nullcontext(7), "null")

        async with manager as scope:
            assert scope.own == "own of base"
            assert scope.plain == 2
            assert scope.generator == "generated from base"
            assert scope.direct == "generated from direct"
            assert scope.coroutine == "awaited ['base', 'own']"
            assert scope.positional == ("base", "own of base")
            assert scope.sync != threading.get_ident()
            assert scope.null == 7

        assert sorted(left) == sorted(
            ["own of base", "generator", "sync generator", "generator", "sync"]
        )

    async def test_anything_else_is_refused_with_a_sentence(self) -> None:
        from utils import ResourceManager

        with pytest.raises(TypeError, match="A int is no resource"):
            ResourceManager(7)
        with pytest.raises(ValueError, match="affinity"):
            ResourceManager().add(lambda: 1, affinity="wrong")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="on_lost"):
            ResourceManager(on_lost="wrong")  # type: ignore[arg-type]

    async def test_what_is_used_up_by_its_first_attempt_cannot_be_tried_again(self) -> None:
        from utils import ResourceManager

        attempts = 0

        @contextlib.asynccontextmanager
        async def flaky() -> AsyncIterator[int]:
            nonlocal attempts
            attempts += 1
            if attempts < 3:
                raise OSError("not yet")
            yield attempts

        with pytest.raises(ValueError, match="give the function"):
            ResourceManager().add(flaky(), "flaky", retry=5)
        manager = ResourceManager()
        manager.add(flaky, "flaky", retry=5)
        async with manager as scope:
            assert scope.flaky == 3
        assert manager.report.resources["flaky"].attempts == 3

    async def test_names_are_given_and_unique(self) -> None:
        from utils import ResourceManager

        manager = ResourceManager(*(Probe(n, []) for n in ("a", "a", "b")))
        assert list(manager.report.resources) == ["a", "a-2", "b"]
        with pytest.raises(ValueError, match="exists already"):
            manager.add(Probe("a", []), "a")

    async def test_cancelled_while_a_thread_acquires_it_is_released(self) -> None:
        from utils import ResourceManager

        log: list[str] = []

        @contextlib.contextmanager
        def slow() -> Iterator[None]:
            time.sleep(0.1)
            log.append("acquired")
            yield
            log.append("released")

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                async with ResourceManager(slow()):
                    pass

        assert log == ["acquired", "released"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
async def test_all_errors_pickle_with_type_name_and_notes(protocol: int) -> None:
    import failures

    errors: list[BaseException] = [
        failures.AcquireError("a", resource="db"), failures.AcquireTimeout("b", resource="db"),
        failures.MissingDriver("c", resource="db"), failures.ReleaseError("d", resource="db"),
        failures.ReleaseTimeout("e", resource="db"), failures.ResourceLost("f", resource="db"),
        failures.ResourceClosed("g", resource="db"), failures.OperationError("h", resource="db"),
        failures.OperationTimeout("i", resource="db"), failures.UnknownResource("j"),
        failures.ConnectionBroken("k", resource="db"), failures.QueryTooLong("q", resource="db"),
        failures.DependencyCycle("l", cycle=("a", "b", "a")),
    ]  # fmt: skip
    group = failures.AcquireErrorGroup("m", [failures.AcquireError("n", resource="x")])
    release = failures.ReleaseErrorGroup("o", [failures.ReleaseError("p", resource="x")])
    for error in [*errors, group, release]:
        error.add_note("a note")
        twin = pickle.loads(pickle.dumps(error, protocol))

        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.__notes__ == ["a note"]
        assert getattr(twin, "resource", None) == getattr(error, "resource", None)
        assert getattr(twin, "cycle", None) == getattr(error, "cycle", None)
        assert "a note" in "".join(traceback.format_exception(twin))


async def test_a_real_acquire_error_pickles_with_its_report(make: Any) -> None:
    from utils import AcquireError

    with pytest.raises(AcquireError) as caught:
        await make({"a": {"acquire_error": OSError("no")}}).__aenter__()

    assert pickle.loads(pickle.dumps(caught.value)).report == caught.value.report
