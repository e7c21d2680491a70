"""A crash at every durable step of a script: whatever was acknowledged is counted exactly once.

The script makes segments rotate and be trimmed after every few messages, uploads, refusals of the
disk, pipelines that come and go, a replay and its swap, dead letters that come to life. What each
crash leaves (a killed process, a power cut) is opened by the real recovery; the client sends again
what it got no answer for; then everything has to add up. The same for crashes of that recovery.
"""

import asyncio
import copy
import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash_points import DATABASE, KINDS, Disk, Durable, files_of

pytestmark = [pytest.mark.integration, pytest.mark.kill]

T0 = 1_700_000_000
SPEC: dict[str, Any] = {
    "select": {"k": "k", "v": "v"}, "event_time": "t", "event_id": "id", "group_by": ["k"],
    "aggregates": [{"op": "count"}, {"op": "sum", "field": "v"}],
    "window": {"kind": "sliding", "size_seconds": 20, "slide_seconds": 10,
               "allowed_lateness_seconds": 100_000},
}  # fmt: skip
PUNCTUAL = {**SPEC, "event_id": None, "window": {**SPEC["window"], "allowed_lateness_seconds": 0}}
LENIENT = {**SPEC, "event_id": None, "select": {"k": "k"}, "aggregates": [{"op": "count"}]}
OVERLAP = {"webhook": 1, "events": 6, "p": 2, "q": 2, "r": 2}  # windows that an event counts in


@dataclass
class Sent:
    """One body, and whether the client was answered."""

    pipeline: str
    lines: list[str]
    key: str | None = None
    attempts: int = 0
    answered: bool = False
    refused: bool = False


@dataclass
class Ledger:
    """What a client knows."""

    sent: list[Sent] = field(default_factory=list)
    pipelines: dict[str, tuple[dict[str, Any] | None, bool]] = field(default_factory=dict)


@dataclass
class Moment:
    """What a crash left, and what had been promised until then."""

    what: str
    data: Path
    durable: Durable
    ledger: Ledger


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens after megabytes happens after a few hundred bytes."""
    import applier
    import intake
    import spool

    defaults: Any = spool.FileQueue.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "segment_bytes", 700)
    monkeypatch.setattr(applier, "TRIM_BYTES", 4_000)
    monkeypatch.setattr(applier, "TAKE_BYTES", 1_500)
    monkeypatch.setattr(applier, "FOLD_EVENTS", 4)
    monkeypatch.setattr(applier, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(intake, "INLINE_BYTES", 1_000)
    monkeypatch.setattr(intake, "STAGED_SYNC_BYTES", 600)


def open_pipeline(data: Path) -> Any:
    from applier import Retention
    from utils import Pipeline

    return Pipeline(
        db_path=data / DATABASE, queue_dir=data / "queue", retention=Retention(7 * 86_400, 6_000),
        clock=lambda: T0 + 2_000.0, sync=lambda fd: os.fdatasync(fd), dedupe_keys=1_000,
    )  # fmt: skip


async def send(pipeline: Any, ledger: Ledger, name: str, *lines: Any, key: str = "") -> Sent:
    """Send a body as the route does, and note the answer."""
    sent = Sent(name, [each if isinstance(each, str) else json.dumps(each) for each in lines],
                key or None)  # fmt: skip
    ledger.sent.append(sent)
    await post(pipeline, sent)
    return sent


async def post(pipeline: Any, sent: Sent) -> None:
    sent.attempts += 1
    body = "\n".join(sent.lines).encode()
    projection = pipeline.projection(sent.pipeline)
    reader, intake = pipeline.reader(projection, "ndjson"), pipeline.intake(projection)
    try:
        for start in range(0, len(body), 400):
            for block in reader.feed(body[start : start + 400]):
                await intake.add(block)
        for block in reader.finish():
            await intake.add(block)
        key = sent.key and (sent.key.encode().ljust(16), str(hash(body)).encode())
        await intake.commit(202, key or None)
        sent.answered = True
    finally:
        intake.abort()


def measurement(n: int) -> dict[str, Any]:
    return {"data": {"category": f"c{n}", "value": n, "quantity": 1, "ts": T0 + n}}


def event(n: int) -> dict[str, Any]:
    return {"event_id": f"e{n}", "source": f"s{n % 2}", "event_type": f"e{n}",
            "data": {"v": n}, "timestamp": T0 + n % 50}  # fmt: skip


def order(n: int) -> dict[str, Any]:
    return {"id": f"o{n}", "k": f"o{n}", "v": n, "n": {"v": 1}, "t": T0 + n % 30}


async def script(pipeline: Any, ledger: Ledger, broken: Callable[[bool], None]) -> None:
    """What a service goes through in a week, in half a second."""
    from specs import PipelineSpec
    from utils import QueueRefused

    async def put(name: str, spec: dict[str, Any]) -> None:
        ledger.pipelines[name] = (spec, False)
        await pipeline.put_pipeline(name, PipelineSpec.model_validate(spec), replace=True)
        ledger.pipelines[name] = (spec, True)

    def soon(name: str, *lines: Any, key: str = "") -> "asyncio.Task[Sent]":
        return asyncio.create_task(send(pipeline, ledger, name, *lines, key=key))

    await pipeline.start_workers()
    await put("p", SPEC)
    for n in range(0, 12, 3):  # several share a sync
        await asyncio.gather(*(soon("webhook", measurement(n + m)) for m in range(3)))
    await send(pipeline, ledger, "events", *map(event, range(6)), "bad 1", key="one")
    await send(pipeline, ledger, "events", *map(event, range(4, 9)))
    await send(pipeline, ledger, "webhook", *map(measurement, range(20, 60)), key="upload")
    await send(pipeline, ledger, "p", *map(order, range(30)), "bad 2")
    await pipeline.applied(pipeline.queue.end)
    pipeline.pause_applying()
    for n in range(10, 60, 5):
        await send(pipeline, ledger, "events", *map(event, range(n, n + 5)))
        await send(pipeline, ledger, "p", *map(order, range(n + 18, n + 23)))
    await send(pipeline, ledger, "p", *map(order, range(60, 90)), *map(order, range(5)), key="two")
    pipeline.pause_applying(False)
    await pipeline.applied(pipeline.queue.end)

    broken(True)
    with pytest.raises(QueueRefused):
        await send(pipeline, ledger, "events", event(100))
    broken(False)
    ledger.sent[-1].refused = True
    await send(pipeline, ledger, "events", event(101), event(3))

    await put("r", SPEC)
    for n in range(300, 320, 4):
        await send(pipeline, ledger, "r", *map(order, range(n, n + 4)))
    await send(pipeline, ledger, "r", *map(order, range(320, 332)))
    assert pipeline.queue.statistics().first <= pipeline.put_at["r"]
    await pipeline.rebuild("r", 0)
    for n in range(110, 116):
        await send(pipeline, ledger, "events", event(n))
        await send(pipeline, ledger, "r", order(n))
    await pipeline.rebuilt("r")

    await put("q", PUNCTUAL)
    await send(pipeline, ledger, "q", {**order(200), "t": T0 + 100}, key="q1")
    for n in range(201, 205):  # too late, and refused, in turn: dead letters
        await send(pipeline, ledger, "q", {**order(n), "v": n if n % 2 else "x"}, key=f"q{n}")
    await pipeline.applied(pipeline.queue.end)
    await put("q", LENIENT)
    await pipeline.replay_dead_letters("q", "late")
    for n in range(120, 124):
        await send(pipeline, ledger, "webhook", measurement(n))
    await send(pipeline, ledger, "webhook", *map(measurement, range(130, 134)), key="last")


class Crashes:
    """Takes what a crash would leave at the chosen steps of what goes on in a directory."""

    def __init__(
        self, path: Path, chosen: Callable[[int, str], bool], of: Moment | None = None
    ) -> None:
        self.ledger = copy.deepcopy(of.ledger) if of else Ledger()
        self.moments: list[Moment] = []
        self.steps = 0
        self._path, self._chosen, self._of = path, chosen, of
        self.disk = Disk(
            of.data if of else path / "data", self._announce, of.durable if of else None
        )

    def _announce(self, what: str) -> None:
        self.steps += 1
        found: list[dict[Path, bytes]] = []
        for kind in KINDS if self._chosen(self.steps, what) else ():
            name = f"{kind} before step {self.steps}, {what}"
            into = self._path / f"{self.disk.root.name}.{self.steps}-{kind}"
            durable = self.disk.left(kind, into)
            if (files := files_of(into)) in found:
                continue  # everything is synced
            found.append(files)
            what_for = f"{name}, recovering from {self._of.what}" if self._of else name
            self.moments.append(Moment(what_for, into, durable, copy.deepcopy(self.ledger)))


def crashes_of_the_script(path: Path, chosen: Callable[[int, str], bool]) -> list[Moment]:
    crashes = Crashes(path, chosen)
    crashes.disk.root.mkdir()
    failing = False

    def broken(now: bool) -> None:
        nonlocal failing
        failing = now

    def sync(fd: int) -> None:
        if failing:
            raise OSError(errno.EIO, "broken")
        os.fdatasync(fd)

    async def run() -> None:
        pipeline = open_pipeline(crashes.disk.root)
        pipeline.sync = sync
        async with pipeline:
            await script(pipeline, crashes.ledger, broken)

    with crashes.disk.watched():
        asyncio.run(run())
    assert crashes.steps > 200
    return crashes.moments


def crashes_of_a_recovery(
    moment: Moment, path: Path, chosen: Callable[[int, str], bool]
) -> list[Moment]:
    crashes = Crashes(path, chosen, of=moment)
    with crashes.disk.watched():
        recover(moment, crashes.ledger)
    assert crashes.steps > 10
    return crashes.moments


def recover(moment: Moment, ledger: Ledger) -> None:
    """Open what was left, send again what was not answered, and compare."""
    try:
        asyncio.run(asyncio.wait_for(_recover(moment.data, ledger), 60))
    except BaseException as error:
        raise AssertionError(f"{moment.what}: {error!r}") from error


async def _recover(data: Path, ledger: Ledger) -> None:
    from specs import PipelineSpec

    async with open_pipeline(data) as pipeline:
        await pipeline.start_workers()
        for name, (spec, answered) in ledger.pipelines.items():
            assert not answered or pipeline.projections[name].spec.canonical() == (
                PipelineSpec.model_validate(spec).canonical()
            )
        for sent in ledger.sent:
            has_identity = sent.key or sent.pipeline != "webhook"
            known = sent.pipeline in pipeline.projections
            if has_identity and known and not sent.answered and not sent.refused:
                await post(pipeline, sent)
        await pipeline.applied(pipeline.queue.end)
        await pipeline.rebuilt("r")
        await pipeline.replay_dead_letters("q")
        await pipeline.stop_workers()
        compare(pipeline, ledger)


def compare(pipeline: Any, ledger: Ledger) -> None:
    counts = counted(pipeline)
    certain: dict[str, Counter[str]] = {name: Counter() for name in OVERLAP}
    possible: Counter[str] = Counter()
    for sent in ledger.sent:
        for line in sent.lines:
            if (group := group_of(sent.pipeline, line)) is None:
                continue
            if sent.answered:
                certain[sent.pipeline][group] = 1
            else:
                possible[group] = 1
    for name, expected in certain.items():
        found = counts[name]
        if name == "q":
            if ledger.pipelines.get("q") == (LENIENT, True):  # it began empty; the letters are back
                assert found == Counter(f"o{n}" for n in range(201, 205))
        else:
            assert {group for group in expected if found[group] != 1} == set(), name
        assert {group for group in found if found[group] > 1} == set(), name
        assert set(found) <= set(expected) | set(possible), name

    statistics = pipeline.queue.statistics()
    assert statistics.corrupt_frames == 0
    assert statistics.first <= pipeline.store.position() == pipeline.queue.end
    position = statistics.first
    for message in pipeline.queue.read(0):
        assert message.start == position
        position = message.end
    assert position == pipeline.queue.end
    assert (pipeline.backlog_events, pipeline.backlog_bytes) == (0, 0)

    stored = pipeline.store.totals()
    for name, totals in pipeline.totals.items():
        kept = stored.get((name, ""), type(totals)())
        for each in "accepted", "rejected", "duplicates", "filtered":
            assert getattr(totals, each) == getattr(kept, each), (name, each)
        if name != "q":
            assert totals.accepted == counts[name].total(), name
    letters = Counter(letter.record.raw for letter in pipeline.store.dead_letters(0, 1000))
    for sent in ledger.sent:
        for line in sent.lines:
            if line.startswith("bad") and sent.answered:
                assert 1 <= letters[line.encode()] <= (1 if sent.key else sent.attempts)
    files = {path.name for path in pipeline.uploads.iterdir()}
    assert files <= {upload.name for upload in pipeline.store.uploads()}


def counted(pipeline: Any) -> dict[str, Counter[str]]:
    """How often each event is counted, by what only it is grouped by."""
    from storage import AggregateQuery

    found = {name: Counter[str]() for name in OVERLAP}
    for row in pipeline.store.aggregates(AggregateQuery(limit=100_000)):
        found[row.pipeline][row.group[-1]] += row.count
    for name, each in found.items():
        for group in each:
            assert each[group] % OVERLAP[name] == 0, (name, group)
            each[group] //= OVERLAP[name]
    return found


def group_of(pipeline: str, line: str) -> str | None:
    if line.startswith("bad"):
        return None
    document = json.loads(line)
    if pipeline == "webhook":
        return str(document["data"]["category"])
    return str(document["event_type"] if pipeline == "events" else document["k"])


@pytest.mark.usefixtures("small_parts")
class TestWhateverACrashLeavesIsRecovered:
    def test_at_some_steps(self, tmp_path: Path) -> None:
        for moment in crashes_of_the_script(tmp_path, lambda step, _: step % 11 == 5):
            recover(moment, moment.ledger)

    @pytest.mark.load
    def test_at_every_step(self, tmp_path: Path) -> None:
        for moment in crashes_of_the_script(tmp_path, lambda *_: True):
            recover(moment, moment.ledger)

    @pytest.mark.load
    def test_also_when_the_recovery_crashes(self, tmp_path: Path) -> None:
        def chosen(step: int, what: str) -> bool:  # a new segment has no name yet after a cut
            return step % 41 == 7 or (what == "sync queue/ingest" and step % 4 == 0)

        for first in crashes_of_the_script(tmp_path, chosen):
            for second in crashes_of_a_recovery(first, tmp_path, lambda step, _: step % 4 == 0):
                recover(second, second.ledger)
