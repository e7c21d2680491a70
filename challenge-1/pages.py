"""Questions and pages over HTTP: what may be asked about aggregates, cursors, exports."""

import base64
import binascii
import csv
import datetime as dt
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec
from fastapi import Query, Request, Response

import web
from aggregation import Moment, micros
from projection import Projection
from results import item_of
from storage import AggregateQuery, Store
from windows import BEGINNING, FOREVER

PAGE: Final = 1_000  # rows of an export that are held at once
TRIES: Final = 3  # before it is said that the aggregates change too often
Shown = Callable[[], Mapping[int, Projection]]  # what is read now, by build


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

    def check(self, after: list[Any] | None) -> None:
        """Raise a 422 for a cursor of another pipeline's pages."""
        if after is not None and self.pipeline not in (None, after[1]):
            raise web.Problem(422, "The cursor belongs to another question; begin without one.")

    def query(self, projections: Mapping[str, Projection], **more: Any) -> AggregateQuery:
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
    text: str, name: str | None, projections: Mapping[str, Projection]
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
        moment = msgspec.convert(text if value != value else value, Moment)
    except (msgspec.ValidationError, ValueError):
        raise web.Problem(
            422,
            f"`{name}` is no time: give RFC 3339 with an offset, such as 2026-01-15T10:00:00Z, or "
            "epoch seconds.",
        ) from None
    try:
        return micros(moment)
    except ValueError as error:
        if isinstance(moment, dt.datetime):  # before or after everything that is kept
            return BEGINNING if moment.year < 1970 else FOREVER - 1
        raise web.Problem(422, f"`{name}` is no time: {error}") from None


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


# --- reading ------------------------------------------------------------------------------


class Outdated(ConnectionError):
    """An answer that has begun cannot be gone on with: the connection is cut, and that is all."""


class Reading:
    """Aggregates of the builds that were shown when it began, and of no others.

    A replay that ends and a pipeline that is put anew change the builds: what has begun is then
    given up as Outdated, since it would go on with rows of others. Blocking.
    """

    def __init__(self, store: Store, shown: Shown, question: Question) -> None:
        self._store = store
        self._shown = shown
        self._question = question
        self._has_begun = False
        self._take(shown())

    def _take(self, builds: Mapping[int, Projection]) -> None:
        self._builds = builds
        self.projections = {each.name: each for each in builds.values()}

    def page(self, after: list[Any] | None, limit: int) -> tuple[list[dict[str, Any]], list[Any]]:
        """Items, and the cursor behind them; an empty one at the end."""
        for _ in range(TRIES):
            query = self._question.query(self.projections, after=after, limit=limit)
            rows = self._store.aggregates(query)
            builds = self._shown()
            if self._asked(builds) == self._asked(self._builds):
                self._has_begun = True
                items = [item_of(self.projections[row.pipeline], row) for row in rows]
                return items, rows[-1].cursor if len(rows) == limit else []
            if self._has_begun:
                raise Outdated
            self._take(builds)
        raise web.Problem(
            503, "The aggregates were built anew meanwhile; ask again.",
            headers={"Retry-After": "1"},
        )  # fmt: skip

    def _asked(self, builds: Mapping[int, Projection]) -> set[int]:
        name = self._question.pipeline
        return {build for build, each in builds.items() if name is None or each.name == name}

    def pages(self) -> Iterator[list[dict[str, Any]]]:
        """All items, a page at a time."""
        items, after = self.page(None, PAGE)
        while items:
            yield items
            if not after:
                return
            items, after = self.page(after, PAGE)


def as_ndjson(reading: Reading) -> Iterator[bytes]:
    """The aggregates, one JSON document per line, a page at a time."""
    for items in reading.pages():
        yield b"".join(msgspec.json.encode(item) + b"\n" for item in items)


def as_csv(reading: Reading, name: str | None) -> Iterator[bytes]:
    """The aggregates as CSV, a page at a time.

    For one pipeline the parts of the group and the values have columns; for all, and where the
    values differ from row to row, they are JSON in one.
    """
    projection = reading.projections.get(name or "")
    labels = [each.label for each in projection.aggregates] if projection else []
    values = labels or ["values"]
    fixed = ("pipeline", "window_start", "window_end", "revision", "final")
    aliases = ["group"]
    if projection:
        taken = {*fixed, *values}
        aliases = [f"group.{each}" if each in taken else each for each in projection.aliases]
    yield _csv([[*fixed[:3], *aliases, *values, *fixed[3:]]])
    for items in reading.pages():
        yield _csv(
            [
                item["pipeline"], item["window_start"], item["window_end"],
                *(item["group"].values() if projection else [_json(item["group"])]),
                *(item["values"].values() if labels else [_json(item["values"])]),
                item["revision"], str(item["final"]).lower(),
            ]
            for item in items
        )  # fmt: skip


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _csv(rows: Iterable[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()
