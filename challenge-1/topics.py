"""Topics of the message queue and their named consumers, with or without the server.

    python topics.py list
    python topics.py read aggregates --consumer billing --limit 10 --commit
    python topics.py follow dead-letters

Three topics: `ingest` (accepted records, as they stand in the log; a large upload is one item that
names its file), `aggregates` (windows as they close, and again when they are corrected),
`dead-letters` (what was refused or too late). A consumer is a name with an offset in a file of its
own below QUEUE_DIR. Reading moves nothing; an offset moves when it is committed, so a consumer that
is killed in between sees its messages again.
"""

import argparse
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from aggregation import text_of
from batches import BATCH, UPLOAD, decode_batch, decode_upload
from frames import MAX_FRAME_BYTES, Message
from spool import (
    SAFE_FLAGS,
    QueueError,
    find_segments,
    make_directory,
    read_log,
    sync_directory,
)
from sqlite_reader import SQLiteReader
from storage import StoreError, TopicState

TOPICS: Final = ("ingest", "aggregates", "dead-letters")
CONSUMER: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_CONSUMERS: Final = 1_000  # of one topic
PAGE_BYTES: Final = 4 * 1024 * 1024  # a page ends there, or at its limit
LOOK_BACK_BYTES: Final = (0, 4 * 1024, 1024 * 1024, MAX_FRAME_BYTES + 1024)


class TopicError(ValueError):
    """A topic, a consumer or an offset that there is not; `unknown` when it is the topic."""

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


@dataclass(frozen=True)
class Item:
    """One message: its offset, its value as JSON, and the offset of what follows it."""

    offset: int
    value: bytes
    next: int

    def decoded(self) -> Any:
        """The value as Python objects."""
        return msgspec.json.decode(self.value)


@dataclass(frozen=True)
class Page:
    """Some messages, and the offset to commit once they are dealt with."""

    items: list[Item]
    next: int


class TopicStore(Protocol):
    """What topics need of a store."""

    def messages(self, topic: str, offset: int, limit: int) -> list[tuple[int, bytes]]:
        """Messages from an offset on."""
        ...

    def topic(self, topic: str) -> TopicState:
        """What the topic holds."""
        ...


class Topics:
    """Read topics and keep the offsets of their consumers; blocking, safe from any thread.

    `Topics.open(DB_PATH, QUEUE_DIR)` works beside a running server and without one:

        with Topics.open("webhook_results.db", "message_queue") as topics:
            page = topics.read("aggregates", consumer="billing", limit=100)
            for item in page.items:
                send(item.decoded(), key=f"aggregates-{item.offset}")
            topics.commit("aggregates", "billing", page.next)
    """

    def __init__(
        self, store: TopicStore, queue_dir: Path, end: Callable[[], int] | None = None
    ) -> None:
        self._store = store
        self._log = queue_dir / "ingest"
        self._consumers = queue_dir / "consumers"
        self._durable_end = end

    @classmethod
    def open(cls, db_path: str | Path, queue_dir: str | Path) -> "Topics":
        """Open what another process may be writing; raise StoreError when there is nothing."""
        return cls(SQLiteReader(Path(db_path)), Path(queue_dir))

    def __enter__(self) -> "Topics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what `open` opened; idempotent."""
        if isinstance(self._store, SQLiteReader):
            self._store.close()

    # --- reading ---

    def read(
        self,
        topic: str,
        offset: int | None = None,
        *,
        consumer: str | None = None,
        limit: int = 100,
    ) -> Page:
        """The next messages: from an offset, or from where a consumer stands (0: the oldest)."""
        _known(topic)
        if offset is None:
            offset = 0 if consumer is None else self.position(topic, consumer)
        items: list[Item] = []
        size = 0
        for item in self._read(topic, max(offset, 0), limit):
            items.append(item)
            size += len(item.value)
            if len(items) >= limit or size >= PAGE_BYTES:
                break
        return Page(items, items[-1].next if items else offset)

    def _read(self, topic: str, offset: int, limit: int) -> Iterator[Item]:
        if topic != "ingest":
            for number, value in self._store.messages(topic, offset, limit):
                yield Item(number, value, number + 1)
            return
        end = self._durable_end() if self._durable_end else None
        for message in read_log(self._log, self.message_at(offset)):
            if end is not None and message.end > end:
                return
            for item in _records(message):
                if item.offset >= offset:
                    yield item

    def message_at(self, offset: int) -> int:
        """Where the message of the log begins that holds this offset."""
        bases = find_segments(self._log) if self._log.is_dir() else []
        base = max((base for base in bases if base <= offset), default=0)
        for back in LOOK_BACK_BYTES:  # not from the beginning of its segment, if it can be helped
            start = max(base, offset - back)
            for message in read_log(self._log, start):
                if message.start > offset:
                    break
                if message.end > offset:
                    return message.start
            if start == base:
                break
        return offset

    def state(self, topic: str) -> TopicState:
        """What a topic holds now."""
        _known(topic)
        if topic != "ingest":
            return self._store.topic(topic)
        bases = find_segments(self._log) if self._log.is_dir() else []
        first = bases[0] if bases else 0
        if self._durable_end is not None:
            end = self._durable_end()
        else:
            end = (
                max((m.end for m in read_log(self._log, bases[-1])), default=first) if bases else 0
            )
        return TopicState(first, end, -1, end - first)

    # --- consumers ---

    def consumers(self, topic: str) -> dict[str, int]:
        """The consumers of a topic and where they stand."""
        _known(topic)
        found: dict[str, int] = {}
        with suppress(FileNotFoundError):
            for path in sorted((self._consumers / topic).iterdir()):
                if CONSUMER.fullmatch(path.name):
                    found[path.name] = self.position(topic, path.name)
        return found

    def position(self, topic: str, consumer: str) -> int:
        """The offset a consumer has committed; 0 for a new one."""
        path = self._path(topic, consumer)
        try:
            fd = os.open(path, os.O_RDONLY | SAFE_FLAGS)
        except FileNotFoundError:
            return 0
        with os.fdopen(fd, "rb") as file:
            text = file.read(32)
        if not text.strip().isdigit():
            raise TopicError(f"The offset of consumer {consumer} cannot be read; commit it anew.")
        return int(text)

    def commit(self, topic: str, consumer: str, offset: int) -> None:
        """Let a consumer stand at this offset: durable when it returns; back is possible too."""
        path = self._path(topic, consumer)
        state = self.state(topic)
        if not 0 <= offset <= state.next:
            raise TopicError(
                f"Offset {offset} was to be committed; the topic {topic} ends at {state.next}."
            )
        if not path.exists():
            make_directory(self._consumers)
            make_directory(path.parent)
            if len(self.consumers(topic)) >= MAX_CONSUMERS:
                raise TopicError(f"The topic {topic} has {MAX_CONSUMERS:,} consumers; no more fit.")
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}~")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE_FLAGS, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(b"%d\n" % offset)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)

    def _path(self, topic: str, consumer: str) -> Path:
        _known(topic)
        if not CONSUMER.fullmatch(consumer):
            raise TopicError(
                "The name of a consumer has 1 to 64 letters, digits, dashes and underscores."
            )
        return self._consumers / topic / consumer


def _known(topic: str) -> None:
    if topic not in TOPICS:
        raise TopicError(f"There is no such topic; there are: {', '.join(TOPICS)}.", unknown=True)


def _records(message: Message) -> Iterator[Item]:
    """The records of a message: their offsets are its position and the bytes after it.

    An upload is one item: it names the file and how many records it holds.
    """
    if message.kind == UPLOAD:
        upload = decode_upload(message.payload)
        value = {
            "pipeline": upload.pipeline, "received_at": text_of(upload.arrival),
            "upload": {"file": upload.name, "records": upload.staged, "bytes": upload.length},
        }  # fmt: skip
        yield Item(message.start, msgspec.json.encode(value), message.end)
    elif message.kind == BATCH:
        batch = decode_batch(message.payload)
        head = msgspec.json.encode(
            {"pipeline": batch.pipeline, "received_at": text_of(batch.arrival)}
        ).removesuffix(b"}")
        lines = batch.body.split(b"\n") if batch.body else []
        for number, line in enumerate(lines, message.start):
            following = number + 1 if number + 1 < message.start + len(lines) else message.end
            yield Item(number, head + b',"event":' + line + b"}", following)


# --- the command ------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """List, read or follow topics."""
    parser = argparse.ArgumentParser(
        prog="topics.py", description="List, read and follow the topics of the message queue."
    )
    parser.add_argument("--db", default=os.environ.get("DB_PATH") or "webhook_results.db",
                        help="the database (default: DB_PATH, or webhook_results.db)")  # fmt: skip
    parser.add_argument("--queue", default=os.environ.get("QUEUE_DIR") or "message_queue",
                        help="the queue (default: QUEUE_DIR, or message_queue)")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the topics, what they hold, and their consumers")
    for name, text in (("read", "print messages, one JSON document per line"),
                       ("follow", "print messages as they come, until it is stopped")):  # fmt: skip
        command = commands.add_parser(name, help=text)
        command.add_argument("topic", choices=TOPICS)
        command.add_argument("--consumer", help="go on where this consumer stands")
        command.add_argument("--offset", type=int, help="begin here instead")
        command.add_argument("--limit", type=int, default=100 if name == "read" else None)
        command.add_argument("--commit", action="store_true", help="commit what was printed")
    given = parser.parse_args(arguments)
    try:
        with Topics.open(given.db, given.queue) as topics:
            if given.command == "list":
                _list(topics)
            else:
                _print(topics, given, follow=given.command == "follow")
    except (StoreError, TopicError, QueueError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _list(topics: Topics) -> None:
    for topic in TOPICS:
        state = topics.state(topic)
        print(f"{topic:14} from {state.first:,} to {state.next:,}, {state.bytes:,} bytes")  # noqa: T201
        for consumer, offset in topics.consumers(topic).items():
            print(f"    {consumer}: {offset:,}, {max(state.next - offset, 0):,} behind")  # noqa: T201


def _print(topics: Topics, given: argparse.Namespace, *, follow: bool) -> None:
    offset, left = given.offset, given.limit
    while left is None or left > 0:
        page = topics.read(
            given.topic, offset, consumer=given.consumer, limit=min(left or 100, 1000)
        )
        for item in page.items:
            print(json.dumps({"offset": item.offset, "value": item.decoded()}), flush=True)  # noqa: T201
        if given.commit and given.consumer and page.items:
            topics.commit(given.topic, given.consumer, page.next)
        offset = page.next
        if left is not None:
            left -= len(page.items)
        if not page.items:
            if not follow:
                return
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
