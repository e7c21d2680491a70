"""Breaker, rate limiter and schedule, in virtual time."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from virtual_time import VirtualLoop, clock, run

from limiter import LearningLimiter, RateLimiter, Slot
from resilience import Breaker, Failed, Guard, Limited, Refused, State, StillDown
from simulators import worst_window

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(time: Clock, **options: Any) -> Breaker:
    breaker = Breaker(3, 2.0, clock=time, **options)
    for _ in range(3):
        breaker.failure(ticket_of(breaker))
    assert breaker.state is State.OPEN
    return breaker


def ticket_of(breaker: Breaker) -> int:
    ticket = breaker.admit()
    assert ticket is not None
    return ticket


def state_of(breaker: Breaker) -> str:
    return str(breaker.state)


class TestBreaker:
    def test_it_opens_at_exactly_the_third_failure_in_a_row(self) -> None:
        breaker = Breaker(3, 2.0, clock=Clock())
        for outcome in (breaker.failure, breaker.failure, breaker.success, breaker.failure,
                        breaker.failure):  # fmt: skip
            outcome(ticket_of(breaker))
        assert state_of(breaker) == "closed"

        breaker.failure(ticket_of(breaker))

        assert state_of(breaker) == "open"
        assert breaker.admit() is None
        assert breaker.openings == 1

    def test_after_the_recovery_time_exactly_one_of_ten_gets_through(self) -> None:
        async def scenario() -> tuple[list[float], list[float]]:
            breaker = Breaker(1, 2.0, clock=clock)
            breaker.failure(ticket_of(breaker))
            began = clock()
            admitted: list[float] = []

            async def caller() -> None:
                ticket = await breaker.enter()
                admitted.append(clock() - began)
                await asyncio.sleep(1)
                breaker.success(ticket)

            callers = [asyncio.create_task(caller()) for _ in range(10)]
            await asyncio.sleep(2.5)
            during_the_probe = list(admitted)
            await asyncio.gather(*callers)
            return during_the_probe, admitted

        during_the_probe, admitted = run(scenario())

        assert during_the_probe == [pytest.approx(2)]
        assert admitted[1:] == [pytest.approx(3)] * 9

    def test_outcomes_of_calls_from_before_a_change_do_not_count(self) -> None:
        time = Clock()
        breaker = Breaker(3, 2.0, clock=time)
        late = ticket_of(breaker)
        for _ in range(3):
            breaker.failure(ticket_of(breaker))
        breaker.success(late)
        assert state_of(breaker) == "open"
        time.now = 2.0
        probe = ticket_of(breaker)
        breaker.success(late)
        breaker.failure(late)
        breaker.release(late)

        assert state_of(breaker) == "half-open"
        assert breaker.admit() is None
        breaker.success(probe)
        assert state_of(breaker) == "closed"
        for _ in range(3):
            breaker.failure(probe)
        assert state_of(breaker) == "closed"

    def test_a_probe_without_a_verdict_makes_room_for_the_next(self) -> None:
        time = Clock()
        breaker = opened(time)
        time.now = 2.0
        breaker.release(ticket_of(breaker))

        assert breaker.admit() is not None
        assert breaker.admit() is None

    def test_every_failed_probe_doubles_the_pause_up_to_the_longest(self) -> None:
        time = Clock()
        breaker = opened(time, longest_seconds=5)
        for pause in (2, 4, 5, 5):
            time.now += pause - 1
            assert breaker.admit() is None
            time.now += 1
            breaker.failure(ticket_of(breaker))
        assert breaker.openings == 5
        time.now += 5
        breaker.success(ticket_of(breaker))
        for _ in range(3):
            breaker.failure(ticket_of(breaker))
        time.now += 2
        assert breaker.admit() is not None

    def test_out_of_patience_everybody_who_waits_is_told(self) -> None:
        async def scenario() -> list[Any]:
            breaker = Breaker(1, 2.0, patience=2, clock=clock)
            breaker.failure(ticket_of(breaker))

            async def caller() -> None:
                while True:
                    breaker.failure(await breaker.enter())

            return await asyncio.gather(*(caller() for _ in range(5)), return_exceptions=True)

        assert [type(each) for each in run(scenario())] == [StillDown] * 5


async def saturate(
    limiter: RateLimiter,
    seconds: float,
    serve: Callable[[Slot], Awaitable[None]],
) -> None:
    """Ask as fast as the limiter allows."""

    async def one(slot: Slot) -> None:
        try:
            await serve(slot)
        finally:
            slot.close()

    async with asyncio.TaskGroup() as group:
        until = clock() + seconds
        while clock() < until:
            group.create_task(one(await limiter.acquire()))


class TestRateLimiter:
    @pytest.mark.parametrize("seed", range(30))
    def test_no_closed_second_holds_six_however_late_things_are_seen(self, seed: int) -> None:
        """Sending, seeing and answering are late by chance, as on a machine that has no time."""
        chance = random.Random(seed)
        seen: list[float] = []

        async def serve(slot: Slot) -> None:
            await asyncio.sleep(chance.choice((0, 0, 0.03, 0.2)) * chance.random())
            slot.sent()
            await asyncio.sleep(chance.choice((0, 0, 0.01, 0.069)) * chance.random())
            seen.append(clock())
            await asyncio.sleep(chance.choice((0, 0.02, 0.3, 1.5)) * chance.random())
            slot.answered()

        run(saturate(RateLimiter(5, clock=lambda: clock()), 60, serve))

        assert len(seen) > 100
        assert worst_window(seen) <= 5

    @pytest.mark.parametrize("latency", [0.0, 0.02, 0.2, 0.8])
    def test_saturated_it_reaches_4_6_per_second_whatever_the_latency(self, latency: float) -> None:
        seen: list[float] = []

        async def serve(slot: Slot) -> None:
            slot.sent()
            seen.append(clock())
            await asyncio.sleep(latency)
            slot.answered()

        run(saturate(RateLimiter(5, clock=lambda: clock()), 60, serve))

        assert (len(seen) - 1) / (seen[-1] - seen[0]) >= 4.6
        assert worst_window(seen) <= 5

    @pytest.mark.parametrize("latency", [1.5, 2.5])
    def test_once_it_is_known_to_be_slow_a_service_gets_its_rate_too(self, latency: float) -> None:
        seen: list[float] = []

        async def serve(slot: Slot) -> None:
            slot.sent()
            seen.append(clock())
            await asyncio.sleep(latency)
            slot.answered()

        run(saturate(RateLimiter(5, clock=lambda: clock()), 60, serve))

        known = [at for at in seen if at > seen[0] + 4 * latency]
        assert (len(known) - 1) / (known[-1] - known[0]) >= 4.6
        assert worst_window(seen) <= 5

    @pytest.mark.parametrize("seed", range(10))
    def test_what_arrives_later_than_the_guard_shows_in_its_answer(self, seed: int) -> None:
        """A busy machine: one request in ten is seen up to half a second late."""
        chance = random.Random(seed)
        seen: list[float] = []

        async def serve(slot: Slot) -> None:
            slot.sent()
            await asyncio.sleep(chance.choice((0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5)) * chance.random())
            seen.append(clock())
            await asyncio.sleep(0.05)
            slot.answered()

        run(saturate(RateLimiter(5, clock=lambda: clock()), 60, serve))

        assert worst_window(seen) <= 5

    @pytest.mark.parametrize(
        ("stall", "work"),
        [*((stall, 0.05) for stall in (0.3, 0.6, 0.9, 1.2, 3)), (0.9, 0.3), (1.2, 0.3), (3, 0.3)],
    )
    def test_requests_that_met_a_stall_count_from_its_end(self, stall: float, work: float) -> None:
        chance = random.Random(7)
        seen: list[float] = []

        async def scenario() -> None:
            began = clock()

            async def stand_still() -> None:
                since = (clock() - began) % 7
                if since < stall:  # nothing is seen and answered, then all at once
                    await asyncio.sleep(stall - since)

            async def serve(slot: Slot) -> None:
                slot.sent()
                await stand_still()
                seen.append(clock())
                await asyncio.sleep(work * chance.random())
                await stand_still()
                slot.answered()

            await saturate(RateLimiter(5, clock=clock), 60, serve)

        run(scenario())

        assert worst_window(seen) <= 5

    def test_where_timers_are_late_the_rate_is_reached_still(self) -> None:
        class LateLoop(VirtualLoop):
            """Wakes 45 ms late from a long sleep, 1 ms from a short one."""

            def oversleep(self, timeout: float) -> float:
                return timeout + (0.045 if timeout > 0.005 else 0.001 if timeout > 0 else 0)

        chance = random.Random(7)
        seen: list[float] = []

        async def serve(slot: Slot) -> None:
            slot.sent()
            seen.append(clock())
            await asyncio.sleep(chance.uniform(0.03, 0.12))
            slot.answered()

        run(saturate(RateLimiter(5, clock=lambda: clock()), 60, serve), LateLoop)

        assert (len(seen) - 1) / (seen[-1] - seen[0]) >= 4.6
        assert worst_window(seen) <= 5

    def test_a_service_that_stands_still_gets_five_requests_and_no_burst_afterwards(self) -> None:
        seen: list[float] = []

        async def scenario() -> None:
            thaws = clock() + 10

            async def serve(slot: Slot) -> None:
                slot.sent()
                await asyncio.sleep(max(0.0, thaws - clock()))
                seen.append(clock())
                slot.answered()

            await saturate(RateLimiter(5, clock=clock), 20, serve)

        run(scenario())

        assert worst_window(seen) <= 5
        assert len(seen) > 40

    def test_a_pause_holds_for_everybody_and_then_first_come_is_first_served(self) -> None:
        async def scenario() -> list[tuple[int, float]]:
            limiter, began, order = RateLimiter(5, clock=clock), clock(), []
            limiter.pause(3)

            async def caller(number: int) -> None:
                slot = await limiter.acquire()
                order.append((number, clock() - began))
                slot.answered()
                slot.close()

            await asyncio.gather(*(caller(number) for number in range(7)))
            return order

        order = run(scenario())

        assert [number for number, _ in order] == list(range(7))
        assert order[0][1] == pytest.approx(3)
        assert order[5][1] > 4

    @pytest.mark.parametrize(("rate", "count"), [(0.5, 6), (1, 11), (2.5, 26), (40, 401)])
    def test_other_rates_are_kept_too(self, rate: float, count: int) -> None:
        seen: list[float] = []

        async def serve(slot: Slot) -> None:
            seen.append(clock())
            slot.answered()

        run(saturate(RateLimiter(rate, clock=lambda: clock()), 10, serve))

        in_time = [at for at in seen if at - seen[0] <= 10]
        assert count * 0.9 - 1 <= len(in_time) <= count

    def test_a_slot_that_was_not_used_is_given_to_the_next(self) -> None:
        async def scenario() -> float:
            limiter, began = RateLimiter(1, clock=clock), clock()
            (await limiter.acquire()).close(unused=True)
            (await limiter.acquire()).close()
            return clock() - began

        assert run(scenario()) < 1

    def test_a_process_before_this_one_is_counted_in(self) -> None:
        async def scenario() -> float:
            began = clock()
            limiter = RateLimiter(5, idle_since=began - 0.4, clock=clock)
            (await limiter.acquire()).close()
            return clock() - began

        assert run(scenario()) > 0.6


def guard(**options: Any) -> Guard:
    breaker = Breaker(options.pop("failures", 3), 2.0, clock=clock,
                      patience=options.pop("patience", None))  # fmt: skip
    return Guard(RateLimiter(options.pop("rate", 1000), clock=clock), breaker, **options)


async def timed(subject: Guard, outcomes: Sequence[object]) -> tuple[list[float], Any]:
    """The times of the calls, and what came out; a number is a call of that many seconds."""
    began, times = clock(), []

    async def send(slot: Slot) -> str:
        del slot
        times.append(round(clock() - began, 2))
        outcome = outcomes[len(times) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, float):
            await asyncio.sleep(outcome)
        return "done"

    try:
        return times, await subject.call(send)
    except Exception as error:  # noqa: BLE001  (it is what the tests look at)
        return times, error


class TestGuard:
    def test_it_tries_again_after_a_half_one_and_two_seconds_then_gives_up(self) -> None:
        async def scenario() -> tuple[list[float], Any, Guard]:
            subject = guard(failures=10)
            return *await timed(subject, [Failed("http_500", "no")] * 4), subject

        times, error, subject = run(scenario())

        assert times == [0, 0.5, 1.5, 3.5]
        assert isinstance(error, Failed)
        assert subject.tally.backoffs == [0.5, 1, 2]
        assert (subject.tally.attempts, subject.tally.retries) == (4, 3)

    def test_a_429_pauses_and_costs_neither_an_attempt_nor_the_breakers_patience(self) -> None:
        async def scenario() -> tuple[list[float], Any, Guard]:
            subject = guard(failures=1, longest_pause_seconds=5)
            asked = [Limited(1), Limited(1e9), Limited(), Limited(-1), Limited(0), "done"]
            return *await timed(subject, asked), subject

        times, result, subject = run(scenario())

        assert times == [0, 1, 6, 7, 7, 7]
        assert result == "done"
        assert subject.breaker.state is State.CLOSED
        assert subject.tally.limited == 5
        assert subject.tally.retries == 0

    def test_an_open_breaker_parks_an_item_which_then_goes_on_with_its_schedule(self) -> None:
        async def scenario() -> tuple[list[float], Any]:
            return await timed(guard(), [*[Failed("x", "")] * 3, "done"])

        times, result = run(scenario())

        # Failures at 0, 0.5 and 1.5 s open it until 3.5 s, when its own 2 s are over as well.
        assert times == [0, 0.5, 1.5, 3.5]
        assert result == "done"

    def test_what_is_refused_is_not_tried_again_and_proves_that_the_service_works(self) -> None:
        async def scenario() -> tuple[list[float], Any, Guard]:
            subject = guard(failures=2)
            await timed(subject, [Failed("x", ""), Refused("http_404", "no")])
            return *await timed(subject, [Failed("x", ""), "done"]), subject

        _, result, subject = run(scenario())

        assert result == "done"
        assert subject.breaker.openings == 0

    def test_a_call_that_takes_too_long_failed(self) -> None:
        async def scenario() -> tuple[list[float], Any, Guard]:
            subject = guard(call_seconds=3)
            return *await timed(subject, [100.0, "done"]), subject

        times, _, subject = run(scenario())

        assert times == [0, 3.5]
        assert subject.tally.failures == {"timeout": 1}

    def test_with_ten_items_parked_one_probe_goes_out_and_costs_a_slot(self) -> None:
        async def scenario() -> list[float]:
            subject, began, calls = guard(rate=5, failures=3), clock(), list[float]()

            async def send(slot: Slot) -> None:
                slot.answered()
                calls.append(clock() - began)
                await asyncio.sleep(0.05)
                if len(calls) < 5:
                    raise Failed("http_500", "down")

            await asyncio.gather(*(subject.call(send) for _ in range(10)))
            return calls

        calls = run(scenario())

        gaps = [later - earlier for earlier, later in pairwise(calls)]
        assert gaps[2] >= 2  # one probe, when the recovery time is over;
        assert gaps[3] >= 4  # it failed, so the next alone comes after twice the time,
        assert max(gaps[4:]) < 1  # and lets the others in
        assert worst_window(calls) <= 5

    def test_who_waited_for_a_slot_when_it_opened_does_not_hold_up_the_probe(self) -> None:
        async def scenario() -> list[float]:
            subject, began, calls = guard(rate=1, failures=3), clock(), list[float]()

            async def send(slot: Slot) -> None:
                slot.answered()
                calls.append(clock() - began)
                if len(calls) <= 3:
                    raise Failed("http_500", "down")

            waiting = [asyncio.create_task(subject.call(send)) for _ in range(60)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in waiting:
                each.cancel()
            return calls

        calls = run(scenario())

        assert calls[3] - calls[2] == pytest.approx(2, abs=0.1)

    def test_if_patient_an_outage_of_any_length_uses_up_no_attempts(self) -> None:
        async def scenario() -> tuple[list[float], Any]:
            return await timed(
                guard(patient_with={"connect"}), [*[Failed("connect", "")] * 20, "done"]
            )

        times, result = run(scenario())

        assert result == "done"
        assert times[-1] > 400

    def test_a_cancelled_probe_does_not_block_the_others(self) -> None:
        async def scenario() -> str:
            subject = guard(failures=1, attempts=1)

            async def fail(slot: Slot) -> None:
                raise Failed("x", "")

            async def hang(slot: Slot) -> None:
                await asyncio.sleep(1000)

            async def work(slot: Slot) -> str:
                return "done"

            with pytest.raises(Failed):
                await subject.call(fail)
            probe = asyncio.create_task(subject.call(hang))
            other = asyncio.create_task(subject.call(work))
            await asyncio.sleep(2.5)
            probe.cancel()
            return await other

        assert run(scenario()) == "done"


class Limiting:
    """A service that admits so many calls in a second, and says no to `at_first` without cause."""

    def __init__(self, limit: int, *, at_first: int = 0) -> None:
        self.limit = limit
        self.at_first = at_first
        self.whole_seconds = False
        self.admitted: list[float] = []
        self.refused: list[float] = []

    async def send(self, slot: Slot) -> None:
        now = clock()
        recent = [at for at in self.admitted if at >= now - 1]
        if len(recent) >= self.limit or len(self.refused) < self.at_first:
            self.refused.append(now)
            full = len(recent) >= self.limit and not self.whole_seconds
            raise Limited(recent[-self.limit] + 1.001 - now if full else 1)
        self.admitted.append(now)
        await asyncio.sleep(0.03)

    def use(self, *phases: tuple[float, float, int]) -> None:
        """Seconds, pause between the calls of a caller, and the limit, one after the other."""

        async def scenario() -> None:
            subject = Guard(LearningLimiter(clock=clock), Breaker(clock=clock))
            for seconds, pause, self.limit in phases:
                until = clock() + seconds

                async def caller(until: float = until, pause: float = pause) -> None:
                    while clock() < until:
                        await subject.call(self.send)
                        await asyncio.sleep(pause)

                await asyncio.gather(*(caller() for _ in range(20)))

        run(scenario())

    def since(self, seconds: float) -> int:
        """How many were admitted from then on."""
        return sum(at >= self.admitted[0] + seconds for at in self.admitted)


class TestLearning:
    @pytest.mark.parametrize("limit", [3, 10, 40])
    @pytest.mark.parametrize("whole_seconds", [False, True])
    def test_the_limit_is_found_from_429s_and_nearly_used(
        self, limit: int, whole_seconds: bool
    ) -> None:
        service = Limiting(limit)
        service.whole_seconds = whole_seconds
        service.use((30, 0, limit))

        assert len(service.admitted) >= 0.85 * 30 * limit
        assert len(service.refused) <= 0.1 * len(service.admitted)

    def test_429s_without_cause_at_the_start_cost_seconds_and_not_minutes(self) -> None:
        service = Limiting(20, at_first=4)
        service.use((60, 0, 20))

        assert service.since(40) >= 0.8 * 20 * 20

    def test_a_limit_that_rises_or_falls_is_found_again(self) -> None:
        service = Limiting(5)
        service.use((100, 0, 5), (100, 0, 40), (60, 0, 8))

        assert service.since(170) - service.since(200) >= 0.8 * 30 * 40
        assert service.since(230) >= 0.8 * 30 * 8

    def test_a_rate_that_is_not_used_does_not_rise(self) -> None:
        service = Limiting(10)
        service.use((200, 10, 10), (10, 0, 10))  # two calls a second, then all at once

        assert len(service.refused) <= 20
        assert service.since(200) >= 0.8 * 10 * 10
