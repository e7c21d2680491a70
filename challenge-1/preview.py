"""One body aggregated and forgotten: the same parser and the same loop, and no log."""

from collections.abc import Iterable
from typing import Any, Final

from starlette.requests import Request

from aggregation import State
from intake import REPORTED_ERRORS, reported
from models import PreviewAnswer, PreviewItem, RecordError
from parsing import Block, BodyError, Decoder, Reader, decoder_of, form_of
from projection import Projection, compile_spec
from utils import parse_spec
from windows import Windows

MAX_GROUPS: Final = 10_000


def _projection(group_by: str | None, sum_: str | None) -> Projection:
    """The pipeline that such a question is; raises ValueError for a path that is none."""
    select = {"nothing": "nothing"}
    aggregates: list[dict[str, str]] = [{"op": "count"}]
    if group_by is not None:
        select["group"] = group_by
    if sum_ is not None:
        select["sum"] = sum_
        aggregates.append({"op": "sum", "field": "sum"})
    return compile_spec(
        "preview",
        parse_spec(
            {
                "select": select,
                "group_by": ["group"] if group_by is not None else [],
                "aggregates": aggregates,
                "window": {"kind": "none"},
            }
        ),
    )


class _Preview:
    """The groups so far."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self.windows = Windows(projection.window, lambda _: None, max_keys=MAX_GROUPS)
        self.groups: dict[Any, tuple[int, State]] = {}
        self.events = self.rejected = 0
        self.errors: list[dict[str, Any]] = []

    def take(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.events += len(block.events)
            self.rejected += len(block.rejected)
            self.errors += reported(block.rejected)[: REPORTED_ERRORS - len(self.errors)]
            for delta in self.projection.fold(block.events, self.windows).deltas:
                count, state = self.groups.get(delta.group, (0, State()))
                state.add(delta)
                self.groups[delta.group] = (count + delta.count, state)


async def preview(
    request: Request,
    group_by: str | None,
    sum_: str | None,
    *,
    count: bool,
    records: str,
    max_event_bytes: int,
) -> PreviewAnswer:
    """Read the body of a request and add it up; raises BodyError, and ValueError for bad paths."""
    found = _Preview(_projection(group_by, sum_))
    form = form_of(request.headers.get("content-type", ""))
    inflate = decoder_of(request.headers.get("content-encoding", ""))
    inflater = inflate() if inflate else None
    reader = Reader(Decoder(found.projection), form, max_event_bytes=max_event_bytes,
                    records=records)  # fmt: skip
    async for data in request.stream():
        for piece in inflater.feed(data) if inflater else (data,):
            found.take(reader.feed(piece))
    for piece in inflater.finish() if inflater else ():
        found.take(reader.feed(piece))
    found.take(reader.finish())
    if not found.events and found.rejected:
        malformed = reader.is_single and found.errors[0]["code"] in (
            "malformed",
            "encoding",
            "depth",
        )
        status = 400 if malformed else 422
        raise BodyError(status, f"None of the records fits. {found.errors[0]['message']}")
    items = []
    for group, (number, state) in found.groups.items():
        values = found.projection.values(number, state)
        item = PreviewItem(group=group[0] if group else None)
        item.count = number if count else None
        item.sum = values.get("sum_sum") if sum_ is not None else None
        items.append(item)
    items.sort(key=lambda item: (str(type(item.group)), str(item.group)))
    return PreviewAnswer(
        items=items, events=found.events, rejected=found.rejected,
        errors=[RecordError.model_validate(each) for each in found.errors],
    )  # fmt: skip
