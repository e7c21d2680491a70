"""What a run of a manager took: per resource, altogether, and along its critical path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from failures import described

if TYPE_CHECKING:
    from engine import Run


@dataclass(frozen=True)
class Timing:
    """One resource: seconds it waited for its needs, was acquired, held and released."""

    state: str
    kind: str = "resource"
    needs: tuple[str, ...] = ()
    started_at_s: float | None = None  # seconds after the manager was entered
    wait_s: float = 0.0
    acquire_s: float | None = None
    hold_s: float | None = None
    release_s: float | None = None
    attempts: int = 0
    error: str | None = None
    abandoned: bool = False
    degraded: bool = False


@dataclass(frozen=True)
class Report:
    """A whole run. `sum_s` is what one after the other would have taken, `wall_s` what it took.

    Both add up start and stop; `critical_path` is the chain of needs that the start waited for.
    """

    run_id: str
    name: str
    resources: dict[str, Timing] = field(default_factory=dict)
    wall_s: float = 0.0
    sum_s: float = 0.0
    saved_s: float = 0.0
    start_s: float = 0.0
    stop_s: float = 0.0
    critical_path: tuple[str, ...] = ()
    abandoned: int = 0
    lost: int = 0
    suppressed: int = 0
    degraded: tuple[str, ...] = ()
    children: tuple[Report, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)


class Timed(Protocol):
    """What a report is made of: the moments in the life of one resource."""

    name: str
    kind: str
    asked_at: float
    acquiring_at: float
    ready_at: float
    releasing_at: float
    released_at: float
    attempts: int
    error: BaseException | None
    abandoned: bool

    @property
    def needs(self) -> Sequence[Any]:
        """Others of the same kind."""
        ...

    @property
    def status(self) -> str:
        """The state in one word."""
        ...

    @property
    def degraded(self) -> bool:
        """Whether a stand-in serves."""
        ...


def timing_of(owner: Timed, began: float, now: float) -> Timing:
    """The seconds between the moments; what still lasts is counted up to now."""
    acquiring, ready = owner.acquiring_at, owner.ready_at
    releasing, released = owner.releasing_at, owner.released_at
    wait = acquiring - (owner.asked_at or began) if acquiring else 0.0
    return Timing(
        state=owner.status,
        kind=owner.kind,
        needs=tuple(need.name for need in owner.needs),
        started_at_s=acquiring - began if acquiring else None,
        wait_s=wait,
        acquire_s=(ready or released or now) - acquiring if acquiring else None,
        hold_s=(releasing or now) - ready if ready else None,
        release_s=(released or now) - releasing if releasing else None,
        attempts=owner.attempts,
        error=described(owner.error) if owner.error is not None else None,
        abandoned=owner.abandoned,
        degraded=owner.degraded,
    )


def report_of(
    run: Run | None,
    owners: Iterable[Timed],
    *,
    name: str,
    run_id: str,
    now: float,
    children: tuple[Report, ...],
) -> Report:
    """The timings of a run so far; of what is only declared, its names."""
    if run is None:
        declared = {owner.name: timing_of(owner, 0.0, 0.0) for owner in owners}
        return Report(run_id=run_id, name=name, resources=declared)
    timings = {owner.name: timing_of(owner, run.began_at, now) for owner in run.owners}
    start = (run.started_at or now) - run.began_at
    stop = (run.stopped_at or now) - run.stopping_at if run.stopping_at else 0.0
    total = sum((t.acquire_s or 0.0) + (t.release_s or 0.0) for t in timings.values())
    return Report(
        run_id=run_id,
        name=name,
        resources=timings,
        wall_s=start + stop,
        sum_s=total,
        saved_s=total - start - stop,
        start_s=start,
        stop_s=stop,
        critical_path=critical_path(owner for owner in run.owners if not owner.late),
        abandoned=run.abandoned,
        lost=len(run.outcome.losses),
        suppressed=run.suppressed,
        degraded=tuple(name for name, timing in timings.items() if timing.degraded),
        children=children,
    )


def figures_of(report: Report, *, full: bool, nested: list[dict[str, Any]]) -> dict[str, Any]:
    """A report as counts, and in full with its timings."""
    states = [timing.state for timing in report.resources.values()]
    figures: dict[str, Any] = {
        "manager": report.name,
        "run_id": report.run_id,
        "enabled": full,
        "resources_total": len(states),
        "in_use": states.count("ready"),
        "released": states.count("released"),
        "failed": states.count("failed"),
        "abandoned": report.abandoned,
        "lost": report.lost,
        "nested": nested,
    }
    if full:
        plain = report.as_dict()
        for name in ("resources", "wall_s", "sum_s", "saved_s", "critical_path"):
            figures[name] = plain[name]
    return figures


def critical_path(owners: Iterable[Timed]) -> tuple[str, ...]:
    """The chain that ended last: from its end back through whichever need was ready last."""
    done = [owner for owner in owners if owner.ready_at]
    if not done:
        return ()
    step = max(done, key=lambda owner: owner.ready_at)
    path = [step.name]
    while needs := [need for need in step.needs if need.ready_at]:
        step = max(needs, key=lambda owner: owner.ready_at)
        path.append(step.name)
    return tuple(reversed(path))
