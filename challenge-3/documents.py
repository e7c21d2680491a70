"""Plugins in the OpenAPI document: a cached fragment for each, merged when something has changed.

Components are called `{plugin}-{version}-{method}-{side}-{model}`, so that two versions with models
of the same name stay apart and generated clients keep their names.
"""

import re
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from endpoints import Endpoint, endpoints_of
from registry import Plugin, Registry, State

_FRAGMENT = "openapi"
_PROBLEM = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}
}
_ANSWERS = {
    "400": "The body is no JSON.",
    "409": "The plugin is disabled, or in conflict with another host.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "422": "The body does not fit the input of the plugin.",
    "500": "The plugin failed, or its output breaks its own model.",
    "503": "Too many calls of the plugin are stuck.",
    "504": "The call took longer than CALL_TIMEOUT_SECONDS.",
}


def schemas_of(plugin: Plugin) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON Schemas of what its methods take and give, by method."""
    takes: dict[str, Any] = {}
    gives: dict[str, Any] = {}
    for endpoint in endpoints_of(plugin):
        takes[endpoint.method] = _schema(endpoint.takes, "validation", None)
        gives[endpoint.method] = _schema(endpoint.gives, "serialization", None)
    return takes, gives


def _schema(adapter: TypeAdapter[Any], mode: Any, template: str | None) -> dict[str, Any]:
    try:
        return adapter.json_schema(mode=mode, ref_template=template or "#/$defs/{model}")
    except Exception:  # noqa: BLE001  (no schema for it: then anything may stand there)
        return {}


class Documents:
    """The document of the app with the plugins as they are now."""

    def __init__(self, registry: Registry, base: Callable[[], dict[str, Any]]) -> None:
        self.registry = registry
        self.base = base
        self._merged: dict[str, Any] = {}
        self._made_of: tuple[int, int] = (-1, 0)

    def document(self) -> dict[str, Any]:
        """The merged document; the same object while nothing has changed."""
        revision = self.registry.revision
        base = self.base()
        if self._made_of != (revision, id(base)):
            self._merged = self._merge(base)
            self._made_of = (revision, id(base))
        return self._merged

    def _merge(self, base: dict[str, Any]) -> dict[str, Any]:
        paths = dict(base["paths"])
        components = dict(base.get("components", {}))
        schemas = dict(components.get("schemas", {}))
        secured = "apiKey" in components.get("securitySchemes", {})
        for plugin in self.registry.snapshot():
            if plugin.state not in (State.ENABLED, State.DISABLED):
                continue
            found, described = fragment_of(plugin)
            schemas.update(described)
            roots = [f"/plugins/{plugin.name}/{plugin.version}"]
            if self.registry.is_default(plugin):
                roots.insert(0, f"/plugins/{plugin.name}")
            for root in roots:
                for method, operation in found.items():
                    versioned = root.endswith(f"/{plugin.version}")
                    paths[f"{root}/{method}"] = {
                        "post": {
                            **operation,
                            "operationId": _operation_id(plugin, method, versioned=versioned),
                            **({"security": [{"apiKey": []}]} if secured else {}),
                        }
                    }
        return {**base, "paths": paths, "components": {**components, "schemas": schemas}}


def _operation_id(plugin: Plugin, method: str, *, versioned: bool) -> str:
    parts = [plugin.name, plugin.version.text, method] if versioned else [plugin.name, method]
    return re.sub(r"\W+", "_", "_".join(parts))


def fragment_of(plugin: Plugin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Operations by method, and the components they refer to; made once."""
    kept = plugin.extras.get(_FRAGMENT)
    if kept is None:
        operations: dict[str, Any] = {}
        schemas: dict[str, Any] = {}
        for endpoint in endpoints_of(plugin):
            operations[endpoint.method] = _operation(plugin, endpoint, schemas)
        kept = plugin.extras.setdefault(_FRAGMENT, (operations, schemas))
    operations, schemas = kept
    return operations, schemas


def _operation(plugin: Plugin, endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    takes = _hoisted(plugin, endpoint, "input", endpoint.takes, schemas)
    gives = _hoisted(plugin, endpoint, "output", endpoint.gives, schemas)
    content: dict[str, Any] = {"schema": takes}
    if (example := example_of(plugin, takes, schemas)) is not None:
        content["example"] = example
    answers = {code: {"description": text, "content": _PROBLEM} for code, text in _ANSWERS.items()}
    return {
        "tags": ["plugins"],
        "summary": f"{plugin.name}: {endpoint.method}",
        "description": plugin.description,
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {
            "200": {
                "description": "Its output.",
                "content": {"application/json": {"schema": gives}},
            },
            **answers,
        },
    }


def _hoisted(
    plugin: Plugin,
    endpoint: Endpoint,
    side: str,
    adapter: TypeAdapter[Any],
    schemas: dict[str, Any],
) -> dict[str, Any]:
    """The schema with its models moved to the components of the document."""
    stem = f"{plugin.name}-{plugin.version}-{endpoint.method}-{side}".replace("+", "_")
    template = f"#/components/schemas/{stem}-{{model}}"
    mode = "validation" if side == "input" else "serialization"
    schema = dict(_schema(adapter, mode, template))
    for model, definition in schema.pop("$defs", {}).items():
        schemas[f"{stem}-{model}"] = definition
    if schema.get("type") == "object" and "title" in schema:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", str(schema["title"]))
        schemas[f"{stem}-{name}"] = schema
        return {"$ref": f"#/components/schemas/{stem}-{name}"}
    return schema


def example_of(plugin: Plugin, takes: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """What the class gives as `example`, or else the first example of its input model."""
    for base in plugin.cls.__mro__:
        if "example" in vars(base) and not callable(vars(base)["example"]):
            return vars(base)["example"]
    if "$ref" in takes:
        takes = schemas.get(takes["$ref"].rpartition("/")[2], {})
    examples = takes.get("examples")
    return examples[0] if isinstance(examples, list) and examples else None
