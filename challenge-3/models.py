"""What the operations about plugins answer; calls of plugins have the models of the plugins."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class PluginInfo(BaseModel):
    """One version of a plugin."""

    name: str
    version: str
    default: bool = Field(description="Whether it answers where no version is named.")
    state: str = Field(description="enabled, disabled or conflict.")
    reason: str = ""
    contracts: list[str]
    methods: list[str] = Field(description="Those of process, validate, transform that it has.")
    description: str
    author: str
    source: str = Field(description="A file of the plugins directory, or where else it came from.")
    signature_hash: str
    code_hash: str


class PluginDetail(PluginInfo):
    """One version, the other versions, and the shape of what goes in and comes out."""

    versions: list[str]
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class FailedPlugin(BaseModel):
    """Something that was not loaded or is not served."""

    name: str | None = None
    file: str | None = None
    phase: str = Field(
        description="read, compile, import, contract, register, entry point or conflict."
    )
    line: int | None = None
    error: str
    at: str = ""


class ContractMember(BaseModel):
    """What a contract demands."""

    name: str
    kind: str
    signature: str


class ContractInfo(BaseModel):
    """A contract, and who keeps it."""

    name: str
    description: str
    members: list[ContractMember]
    any_of: bool = Field(description="Whether one of the members is enough.")
    attributes: Literal["required", "optional", "none"] = Field(
        description="Whether version, description and author are demanded."
    )
    plugins: list[str]


class MethodFigures(BaseModel):
    """What a method did since the start; times in seconds, exact within 12.5 %."""

    calls: int = Field(description="Errors and cancellations included.")
    errors: int
    cancellations: int
    total_seconds: float
    p50: float | None = Field(description="null while there was no call.")
    p95: float | None
    p99: float | None


class PluginFigures(BaseModel):
    """The figures of one version."""

    name: str
    version: str
    methods: dict[str, MethodFigures]


class ClusterRecord(BaseModel):
    """One plugin on one host."""

    name: str
    version: str
    contract: str
    signature_hash: str
    code_hash: str
    host: str
    node: str
    capabilities: list[str]
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    description: str
    author: str
    heartbeat: float = Field(description="Seconds since the epoch, by the clock of the store.")
    divergent: bool = Field(description="Another host runs other code under this version.")


class ChainRequest(BaseModel):
    """Plugins to run one after the other; `name@version` pins a version."""

    model_config = ConfigDict(extra="forbid")

    steps: list[str] = Field(min_length=1, max_length=32)
    data: Any


class ChainVerdict(BaseModel):
    """A validator of the chain said no."""

    valid: Literal[False]
    errors: list[dict[str, str]]
    step: int = Field(description="Counted from 1.")
    plugin: str


class LoadAnswer(BaseModel):
    """What a scan of the directory did, by file name."""

    loaded: list[str]
    unchanged: list[str]
    removed: list[str]
    failed: list[FailedPlugin]
