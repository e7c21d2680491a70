"""What surfaces of a run: exactly one exception, and what ranks lower becomes its note.

    KeyboardInterrupt, SystemExit > cancellation > the body's own error > release errors

A start that fails surfaces what failed, not what was cancelled because of it. A resource that dies
in use cancels the body; `ResourceLost` then stands in for that cancellation, and for no other.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError

from failures import (
    AcquireError,
    AcquireErrorGroup,
    AcquireTimeout,
    ReleaseError,
    ReleaseErrorGroup,
    ReleaseTimeout,
    ResourceError,
    ResourceLost,
    described,
)
from owners import Owner

log = logging.getLogger("resources")
ENDS_PROGRAMS = (KeyboardInterrupt, SystemExit)  # never wrapped, and above everything else
Failures = list[tuple[Owner, BaseException]]


class Outcome:
    """Collects what goes wrong in one run, each under the name of its resource."""

    def __init__(self, *, cancel_when_lost: bool) -> None:
        self.cancel_when_lost = cancel_when_lost
        self.acquire_failures: Failures = []
        self.hidden_failures: Failures = []  # in answer to our own cancellation
        self.release_failures: Failures = []
        self.losses: list[Owner] = []
        self.withdrawn = False  # the manager was closed while it started

    # --- each under its name ---

    def not_acquired(self, owner: Owner, error: BaseException, limit: float) -> BaseException:
        """The error as the one that names its resource."""
        if (fatal := _ends_program(error, owner)) is not None:
            return fatal
        if owner.timed_out:
            failure: AcquireError = AcquireTimeout(
                f"resource {owner.name!r} was not ready within {limit:g} s", resource=owner.name
            )
        elif owner.cancels and isinstance(error, CancelledError):
            return error
        elif isinstance(error, AcquireError):
            if error.resource is None:
                error.resource = owner.name
                error.args = (f"resource {owner.name!r}: {error}",)
            return error
        else:
            failure = AcquireError(
                f"resource {owner.name!r} could not be acquired: {described(error)}",
                resource=owner.name,
            )
        failure.__cause__ = error
        return failure

    def not_released(self, owner: Owner, error: BaseException, limit: float) -> BaseException:
        """The error as the one that names its resource; it will surface, or be a note."""
        failure = _ends_program(error, owner) or error
        if not isinstance(failure, (*ENDS_PROGRAMS, ReleaseError)):
            if owner.timed_out:
                failure = ReleaseTimeout(
                    f"resource {owner.name!r} was not released within {limit:g} s and was "
                    + ("abandoned" if owner.abandoned else "cancelled"),
                    resource=owner.name,
                )
            else:
                failure = ReleaseError(
                    f"resource {owner.name!r} could not be released: {described(error)}",
                    resource=owner.name,
                )
            failure.__cause__ = error
        owner.error = failure
        self.release_failures.append((owner, failure))
        return failure

    def answered(self, exc: BaseException, error: BaseException | None) -> None:
        """An exit in the caller's task replaced or suppressed what was being unwound there."""
        if error is None:
            self.release_failures = [pair for pair in self.release_failures if not pair[0].here]
        else:
            self.release_failures = [pair for pair in self.release_failures if pair[1] is not exc]

    # --- what surfaces ---

    @property
    def start_failed(self) -> bool:
        """Whether something kept the start from succeeding, cancellation aside."""
        return bool(self.acquire_failures or self.losses or self.withdrawn)

    def of_start(self, unwinding: BaseException | None) -> BaseException:
        """Why the start is given up."""
        failures = [failure for _, failure in self.acquire_failures]
        fatal = [each for each in failures if isinstance(each, ENDS_PROGRAMS)]
        errors = [each for each in failures if isinstance(each, AcquireError)]
        primary: BaseException
        if fatal:
            primary = fatal[0]
        elif unwinding is not None:
            primary = unwinding
        elif len(errors) > 1:
            primary = AcquireErrorGroup(f"{len(errors)} resources could not be acquired", errors)
        elif errors:
            primary = errors[0]
        elif self.losses:
            primary = self._lost(self.losses[0])
        else:
            primary = AcquireError("The manager was closed while it was being entered.")
        shown = errors if isinstance(primary, AcquireErrorGroup) else [primary]
        for owner, failure in [*self.acquire_failures, *self.hidden_failures]:
            if failure not in shown:
                primary.add_note(f"besides, {told(owner, failure)}")
        return primary

    def of_stop(
        self, body: BaseException | None, unwinding: BaseException | None, *, by_loss: bool
    ) -> BaseException | None:
        """What surfaces; `by_loss` says that the cancellation being unwound was ours."""
        failures = [failure for _, failure in self.release_failures]
        fatal = [each for each in failures if not isinstance(each, ReleaseError)]
        errors = [each for each in failures if isinstance(each, ReleaseError)]
        cancelled = isinstance(unwinding, CancelledError)
        primary: BaseException | None
        if isinstance(unwinding, ENDS_PROGRAMS):
            primary = unwinding
        elif fatal:
            primary = fatal[0]
        elif (
            self.losses and self.cancel_when_lost and (unwinding is None or (by_loss and cancelled))
        ):
            primary = self._lost(self.losses[0])
        elif unwinding is not None and (
            unwinding is body or not isinstance(unwinding, ReleaseError)
        ):
            primary = unwinding
        elif len(errors) > 1:
            primary = ReleaseErrorGroup(f"{len(errors)} resources could not be released", errors)
        else:
            primary = errors[0] if errors else None
        self._add_notes(primary, body)
        return primary

    def _add_notes(self, primary: BaseException | None, body: BaseException | None) -> None:
        if primary is None:
            return
        if primary is not body and isinstance(primary, (ReleaseError, ReleaseErrorGroup)):
            return  # it is, or has, all there is to tell
        for owner, failure in self.release_failures:
            if failure is not primary:
                primary.add_note(f"besides, {told(owner, failure)}")
                log.error("%s", told(owner, failure))
        if body is not None and primary is not body:
            inherit(primary, body)
        if not isinstance(primary, ResourceLost):
            for owner in self.losses:
                primary.add_note(f"resource {owner.name!r} was lost: {described_loss(owner)}")

    def _lost(self, owner: Owner) -> ResourceLost:
        lost = ResourceLost(
            f"resource {owner.name!r} was lost while it was in use: {described_loss(owner)}",
            resource=owner.name,
        )
        lost.__cause__ = owner.loss
        for other in self.losses:
            if other is not owner:
                lost.add_note(f"resource {other.name!r} was lost too: {described_loss(other)}")
        return lost


def _ends_program(error: BaseException, owner: Owner) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit that it is, or that a group of it hides."""
    if isinstance(error, ENDS_PROGRAMS):
        return error
    found: BaseException | None = None
    if isinstance(error, BaseExceptionGroup):
        found = error.subgroup(ENDS_PROGRAMS)
    if found is None:
        return None
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    found.add_note(f"besides, resource {owner.name!r} ended with {described(error)}")
    return found


def inherit(primary: BaseException, lower: BaseException) -> None:
    """What was to surface gives way to something higher: all that it told is told with that."""
    if not isinstance(lower, CancelledError):
        primary.add_note(f"before that: {described(lower)}")
    parts = lower.exceptions if isinstance(lower, BaseExceptionGroup) else ()
    for note in [*map(described, parts), *getattr(lower, "__notes__", ())]:
        primary.add_note(f"with it: {note}")


def told(owner: Owner, failure: BaseException) -> str:
    """A failure in a sentence that names its resource."""
    if isinstance(failure, ResourceError):
        return str(failure)
    return f"resource {owner.name!r} ended with {described(failure)}"


def described_loss(owner: Owner) -> str:
    """What it died of, in one line."""
    if owner.loss is None or isinstance(owner.loss, CancelledError):
        return "its task was cancelled from inside"
    return described(owner.loss)
