"""When an event counts, and when it came too late: tumbling windows and the watermark.

Pure logic: no I/O and no clock, so that a replay gives the same rows at any speed. All times are
integer microseconds since the epoch.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MICROSECONDS: Final = 1_000_000
BEGINNING: Final = -(2**62)  # the watermark of a source that has not spoken yet
REMEMBERED_SOURCES: Final = 10_000  # watermarks held in memory; the others are in the store


@dataclass(frozen=True)
class Tumbling:
    """Windows of one size, aligned to the epoch, each event in exactly one."""

    size: int

    @classmethod
    def of_seconds(cls, seconds: float) -> "Tumbling":
        """Raise ValueError unless the size is between a millisecond and a year."""
        if not 0.001 <= seconds <= 366 * 86_400:
            raise ValueError(
                f"A window of {seconds} s was asked for; sizes from 0.001 s to a year are possible."
            )
        return cls(round(seconds * MICROSECONDS))


class Watermarks:
    """How far each source's event time has come.

    A window is closed once the watermark of its source has reached its end. An event for a closed
    window is late; the built-in pipelines still count it, as a revision. Late is decided event by
    event in the order of the log, so the outcome does not depend on how events were batched.
    Not thread-safe: the applier owns it.
    """

    def __init__(self, load: Callable[[str, str], int | None]) -> None:
        self._load = load
        self._latest: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._changed: dict[tuple[str, str], int] = {}

    def latest(self, pipeline: str, source: str) -> int:
        """The greatest event time seen from this source."""
        key = (pipeline, source)
        known = self._latest.get(key)
        if known is None:
            stored = self._changed.get(key)
            if stored is None:
                stored = self._load(pipeline, source)
            known = self._latest[key] = BEGINNING if stored is None else stored
            if len(self._latest) > REMEMBERED_SOURCES:
                self._latest.popitem(last=False)
        return known

    def advance(self, pipeline: str, source: str, moment: int) -> None:
        """Note an event time; the watermark never goes back."""
        if moment > self.latest(pipeline, source):
            self._latest[pipeline, source] = moment
            self._changed[pipeline, source] = moment

    def is_late(self, pipeline: str, source: str, moment: int, size: int) -> bool:
        """Whether the window of this event is closed already; notes the event's time."""
        latest = self.latest(pipeline, source)
        if moment > latest:
            self._latest[pipeline, source] = moment
            self._changed[pipeline, source] = moment
            return False
        return moment // size < latest // size

    def forget(self) -> None:
        """Return to what is stored: what was folded since could not be kept."""
        self._latest.clear()
        self._changed.clear()

    def take_changes(self) -> dict[tuple[str, str], int]:
        """The watermarks that moved since the last call, to be stored with the aggregates."""
        changes, self._changed = self._changed, {}
        return changes
