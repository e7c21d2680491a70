"""Whether what is held works: asked of each resource, within a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from failures import described
from owners import READY, Owner

CHECK_SECONDS = 2.0  # for a resource to say whether it works


@dataclass(frozen=True)
class Health:
    """Whether one resource works: `healthy`, `degraded` (a stand-in serves) or `down`."""

    status: str
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class HealthReport:
    """The worst of all resources, and each of them."""

    status: str
    resources: dict[str, Health]


async def health_of(
    owners: Iterable[Owner], timeout: float, clock: Callable[[], float]
) -> HealthReport:
    """Ask all at once, each within the timeout."""
    asked = list(owners)
    answers = await asyncio.gather(*(ask(owner, timeout, clock) for owner in asked))
    statuses = {health.status for health in answers}
    worst = next((status for status in ("down", "degraded") if status in statuses), "healthy")
    return HealthReport(worst, {o.name: h for o, h in zip(asked, answers, strict=True)})


async def ask(owner: Owner, timeout: float, clock: Callable[[], float]) -> Health:
    """Ask one; whatever it answers with, an error means that it does not work."""
    began = clock()
    reason = owner.error or owner.loss
    if owner.state is not READY or owner.loss is not None:
        told = owner.status if reason is None else described(reason)
        return Health("degraded" if owner.optional else "down", 0.0, told)
    resource = getattr(owner.opening, "resource", None)
    try:
        if resource is not None:
            async with asyncio.timeout(timeout):
                answer = resource.check(owner.value)
                if asyncio.iscoroutine(answer):
                    await answer
    except TimeoutError:
        return Health("down", clock() - began, f"no answer within {timeout:g} s")
    except Exception as error:  # noqa: BLE001  (as the docstring says)
        return Health("down", clock() - began, described(error))
    return Health("degraded" if owner.degraded else "healthy", clock() - began)
