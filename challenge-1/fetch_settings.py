"""What `fetch.py` can be told: flags > environment > .env > config.yaml > defaults, key by key."""

import argparse
import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

import yaml
from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

PREFIX = "PIPELINE_"
SHIPPED_CONFIG = Path(__file__).with_name("config.yaml")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class ConfigurationError(ValueError):
    """The settings cannot be used; the message has one line per fault."""


class Fields(BaseModel):
    """Where a record of the source has the parts of a product: dotted paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str
    price: str | None = None
    currency: str | None = None
    category: str | None = None
    stock: str | None = None


class Source(BaseModel):
    """One product API: where it is, how it pages, and what its records call their parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    url: str
    fields: Fields
    paging: Literal["pages", "cursor", "single"] = "pages"
    records: str = Field(default="", description="Path of the records; empty: the document.")
    page_param: str = "page"
    pages: str | None = Field(default=None, description="Path of the number of pages.")
    cursor_param: str = "cursor"
    next: str = Field(default="next", description="Path of the next cursor.")
    ids: str = Field(default="", description="Path of the ids in the index at `url`.")
    item_url: str | None = Field(default=None, description="With `{id}`, for `single`.")
    decimal_mark: Literal[".", ",", "auto"] = "auto"
    headers: dict[str, str] = Field(default_factory=dict, repr=False)

    @field_validator("url", "item_url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
                raise ValueError("must be an absolute http or https URL without a user")
            parts.port  # noqa: B018  (raises ValueError for a wrong one)
        return url

    @model_validator(mode="after")
    def _single_has_items(self) -> Self:
        if self.paging == "single":
            if not self.item_url or "{id}" not in self.item_url:
                raise ValueError("paging `single` needs an item_url with {id} in it")
            if origin(self.item_url) != origin(self.url):
                raise ValueError("url and item_url must have the same host and port")
        return self


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


class FetchSettings(BaseSettings):
    """Every key is a flag, a PIPELINE_ variable and a key of config.yaml."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore"
    )

    timeout: float = Field(
        default=60, gt=0, le=86_400, allow_inf_nan=False, description="Seconds for the whole run."
    )
    rate_limit_rps: float = Field(
        default=5, ge=0.01, le=10_000, allow_inf_nan=False,
        description="Requests per second and source, at most.",
    )  # fmt: skip
    worker_pool_size: int = Field(
        default=4, ge=1, le=64, description="Threads that decode and normalise."
    )
    pipeline: Name | None = Field(default=None, description="Also send the products there.")
    request_timeout: float = Field(
        default=5, gt=0, le=3600, allow_inf_nan=False, description="Seconds for one whole answer."
    )
    max_body_bytes: int = Field(
        default=4 * 1024 * 1024, ge=1024, le=256 * 1024 * 1024,
        description="Of one answer, decoded.",
    )  # fmt: skip
    max_products: int = Field(default=100_000, ge=1, description="Of one source.")
    breaker_failures: int = Field(default=3, ge=1, le=1000, description="In a row, to open.")
    breaker_recovery_seconds: float = Field(
        default=2, gt=0, le=3600, allow_inf_nan=False, description="Until the first probe."
    )
    breaker_patience: int = Field(
        default=3, ge=1, le=1000, description="Failed probes in a row, to give the source up."
    )
    retry_after_max: float = Field(
        default=15, ge=0, le=3600, allow_inf_nan=False, description="What a 429 is believed."
    )
    output_dir: Path = Field(default=Path("out"), description="For summary.json.")
    sources: Annotated[list[Source], NoDecode] = Field(
        default_factory=list, description="The product APIs."
    )

    @field_validator("timeout", "rate_limit_rps", "worker_pool_size", "request_timeout",
                     "max_body_bytes", "max_products", "breaker_failures",
                     "breaker_recovery_seconds", "breaker_patience", "retry_after_max",
                     mode="before")  # fmt: skip
    @classmethod
    def _is_no_flag(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a number")  # noqa: TRY004  (pydantic wants a ValueError)
        return value

    @field_validator("sources", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError("must be a JSON array of sources") from None
        return value

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called {', '.join(twice)}")
        return sources

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, .env, file: the file is handed over under a name of its own."""
        del file_secret_settings
        given = dict(cast("InitSettingsSource", init_settings).init_kwargs)
        from_file = given.pop("config_file_", {})
        return (
            InitSettingsSource(settings_cls, given),
            env_settings,
            dotenv_settings,
            InitSettingsSource(settings_cls, from_file),
        )


KEYS = tuple(FetchSettings.model_fields)
FLAGS = {
    "timeout": ("--timeout",),
    "rate_limit_rps": ("--rate-limit", "--rate-limit-rps"),
    "worker_pool_size": ("--worker-pool-size",),
    "pipeline": ("--pipeline",),
}


@dataclass(frozen=True)
class Loaded:
    """The settings, where each came from, and what looked like a mistake."""

    settings: FetchSettings
    origins: dict[str, str]
    warnings: list[str]

    def lines(self) -> list[str]:
        """One line per key: name, value, origin."""
        shown = [(key, _shown(getattr(self.settings, key)), self.origins[key]) for key in KEYS]
        widths = [max(len(row[n]) for row in shown if row[0] != "sources") for n in (0, 1)]
        return [f"{k.ljust(widths[0])}  {v.ljust(widths[1])}  {o}" for k, v, o in shown]


def load(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Loaded:
    """The settings of this call; raise ConfigurationError naming every fault and its source.

    `flags` holds what was given on the command line, as text. Without `config`, `config.yaml` in
    the current directory is read, or else the shipped one.
    """
    path = config or next(
        (each for each in (Path("config.yaml"), SHIPPED_CONFIG) if each.exists()), None
    )
    from_file, faults = _read(path)
    try:
        dotenv = dotenv_values(".env")
    except (OSError, UnicodeDecodeError):
        faults.append(".env: it cannot be read as UTF-8.")
        raise ConfigurationError("\n".join(faults)) from None
    layers = [
        Layer({key: value for key, value in (flags or {}).items() if value is not None},
              lambda key: f"flag {FLAGS[key][0]}"),
        Layer(_variables(os.environ), lambda key: f"environment {PREFIX}{key.upper()}"),
        Layer(_variables(dotenv), lambda key: f".env {PREFIX}{key.upper()}"),
        Layer(from_file, lambda _: path.name if path else ""),
    ]  # fmt: skip
    shadowed = [fault for layer in layers for fault in layer.faults()]
    warnings = _unknown_variables({*os.environ, *dotenv})
    try:
        settings = FetchSettings(**{**layers[0].values, "config_file_": from_file})
    except ValidationError:
        faults += shadowed
    else:
        warnings += [f"{fault} It is overridden." for fault in shadowed]
    if faults:
        raise ConfigurationError("\n".join(faults + warnings))
    origins = {
        key: next((each.origin(key) for each in layers if key in each.values), "default")
        for key in KEYS
    }
    return Loaded(settings, origins, warnings)


@dataclass(frozen=True)
class Layer:
    """The values of one place, and what that place is called for a key."""

    values: Mapping[str, Any]
    origin: Callable[[str], str]

    def faults(self) -> list[str]:
        """What is wrong in it, whether something goes before it or not."""
        try:
            FetchSettings(**{**self.values, "config_file_": {}})
        except ValidationError as error:
            return [
                _fault(each, self.origin(str(each["loc"][0])))
                for each in error.errors(include_url=False)
                if each["loc"][0] in self.values
            ]
        return []


def _variables(environment: Mapping[str, str | None]) -> dict[str, str]:
    given = {name.upper(): value for name, value in environment.items() if value}
    return {key: given[name] for key in KEYS if (name := PREFIX + key.upper()) in given}


def _read(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    if path is None:
        return {}, []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        return {}, [f"config: {path} cannot be read: {reason}."]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        return {}, [f"config: {path} is no YAML{where}."]
    if found is None:
        return {}, []
    if not isinstance(found, dict):
        return {}, [f"config: {path} has to hold keys and values."]
    faults = [
        f"{key}: there is no such key ({path.name}).{_did_you_mean(str(key), KEYS)}"
        for key in found
        if key not in KEYS
    ]
    return {key: value for key, value in found.items() if key in KEYS}, faults


def _fault(error: Any, origin: str) -> str:
    where = [str(part) for part in error["loc"]]
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    # A source may hold secrets in its headers; what was given there is not repeated.
    shown = isinstance(given, str | int | float) and where[0] != "sources"
    text = f" (given: {given!r})" if shown else ""
    return f"{'.'.join(where)}: {message}{text} ({origin})"


def _unknown_variables(names: Iterable[str]) -> list[str]:
    return [
        f"{name} is no setting.{_did_you_mean(key, KEYS, PREFIX)}"
        for name in sorted(names)
        if name.upper().startswith(PREFIX)
        and (key := name.upper().removeprefix(PREFIX).lower()) not in KEYS
    ]


def _did_you_mean(key: str, known: Sequence[str], prefix: str = "") -> str:
    begun = [each for each in known if key and each.startswith(key)]
    close = begun or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {prefix}{close[0].upper() if prefix else close[0]}?"
    return f" There are {', '.join(known)}."


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{source.name}={source.url}" for source in value) or "-"
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the keys, kept as text: all wrong values are reported together, later."""
    for key, names in FLAGS.items():
        described = FetchSettings.model_fields[key].description
        parser.add_argument(*names, dest=key, metavar="X", help=described)
