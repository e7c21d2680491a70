"""What can go wrong with a resource, as exception classes that say so.

    ResourceError
      ├─ AcquireError (ConnectionError)        it could not be acquired
      │    ├─ AcquireTimeout (TimeoutError)    … within its deadline
      │    └─ MissingDriver                    … because a package is not installed
      ├─ ReleaseError                          it could not be released
      │    └─ ReleaseTimeout (TimeoutError)    … within deadline and grace
      ├─ ResourceClosed                        it was used before it was ready, or after its end
      │    └─ ResourceLost                     it died while it was in use
      ├─ OperationError                        an operation on it failed
      │    ├─ OperationTimeout (TimeoutError)
      │    └─ ConnectionBroken (ConnectionError)
      └─ DependencyCycle, UnknownResource      the declaration does not add up

Several of one kind at once form an AcquireErrorGroup or a ReleaseErrorGroup. All of them pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timelines import Report


class ResourceError(Exception):
    """The base of everything here; `resource` is the name of the one concerned, if it is one."""

    def __init__(self, message: str = "", *, resource: str | None = None) -> None:
        super().__init__(message)
        self.resource = resource


class AcquireError(ResourceError, ConnectionError):
    """A resource could not be acquired; `__cause__` is the error of its driver.

    `report` has the timings of all resources up to the failure.
    """

    def __init__(
        self, message: str = "", *, resource: str | None = None, report: Report | None = None
    ) -> None:
        super().__init__(message, resource=resource)
        self.report = report


class AcquireTimeout(AcquireError, TimeoutError):
    """A resource was not ready when its deadline, or that of the start, had come."""


class MissingDriver(AcquireError):
    """A server is configured whose client is not installed."""


class ReleaseError(ResourceError):
    """A resource could not be released properly; `__cause__` is its own error."""


class ReleaseTimeout(ReleaseError, TimeoutError):
    """A resource did not close in time; it was cancelled, and abandoned if it went on."""


class ResourceClosed(ResourceError):
    """A resource was used before it was ready, or after it was released."""


class ResourceLost(ResourceClosed):
    """A resource died while it was in use; `__cause__` is what it died of."""


class OperationError(ResourceError):
    """An operation on a resource failed; `__cause__` is the error of its driver."""


class OperationTimeout(OperationError, TimeoutError):
    """A server did not answer an operation in time."""


class QueryTooLong(OperationTimeout):
    """A query took longer than it was allowed to; the server is fine."""


class ConnectionBroken(OperationError, ConnectionError):
    """The connection to a server broke, or could not be made again."""


class DependencyCycle(ResourceError, ValueError):
    """Resources need each other in a circle; `cycle` lists it, first and last the same."""

    def __init__(self, message: str = "", *, cycle: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.cycle = tuple(cycle)


class UnknownResource(ResourceError, KeyError):
    """A name was used that no resource has."""

    __str__ = Exception.__str__  # a KeyError would show its sentence in quotes


class AcquireErrorGroup(ExceptionGroup[AcquireError]):
    """Several resources could not be acquired; `except*` splits it."""

    report: Report | None = None

    def derive(self, excs: Sequence[AcquireError]) -> AcquireErrorGroup:  # type: ignore[override]
        """Keep the class when it is split."""
        group = AcquireErrorGroup(self.message, excs)
        group.report = self.report
        return group


class ReleaseErrorGroup(ExceptionGroup[ReleaseError]):
    """Several resources could not be released properly; `except*` splits it."""

    def derive(self, excs: Sequence[ReleaseError]) -> ReleaseErrorGroup:  # type: ignore[override]
        """Keep the class when it is split."""
        return ReleaseErrorGroup(self.message, excs)


def described(error: BaseException) -> str:
    """The error as one line: its type, and its sentence if it has one."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:500]}" if text else name
