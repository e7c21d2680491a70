"""Pipelines over HTTP: put, shown, deleted, and built anew from the log."""

from typing import Annotated, Final, Literal

import structlog
from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

import web
from models import PipelineAnswer, PipelineList, RebuildState
from routes import BUILT_IN, Running, json_example, until
from specs import SPEC_EXAMPLE, PipelineName
from utils import Pipeline, PipelineSpec

log = structlog.stdlib.get_logger("pipeline")
router = APIRouter(tags=["pipelines"])

TAG: Final = {
    "name": "pipelines", "description": "Pipelines as data: put, changed, rebuilt, deleted.",
}  # fmt: skip
AnyName = Annotated[PipelineName, Path(examples=["webhook"], description="A pipeline.")]
OwnName = Annotated[PipelineName, Path(examples=["orders"], description="Not a built-in one.")]


@router.get("/pipelines", summary="The pipelines", operation_id="pipelines",
         responses=web.problems(403))  # fmt: skip
async def pipelines(pipeline: Running) -> PipelineList:
    """Built-in ones and those that were put."""
    return PipelineList(items=[_pipeline_answer(pipeline, name) for name in pipeline.projections])


def _pipeline_answer(pipeline: Pipeline, name: str) -> PipelineAnswer:
    projection = pipeline.projection(name)
    path = next((p for p, owner in BUILT_IN.items() if owner == name), f"/pipelines/{name}/events")
    return PipelineAnswer(
        name=name,
        built_in=projection.built_in,
        position=max(pipeline.put_at[name], 0),
        spec=projection.spec.public() if projection.spec else None,
        events_path=path,
        rebuild=None,
    )


@router.put(
    "/pipelines/{name}",
    summary="Put a pipeline",
    operation_id="put_pipeline",
    responses={
        200: {"model": PipelineAnswer, "description": "It is there already, and stays."},
        201: {"model": PipelineAnswer, "description": "It is new, or starts empty."},
        **web.problems(400, 403, 409, 413, 415, 422, 429, 501, 503, 507),
    },
    response_model=PipelineAnswer,
    openapi_extra=json_example(SPEC_EXAMPLE),
)
async def put_pipeline(
    name: OwnName,
    spec: PipelineSpec,
    response: Response,
    pipeline: Running,
    replace: Annotated[
        bool, Query(description="A changed pipeline takes the old one's place, and starts empty.")
    ] = False,
) -> PipelineAnswer:
    """Answered when it is durable. The same again changes nothing; another one is 409."""
    if await pipeline.put_pipeline(name, spec, replace=replace):
        response.status_code = 201
    return _pipeline_answer(pipeline, name)


@router.get("/pipelines/{name}", summary="One pipeline",
         operation_id="pipeline", responses=web.problems(403, 404, 422))  # fmt: skip
async def one_pipeline(name: AnyName, pipeline: Running) -> PipelineAnswer:
    """What it is, and how far a rebuild of it has come."""
    answer = _pipeline_answer(pipeline, name)
    answer.rebuild = await run_in_threadpool(_rebuild_state, pipeline, name)
    return answer


@router.delete("/pipelines/{name}", summary="Delete a pipeline", status_code=204,
            operation_id="delete_pipeline",
            responses=web.problems(403, 404, 409, 422, 503, 507))  # fmt: skip
async def delete_pipeline(name: OwnName, pipeline: Running) -> None:
    """It goes with its aggregates; answered when that is durable."""
    await pipeline.delete_pipeline(name)
    log.info("pipeline_deleted", pipeline=name)


@router.post(
    "/pipelines/{name}/replay",
    summary="Build the aggregates anew from the log",
    operation_id="replay_pipeline",
    status_code=202,
    responses=web.problems(403, 404, 409, 422, 503, 507),
)
async def replay_pipeline(
    name: AnyName,
    request: Request,
    pipeline: Running,
    origin: Annotated[
        int | None,
        Query(
            alias="from",
            ge=0,
            le=2**62,
            description="A position of the log; without it, where the name was put first.",
        ),
    ] = None,
    wait: Annotated[
        Literal["done"] | None, Query(description="Answer when the new aggregates are in place.")
    ] = None,
) -> RebuildState:
    """Beside the old ones, which are shown until the new ones take their place as a whole.

    `GET /pipelines/{name}/replay` tells how far it is. What the log no longer holds (see
    `QUEUE_RETAIN_DAYS`) cannot be built anew.
    """
    if origin is None:
        builds = await run_in_threadpool(pipeline.store.builds)
        origin = next((b.begins for b in builds if b.name == name and not b.shadow), 0)
    await pipeline.rebuild(name, origin)
    if wait:
        await until(request.app, pipeline.rebuilt(name))
    return await run_in_threadpool(_rebuild_state, pipeline, name)


@router.get("/pipelines/{name}/replay", summary="How far the replay is",
         operation_id="replay_state", responses=web.problems(403, 404, 422))  # fmt: skip
async def replay_state(name: AnyName, pipeline: Running) -> RebuildState:
    """`none`, `running` with its progress, or `done`."""
    return await run_in_threadpool(_rebuild_state, pipeline, name)


def _rebuild_state(pipeline: Pipeline, name: str) -> RebuildState:
    pipeline.projection(name)
    end = pipeline.queue.end
    builds = {b.shadow: b for b in pipeline.store.builds() if b.name == name}
    build = builds.get(True) or builds.get(False)
    if build is None or not (build.shadow or build.progress):
        return RebuildState(pipeline=name, state="none", end=end)
    return RebuildState(
        pipeline=name, state="running" if build.shadow else "done", origin=build.origin,
        position=build.progress, end=end, events=build.events, misfits=build.misfits,
    )  # fmt: skip
