"""HTTP in, HTTP out: plugins as typed operations.

Three routes serve every plugin there is or will be: the path leads to a record in the registry, a
dictionary look-up however many there are, and the record knows how to read and check its own
models. Run it with `uvicorn app:app`, or with `python app.py` on PORT.
"""

import hmac
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.convertors import StringConvertor, register_url_convertor

import cluster
import web
from contracts import SPEC, ContractSpec, contracts_of
from dispatch import CallRefused, Dispatcher, PluginStuck
from documents import Documents, schemas_of
from endpoints import InputError, errors_of, read_json
from instrumentation import Figures
from loading import EntryPoints, LoadError, PluginLoader
from logs import get_logger
from models import (
    ChainRequest,
    ChainVerdict,
    ClusterRecord,
    ContractInfo,
    ContractMember,
    FailedPlugin,
    LoadAnswer,
    MethodFigures,
    PluginDetail,
    PluginFigures,
    PluginInfo,
)
from probing import Probe
from registry import RESERVED
from settings import Settings
from stores import StoreError
from utils import (
    CAPABILITIES,
    APIContractBase,
    ChainInvalid,
    ChainTypeError,
    Plugin,
    PluginBase,
    PluginDisabledError,
    Processor,
    Registry,
    RegistryError,
    Transformer,
    UnknownPluginError,
    Validator,
    entry_points,
    registry,
)

log = get_logger("plugins")


class _NameInPath(StringConvertor):
    """Any name but those that are paths themselves, so that each path knows its own methods."""

    regex = rf"(?!(?:{'|'.join(sorted(RESERVED))})(?:/|$))[^/]+"


class _VersionInPath(StringConvertor):
    """Versions begin with a digit; what a plugin is asked to do does not."""

    regex = "[0-9][^/]*"


register_url_convertor("plugin", _NameInPath())
register_url_convertor("semver", _VersionInPath())
PLUGIN = "/plugins/{name:plugin}"
VERSION = f"{PLUGIN}/{{version:semver}}"
Name = Annotated[str, Path(max_length=64, examples=["NormaliseSensor"])]
VersionText = Annotated[str, Path(max_length=128, examples=["1.0.0"])]
VERBS = {
    "enable": "Let a plugin serve again",
    "disable": "Refuse calls of a plugin with 409",
    "reload": "Read the file of a plugin again and swap it in",
}
CHAIN_EXAMPLE = {
    "steps": ["ValidateSensor", "NormaliseSensor"],
    "data": {"sensor": "t-17", "metric": "temperature", "value": 71.6, "unit": "F",
             "at": "2026-01-15T10:00:03+01:00"},
}  # fmt: skip


class Service:
    """What the routes share: the registry, who loads into it and who calls out of it."""

    def __init__(self, settings: Settings, plugins: Registry, points: EntryPoints) -> None:
        self.settings = settings
        self.registry = plugins
        self.entry_points = points
        self.loader = PluginLoader(
            plugins, settings.plugins_dir, Probe(settings.load_timeout_seconds)
        )
        self.dispatcher = Dispatcher(plugins, settings.call_timeout_seconds)
        self.cluster: cluster.Cluster | None = None

    async def found(self, name: str, version: str | None = None) -> Plugin:
        """Like `find`; for a name that is not there yet, distributions are imported in a thread."""
        if name in self.registry:
            return self.find(name, version)
        return await run_in_threadpool(self.find, name, version)

    def find(self, name: str, version: str | None = None) -> Plugin:
        """The record, whatever its state; 404 names near ones."""
        try:
            return self.registry.find(name, version)
        except UnknownPluginError as error:
            raise web.Problem(404, str(error)) from None

    async def serving(self, name: str, version: str | None = None) -> Plugin:
        """The record of a plugin that serves; else 404 or 409."""
        await self.found(name, version)
        try:
            return self.registry.plugin(name, version)
        except PluginDisabledError as error:
            raise web.Problem(409, str(error)) from None

    def collect(self) -> Iterable[Metric]:
        """The figures of all plugins for Prometheus."""
        labels = ["plugin", "version", "method"]
        calls = CounterMetricFamily("plugin_calls", "Calls, failed ones included.", labels=labels)
        errors = CounterMetricFamily("plugin_errors", "Calls that raised.", labels=labels)
        gone = CounterMetricFamily("plugin_cancellations", "Calls cancelled.", labels=labels)
        latency = HistogramMetricFamily(
            "plugin_latency_seconds", "How long calls took.", labels=labels
        )
        for plugin in self.registry.snapshot():
            for method, meter in plugin.meters.items():
                values = [plugin.name, plugin.version.text, method]
                figures, buckets = meter.figures(), meter.cumulative()
                calls.add_metric(values, figures.calls)
                errors.add_metric(values, figures.errors)
                gone.add_metric(values, figures.cancellations)
                latency.add_metric(values, buckets, figures.total_seconds)
        return calls, errors, gone, latency


def build(settings: Settings) -> FastAPI:
    """The application for these settings."""
    service = Service(settings, registry, entry_points)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service
        await run_in_threadpool(service.loader.load)
        service.entry_points.probe = service.loader.probe
        try:
            try:
                service.cluster = await run_in_threadpool(cluster.join, settings)
            except StoreError as error:  # not an outage: that degrades, until the server is back
                raise web.StartupRefused(str(error)) from error
            yield
        finally:
            await run_in_threadpool(cluster.leave)
            service.entry_points.probe = None
            service.loader.close()

    app = web.create_app(
        title="Plugins under contract",
        description="Plugins that are checked against their contracts when their class is "
        "written, with their own models, versions side by side, and reload without a failed call.",
        lifespan=lifespan,
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        log_level=settings.log_level,
        limits=web.Limits(answer_seconds=max(120.0, settings.call_timeout_seconds + 10)),
        checks={
            "registry_store": lambda: run_in_threadpool(
                lambda: service.cluster is not None and service.cluster.works()
            ),
        },
        collect=service.collect,
        tags=[
            {"name": "plugins", "description": "Call a plugin: its input in, its output out."},
            {"name": "registry", "description": "What is there, what failed, and its figures."},
            {"name": "admin", "description": "Switch and reload; needs ADMIN_TOKEN."},
            {"name": "service", "description": "Health and metrics."},
        ],
    )
    app.state.service = service
    _add_registry_routes(app, service)
    _add_calls(app, service)
    if settings.admin_token is not None:
        _add_admin_routes(app, service, settings.admin_token.get_secret_value().encode())
    documents = Documents(registry, app.openapi)
    app.openapi = documents.document  # type: ignore[method-assign]
    return app


# --- calls ------------------------------------------------------------------------------------


def _add_calls(app: FastAPI, service: Service) -> None:
    for method in CAPABILITIES:
        handler = _caller(service, method)
        for path in (
            f"{PLUGIN}/{method}",
            f"{VERSION}/{method}",
        ):
            app.add_route(path, handler, methods=["POST"], include_in_schema=False)

    @app.post(
        "/chains/run",
        tags=["plugins"],
        summary="Run plugins one after the other",
        operation_id="run_chain",
        response_model=None,
        responses={
            200: {
                "description": "What the last one gives; or what a validator says that stopped it.",
                "content": {
                    "application/json": {
                        "schema": {"anyOf": [{}, ChainVerdict.model_json_schema()]}
                    }
                },
            },
            **web.problems(400, 403, 404, 409, 413, 415, 422, 500, 503, 504),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": ChainRequest.model_json_schema(),
                        "example": CHAIN_EXAMPLE,
                    }
                },
            }
        },
    )
    async def run_chain(request: Request) -> Response:
        """Validate, transform, process: the types of neighbours are checked before anything runs.

        The answer is the output of the last step. A validator that says no ends the chain with
        `{"valid": false, "errors": […]}` and the step that said it.
        """
        try:
            asked = ChainRequest.model_validate(read_json(await _body(request)))
        except InputError as error:
            raise web.Problem(400, str(error)) from None
        except ValidationError as error:
            raise _does_not_fit(errors_of(error)) from None
        plugins = [await service.serving(*_name_and_version(step)) for step in asked.steps]
        for plugin in plugins:
            if not plugin.capabilities:
                raise web.Problem(
                    422, f"{plugin.name} has none of process, validate and transform."
                )
        try:
            with _answering_refusals():
                answer = await service.dispatcher.run_chain(
                    plugins, asked.data, request.scope.get("request_id", "")
                )
        except ChainTypeError as error:
            raise web.Problem(
                422, str(error), errors=[{"pointer": "/steps", "message": str(error)}]
            ) from None
        except InputError as error:
            raise _does_not_fit(
                [{**each, "pointer": f"/data{each['pointer']}"} for each in error.errors]
            ) from None
        except ChainInvalid as error:
            verdict = {**error.report.to_dict(), "step": error.step, "plugin": error.name}
            return Response(
                ChainVerdict.model_validate(verdict).model_dump_json(),
                media_type="application/json",
            )
        return Response(answer, media_type="application/json")


def _caller(service: Service, method: str) -> Callable[[Request], Any]:
    async def call(request: Request) -> Response:
        path = request.path_params
        plugin = await service.serving(path["name"], path.get("version"))
        body = await _body(request)
        try:
            with _answering_refusals():
                answer = await service.dispatcher.call(
                    plugin, method, body, request.scope.get("request_id", "")
                )
        except InputError as error:
            if not error.errors:
                raise web.Problem(400, str(error)) from None
            raise _does_not_fit(error.errors) from None
        return Response(answer, media_type="application/json")

    return call


class _answering_refusals:
    """Calls that give no result become problems."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CallRefused):
            headers = {"Retry-After": "5"} if isinstance(error, PluginStuck) else {}
            raise web.Problem(error.status, error.message, headers=headers) from None


async def _body(request: Request) -> bytes:
    """The body of a request that says it is JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise web.Problem(415, "This operation takes JSON: send Content-Type: application/json.")
    return await request.body()


def _does_not_fit(errors: list[dict[str, str]]) -> web.Problem:
    places = "1 place" if len(errors) == 1 else f"{len(errors)} places"
    return web.Problem(422, f"The body does not fit the input in {places}.", errors=errors)


def _name_and_version(step: str) -> tuple[str, str | None]:
    name, at, version = step[:256].partition("@")
    return name, version if at else None


# --- what is there ----------------------------------------------------------------------------


def _add_registry_routes(app: FastAPI, service: Service) -> None:
    @app.get(
        "/plugins", tags=["registry"], summary="All plugins", operation_id="plugins",
        responses=web.problems(403),
    )  # fmt: skip
    async def plugins() -> list[PluginInfo]:
        """By name and version; those of installed distributions are imported by this."""
        await run_in_threadpool(service.entry_points.load_all)
        return await run_in_threadpool(
            lambda: [PluginInfo(**_info(service, each)) for each in service.registry.snapshot()]
        )

    @app.get(
        "/plugins/failed", tags=["registry"], summary="What could not be loaded or served",
        operation_id="failed_plugins", responses=web.problems(403),
    )  # fmt: skip
    async def failed() -> list[FailedPlugin]:
        """Files and installed plugins that failed, with phase and line, and conflicts of hosts."""
        failures = list(service.registry.failures.items())
        return [FailedPlugin(**asdict(failure)) for _, failure in sorted(failures)]

    @app.get(
        PLUGIN, tags=["registry"], summary="The default version of a plugin",
        operation_id="plugin", responses=web.problems(403, 404),
    )  # fmt: skip
    async def plugin(name: Name) -> PluginDetail:
        """With its other versions and its models."""
        return await run_in_threadpool(_detail, service, name, None)

    @app.get(
        f"{PLUGIN}/metrics", tags=["registry"], summary="Figures of the default version",
        operation_id="plugin_metrics", responses=web.problems(403, 404),
    )  # fmt: skip
    async def figures(name: Name) -> PluginFigures:
        """Calls, errors, cancellations and percentiles of each method."""
        return _figures(await service.found(name))

    @app.get(
        VERSION, tags=["registry"], summary="One version of a plugin",
        operation_id="plugin_version", responses=web.problems(403, 404),
    )  # fmt: skip
    async def plugin_version(name: Name, version: VersionText) -> PluginDetail:
        """With its other versions and its models."""
        return await run_in_threadpool(_detail, service, name, version)

    @app.get(
        f"{VERSION}/metrics", tags=["registry"], summary="Figures of one version",
        operation_id="plugin_version_metrics", responses=web.problems(403, 404),
    )  # fmt: skip
    async def version_figures(name: Name, version: VersionText) -> PluginFigures:
        """Calls, errors, cancellations and percentiles of each method."""
        return _figures(await service.found(name, version))

    @app.get(
        "/contracts", tags=["registry"], summary="The contracts, and who keeps them",
        operation_id="contracts", responses=web.problems(403),
    )  # fmt: skip
    async def contracts() -> list[ContractInfo]:
        """Those that come with the service, and those of the plugins that are loaded."""
        return await run_in_threadpool(_contracts, service)

    @app.get(
        "/cluster/plugins", tags=["registry"], summary="Plugins of all hosts",
        operation_id="cluster_plugins", responses=web.problems(403),
    )  # fmt: skip
    async def cluster_plugins(response: Response) -> list[ClusterRecord]:
        """From the shared store; while it is out, those of this host, and a header says so."""
        assert service.cluster is not None  # noqa: S101  (set before the first request)
        records, shared = await run_in_threadpool(service.cluster.records)
        response.headers["X-Registry-Store"] = "reachable" if shared else "unreachable"
        return [ClusterRecord(**dict(record)) for record in records]


def _info(service: Service, plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "version": plugin.version.text,
        "default": service.registry.is_default(plugin),
        "state": plugin.state.value,
        "reason": plugin.reason,
        "contracts": list(plugin.contracts),
        "methods": [method for method in CAPABILITIES if method in plugin.capabilities],
        "description": plugin.description,
        "author": plugin.author,
        "source": plugin.source.label,
        "signature_hash": plugin.signature_hash,
        "code_hash": plugin.code_hash,
    }


def _detail(service: Service, name: str, version: str | None) -> PluginDetail:
    plugin = service.find(name, version)
    takes, gives = schemas_of(plugin)
    return PluginDetail(
        **_info(service, plugin),
        versions=service.registry.versions(name),
        input_schema=takes,
        output_schema=gives,
    )


def _figures(plugin: Plugin) -> PluginFigures:
    def shown(figures: Figures) -> MethodFigures:
        return MethodFigures(**asdict(figures))

    methods = {method: shown(figures) for method, figures in plugin.figures().items()}
    return PluginFigures(name=plugin.name, version=plugin.version.text, methods=methods)


BUILT_IN = (Processor, Validator, Transformer, PluginBase, APIContractBase)


def _contracts(service: Service) -> list[ContractInfo]:
    specs: dict[int, ContractSpec] = {id(base): vars(base)[SPEC] for base in BUILT_IN}
    kept: dict[int, list[str]] = {}
    for plugin in service.registry.snapshot():
        for spec in contracts_of(plugin.cls):
            if spec.members:
                specs[id(spec.cls)] = spec
                kept.setdefault(id(spec.cls), []).append(f"{plugin.name} {plugin.version}")
    return [
        ContractInfo(
            name=spec.name,
            description=(spec.cls.__doc__ or "").split("\n")[0],
            members=[
                ContractMember(name=name, kind=member.kind.value, signature=member.text)
                for name, member in spec.members.items()
            ],
            any_of=spec.any_of,
            attributes=spec.attributes,
            plugins=kept.get(key, []),
        )
        for key, spec in sorted(specs.items(), key=lambda item: item[1].name)
    ]


# --- admin ------------------------------------------------------------------------------------


def _add_admin_routes(app: FastAPI, service: Service, token: bytes) -> None:
    bearer = HTTPBearer(auto_error=False, description="The value of ADMIN_TOKEN.")

    async def admitted(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> None:
        sent = given.credentials.encode("utf-8", "surrogateescape") if given else b""
        if not hmac.compare_digest(sent, token):
            raise web.Problem(
                401,
                "This operation needs Authorization: Bearer with the admin token of this service.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    guarded = [Depends(admitted)]
    declared = web.problems(401, 403, 404, 409)

    @app.post(
        "/plugins/reload", tags=["admin"], summary="Look at the plugins directory again",
        operation_id="reload_all", dependencies=guarded, responses=web.problems(401, 403),
    )  # fmt: skip
    async def reload_all() -> LoadAnswer:
        """Load what is new or changed, remove what is gone; what fails is listed, the old stays."""
        report = await run_in_threadpool(service.loader.load)
        log.info("admin", verb="reload", loaded=report.loaded, removed=report.removed)
        return LoadAnswer(
            loaded=report.loaded,
            unchanged=report.unchanged,
            removed=report.removed,
            failed=[FailedPlugin(**asdict(failure)) for failure in report.failed],
        )

    def act(verb: str, name: str, version: str | None) -> PluginInfo:
        plugin = service.find(name, version)
        change: Callable[[str, str | None], None] = getattr(service.registry, verb)
        try:
            change(name, version)
        except LoadError as error:
            failure = FailedPlugin(**asdict(error.failure)).model_dump(mode="json")
            raise web.Problem(409, str(error), failure=failure) from None
        except RegistryError as error:
            raise web.Problem(409, str(error)) from None
        log.info("admin", verb=verb, plugin=name, version=plugin.version.text)
        return PluginInfo(**_info(service, service.find(name, version)))

    def add(verb: str, summary: str) -> None:
        async def default_version(name: Name) -> PluginInfo:
            return await run_in_threadpool(act, verb, name, None)

        async def one_version(name: Name, version: VersionText) -> PluginInfo:
            return await run_in_threadpool(act, verb, name, version)

        for path, endpoint, suffix in (
            (f"{PLUGIN}/{verb}", default_version, ""),
            (f"{VERSION}/{verb}", one_version, "_version"),
        ):
            app.add_api_route(
                path, endpoint, methods=["POST"], tags=["admin"], dependencies=guarded,
                summary=summary, operation_id=f"{verb}{suffix}", responses=declared,
                description="The default version." if not suffix else "One version.",
            )  # fmt: skip

    for verb, summary in VERBS.items():
        add(verb, summary)


settings = web.read_settings(Settings)
app: FastAPI = build(settings)

if __name__ == "__main__":
    web.serve(app, port=settings.port)
