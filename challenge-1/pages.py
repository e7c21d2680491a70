"""Questions and pages over HTTP: what may be asked about aggregates, cursors, exports."""

import base64
import binascii
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Final

import msgspec
from fastapi import Query, Request, Response

import web
from aggregation import Moment, micros
from projection import Projection
from results import item_of
from storage import Aggregate, AggregateQuery, Store

PAGE: Final = 1_000  # rows of an export that are held at once


class Question:
    """Which aggregates: the query parameters of reading and exporting them."""

    def __init__(
        self,
        pipeline: Annotated[
            str | None, Query(max_length=64, description="Of this pipeline, such as `webhook`.")
        ] = None,
        group: Annotated[
            list[str] | None,
            Query(description="`<alias>:<value>`, such as `category:books`; all given ones hold."),
        ] = None,
        start: Annotated[
            str | None,
            Query(alias="from", description="Windows that start then or later (RFC 3339, epoch)."),
        ] = None,
        end: Annotated[
            str | None, Query(alias="to", description="Windows that start before then.")
        ] = None,
        final: Annotated[
            bool | None, Query(description="Only those that change no more, or only the others.")
        ] = None,
    ) -> None:
        self.pipeline = pipeline
        self.group = group or []
        self.start = start
        self.end = end
        self.final = final

    def query(self, projections: dict[str, Projection], **more: Any) -> AggregateQuery:
        """The same for the store; raises a 422 that says what there is."""
        name = self.pipeline
        if name is not None and name not in projections:
            raise web.Problem(
                422, "There is no such pipeline; GET /pipelines lists those there are."
            )
        return AggregateQuery(
            pipeline=name,
            group=tuple(_alternatives(each, name, projections) for each in self.group),
            start=_moment(self.start, "from"),
            end=_moment(self.end, "to"),
            final=self.final,
            **more,
        )


def _alternatives(
    text: str, name: str | None, projections: dict[str, Projection]
) -> tuple[tuple[str, int, str], ...]:
    alias, colon, value = text.partition(":")
    asked = projections.values() if name is None else (projections[name],)
    found = tuple(
        (each.name, each.aliases.index(alias), value) for each in asked if alias in each.aliases
    )
    if not colon or not found:
        known = sorted({alias for each in asked for alias in each.aliases})
        raise web.Problem(
            422, f"A group is asked for as <alias>:<value>; the aliases are {', '.join(known)}."
        )
    return found


def _moment(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    try:
        value: Any = float(text)
    except ValueError:
        value = text
    try:
        return micros(msgspec.convert(value, Moment))
    except (msgspec.ValidationError, ValueError):
        raise web.Problem(
            422,
            f"`{name}` is no time: give RFC 3339 with an offset, such as 2026-01-15T10:00:00Z, or "
            "epoch seconds.",
        ) from None


# --- cursors ----------------------------------------------------------------------------------


def write_cursor(values: list[Any]) -> str:
    """An opaque text for where the next page begins."""
    return base64.urlsafe_b64encode(msgspec.json.encode(values)).decode().rstrip("=")


def read_cursor(text: str, types: tuple[type, ...]) -> list[Any]:
    """What `write_cursor` was given; raises a 422 for anything else."""
    try:
        values = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error, msgspec.DecodeError):
        values = None
    if (
        not isinstance(values, list)
        or tuple(map(type, values)) != types
        or any(isinstance(value, int) and abs(value) >= 2**63 for value in values)
    ):
        raise web.Problem(
            422, "The cursor was not issued here; take it from `next` of the page before."
        )
    return values


def link_next(request: Request, response: Response, following: str | None) -> None:
    """Name the next page in the Link header as well."""
    if following is not None:
        url = request.url.include_query_params(cursor=following)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'


# --- exports ----------------------------------------------------------------------------------


def _rows(store: Store, query: AggregateQuery) -> Iterator[list[Aggregate]]:
    while rows := store.aggregates(query):
        yield rows
        if len(rows) < query.limit:
            return
        query = replace(query, after=rows[-1].cursor)


def as_ndjson(
    store: Store, query: AggregateQuery, projections: dict[str, Projection]
) -> Iterator[bytes]:
    """The aggregates, one JSON document per line, a page at a time."""
    for rows in _rows(store, query):
        documents = (
            msgspec.json.encode(item_of(projections[row.pipeline], row))
            for row in rows
            if row.pipeline in projections
        )
        yield b"".join(document + b"\n" for document in documents)


def as_csv(
    store: Store, query: AggregateQuery, projections: dict[str, Projection]
) -> Iterator[bytes]:
    """The aggregates as CSV, a page at a time.

    For one pipeline the parts of the group and the values have columns; for all, and where the
    values differ from row to row, they are JSON in one.
    """
    projection = projections.get(query.pipeline or "")
    aliases = list(projection.aliases) if projection else ["group"]
    labels = (
        [each.label for each in projection.aggregates] if projection and projection.aggregates
        else ["values"]
    )  # fmt: skip
    head = ["pipeline", "window_start", "window_end", *aliases, *labels, "revision", "final"]
    yield _csv([head])
    for rows in _rows(store, query):
        yield _csv(
            [
                item["pipeline"], item["window_start"], item["window_end"],
                *(item["group"].values() if projection else [_json(item["group"])]),
                *(item["values"].values() if labels != ["values"] else [_json(item["values"])]),
                item["revision"], str(item["final"]).lower(),
            ]
            for item in (
                item_of(projections[row.pipeline], row)
                for row in rows if row.pipeline in projections
            )
        )  # fmt: skip


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _csv(rows: Iterable[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()
