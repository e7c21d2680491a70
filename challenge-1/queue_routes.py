"""The message queue over HTTP: topics are read, waited for, and committed by named consumers."""

import time
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request
from starlette.concurrency import run_in_threadpool

import web
from growth import Growth
from models import Committed, ConsumerState, Offset, QueueAnswer, QueueItem, QueuePage, TopicAnswer
from routes import Running, json_example, until
from topics import TOPICS

router = APIRouter(prefix="/queue", tags=["queue"])

MAX_WAIT_SECONDS: Final = 30.0
TAG: Final = {"name": "queue", "description": "Topics with named consumers."}
TopicName = Annotated[
    str, Path(max_length=64, examples=["aggregates"], description=f"One of {', '.join(TOPICS)}.")
]


@router.get("", summary="The topics", operation_id="queue",
         responses=web.problems(403, 503))  # fmt: skip
async def queue(pipeline: Running) -> QueueAnswer:
    """`ingest`: accepted records; `aggregates`: windows closed and revised; `dead-letters`.

    A large upload is one item of `ingest`, which names its file and how many records it holds.
    """

    def look() -> list[TopicAnswer]:
        answers = []
        for topic in TOPICS:
            state = pipeline.topics.state(topic)
            consumers = [
                ConsumerState(consumer=name, offset=offset, behind=max(0, state.next - offset))
                for name, offset in pipeline.topics.consumers(topic).items()
            ]
            answers.append(TopicAnswer(topic=topic, first=state.first, next=state.next,
                                       bytes=state.bytes, consumers=consumers))  # fmt: skip
        return answers

    return QueueAnswer(topics=await run_in_threadpool(look))


@router.get("/{topic}", summary="Read a topic", operation_id="read_topic",
         responses=web.problems(403, 404, 422, 503))  # fmt: skip
async def read_topic(
    topic: TopicName,
    request: Request,
    pipeline: Running,
    consumer: Annotated[
        str | None, Query(max_length=64, description="From where this consumer stands.")
    ] = None,
    offset: Annotated[
        int | None, Query(ge=0, le=2**62, description="From here instead; 0 is the oldest.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_SECONDS, description="For the first message, in seconds.")
    ] = 0,
) -> QueuePage:
    """Nothing moves before the offset is committed: after a crash the same messages come again."""
    deadline = time.monotonic() + wait
    growth: Growth = request.app.state.growth
    while True:
        end = await growth.end(topic) if wait else 0
        page = await run_in_threadpool(
            pipeline.topics.read, topic, offset, consumer=consumer, limit=limit
        )
        left = deadline - time.monotonic()
        if page.items or left <= 0 or request.app.state.stopping.is_set():
            break
        await until(request.app, growth.beyond(topic, end), left)
    items = [QueueItem(offset=item.offset, value=item.decoded()) for item in page.items]
    return QueuePage(items=items, next=page.next)


@router.post("/{topic}/consumers/{consumer}", summary="Commit an offset",
          operation_id="commit_offset", openapi_extra=json_example({"offset": 0}),
          responses=web.problems(400, 403, 404, 415, 422, 503))  # fmt: skip
async def commit_offset(
    topic: TopicName,
    consumer: Annotated[str, Path(max_length=256, examples=["billing"])],
    body: Offset,
    pipeline: Running,
) -> Committed:
    """What was read before it does not come again to this consumer. Going back is possible."""
    await run_in_threadpool(pipeline.topics.commit, topic, consumer, body.offset)
    return Committed(topic=topic, consumer=consumer, offset=body.offset)
