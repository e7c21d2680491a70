"""The pipelines there are: how their events are read, and what became of those that came.

Belongs to the event loop. A pipeline that is put anew is another one: what was read for the old one
cannot be committed behind it, and what comes while it is on its way to the disk waits for it.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from batches import Batch, Upload
from parsing import Decoder
from projection import Projection, compile_spec
from specs import PipelineSpec
from spool import Appended
from storage import Build, Totals


class PipelineUnknown(LookupError):
    """There is no pipeline of this name."""


class PipelineConflict(Exception):
    """The pipeline is not what the request takes it for."""


class Catalogue:
    """Pipelines by name: the built-in ones, and those that were put."""

    def __init__(
        self, built_in: dict[str, Projection], parser: str, horizon: Callable[[], int]
    ) -> None:
        self.built_in = built_in
        self.projections: dict[str, Projection] = {}
        self.decoders: dict[str, Decoder] = {}
        self.put_at: dict[str, int] = {}  # where the log says that the pipeline is there
        self.totals: dict[str, Totals] = {}
        self._changes: dict[str, Appended] = {}  # on their way to the disk
        self._parser = parser
        self._horizon = horizon

    def compile(self, name: str, spec: str | None) -> Projection:
        """What a name and its stored spec stand for."""
        if name in self.built_in:
            return self.built_in[name]
        return compile_spec(name, PipelineSpec.model_validate_json(spec or "{}"))

    def adopt(self, projection: Projection, position: int) -> None:
        """From here on this is the pipeline of its name; it begins empty."""
        name = projection.name
        self.projections[name] = projection
        self.decoders[name] = Decoder(projection, self._parser, self._horizon)
        self.put_at[name] = position
        self.totals[name] = Totals()

    def abandon(self, name: str) -> None:
        """There is no pipeline of this name any more."""
        for part in (self.projections, self.decoders, self.put_at, self.totals):
            part.pop(name, None)

    def change(self, name: str, projection: Projection | None, promise: Appended) -> None:
        """Adopt (None: abandon) once the promise is kept, even if nobody waits for it then."""
        self._changes[name] = promise
        promise.add_done_callback(partial(self._settle, name, projection))

    def _settle(self, name: str, projection: Projection | None, promise: Appended) -> None:
        del self._changes[name]
        if promise.exception() is not None:
            return
        if projection is None:
            self.abandon(name)
        else:
            self.adopt(projection, promise.result()[1])

    async def current(self, name: str) -> Projection:
        """The pipeline of this name, once a change under way is durable; raises PipelineUnknown."""
        while (change := self._changes.get(name)) is not None:
            await asyncio.wait([change])
        return self.projection(name)

    def shown(self, builds: Iterable[Build]) -> dict[int, Projection]:
        """What active builds were made by: until the applier comes to it, that is the old one."""
        found: dict[int, Projection] = {}
        for build in builds:
            if not build.shadow:
                known = self.projections.get(build.name)
                if known is None or not (known.built_in or known.text == build.spec):
                    known = self.compile(build.name, build.spec)
                found[build.id] = known
        return found

    def projection(self, name: str) -> Projection:
        """The pipeline of this name; raises PipelineUnknown."""
        try:
            return self.projections[name]
        except KeyError:
            raise PipelineUnknown(
                "There is no pipeline of this name; GET /pipelines lists those there are."
            ) from None

    def decoder(self, projection: Projection) -> Decoder:
        """What reads events for this pipeline; raises PipelineConflict."""
        self.check_current(projection)
        return self.decoders[projection.name]

    def check_current(self, projection: Projection) -> None:
        """Raise PipelineConflict when the pipeline was put anew or deleted in the meantime."""
        name = projection.name
        if name in self._changes or self.projections.get(name) is not projection:
            raise PipelineConflict(
                "The pipeline was changed or deleted while this came in; nothing of it was kept."
            )

    def count(self, message: Batch | Upload) -> None:
        """Count what the log has taken."""
        totals = self.totals.get(message.pipeline)
        if totals is None:
            return
        replayed: Iterable[str] = ()
        if isinstance(message, Batch):
            rejected, replayed = len(message.rejected), message.replayed.values()
        else:
            rejected = message.rejected
        totals.add(
            Totals(message.accepted, rejected, sum(message.duplicates.values()),
                   filtered=message.filtered)
        )  # fmt: skip
        for code in replayed:
            if code == "late":  # what it was counted as before it came to life
                totals.accepted -= 1
            else:
                totals.rejected -= 1
