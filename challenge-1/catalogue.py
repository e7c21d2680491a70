"""The pipelines there are: how their events are read, and what became of those that came.

Belongs to the event loop. That a pipeline is put or deleted is a message of the log, and counts
from its place there. A pipeline that is put anew is another one: what was read for the old one
cannot be committed for the new, and what comes while that is on its way to the disk waits for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from batches import DROP, PUT, Batch, Drop, Put, Upload
from parsing import Decoder
from projection import Projection, compile_spec
from specs import MAX_PIPELINES, PipelineSpec
from storage import Build, Totals


class PipelineUnknown(LookupError):
    """There is no pipeline of this name."""


class PipelineConflict(Exception):
    """The pipeline is not what the request takes it for."""


class Catalogue:
    """Pipelines by name: the built-in ones, and those that were put.

    `log` makes a message durable and returns its end.
    """

    def __init__(
        self,
        built_in: dict[str, Projection],
        parser: str,
        horizon: Callable[[], int],
        log: Callable[[int, Put | Drop], Awaitable[int]],
    ) -> None:
        self.built_in = built_in
        self.projections: dict[str, Projection] = {}
        self.decoders: dict[str, Decoder] = {}
        self.put_at: dict[str, int] = {}  # where the log says that the pipeline is there
        self.totals: dict[str, Totals] = {}
        self._parser = parser
        self._horizon = horizon
        self._log = log
        self._changing = asyncio.Lock()
        self._changes: dict[str, asyncio.Event] = {}  # on their way to the disk

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

    async def put(self, name: str, spec: PipelineSpec, *, replace: bool) -> int | None:
        """Make a pipeline, durably; return where the log says so, None when it is there already.

        Raises PipelineConflict for another one of the name unless it may be replaced. It goes on
        when its caller is cancelled: what is in the log has happened.
        """
        return await asyncio.shield(asyncio.create_task(self._put(name, spec, replace=replace)))

    async def _put(self, name: str, spec: PipelineSpec, *, replace: bool) -> int | None:
        async with self._changing:
            if name in self.built_in:
                raise PipelineConflict(f"`{name}` is built in and cannot be changed.")
            known = self.projections.get(name)
            if known is not None and known.spec is not None:
                if known.spec.canonical() == spec.canonical():
                    return None
                if not replace:
                    raise PipelineConflict(
                        "There is another pipeline of this name. Delete it, choose another name, "
                        "or put it with ?replace=true: then its aggregates start empty."
                    )
            elif len(self.projections) - len(self.built_in) >= MAX_PIPELINES:
                raise PipelineConflict(
                    f"There are {MAX_PIPELINES} pipelines, which is the bound: delete one first."
                )
            projection = compile_spec(name, spec)
            return await self._change(name, PUT, Put(name, spec.canonical()), projection)

    async def delete(self, name: str) -> int:
        """Delete a pipeline, durably; return where the log says so."""
        return await asyncio.shield(asyncio.create_task(self._delete(name)))

    async def _delete(self, name: str) -> int:
        async with self._changing:
            if name in self.built_in:
                raise PipelineConflict(f"`{name}` is built in and cannot be deleted.")
            self.projection(name)
            return await self._change(name, DROP, Drop(name), None)

    async def _change(
        self, name: str, kind: int, message: Put | Drop, projection: Projection | None
    ) -> int:
        """Log the change; from now on nothing is committed for the old pipeline."""
        change = self._changes[name] = asyncio.Event()
        try:
            end = await self._log(kind, message)
            if projection is None:
                self.abandon(name)
            else:
                self.adopt(projection, end)
            return end
        finally:
            del self._changes[name]
            change.set()

    async def current(self, name: str) -> Projection:
        """The pipeline of this name, once a change under way is durable; raises PipelineUnknown."""
        while (change := self._changes.get(name)) is not None:
            await change.wait()
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
        """What reads its events; raises PipelineConflict when it is not current any more."""
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
        totals.accepted += message.accepted
        totals.filtered += message.filtered
        totals.duplicates += sum(message.duplicates.values())
        if isinstance(message, Upload):
            totals.rejected += message.rejected
            return
        totals.rejected += len(message.rejected)
        for code in message.replayed.values():
            if code == "late":  # what it was counted as before it came to life
                totals.accepted -= 1
            else:
                totals.rejected -= 1
