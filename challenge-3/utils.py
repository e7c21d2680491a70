"""Contracts that are enforced when a class is written, and the registry of those that keep them.

    class Celsius(Processor[float, float], name="celsius"):
        version = "1.0.0"

        def process(self, data: float) -> float:
            return (data - 32) / 1.8

The `class` statement above examines the class against every contract in its MRO. A class that
breaks one does not come into being: `ContractViolationError` lists every place with file, line and
cure. One that keeps them is registered under (name, version) and measured.
"""

import abc
from collections.abc import Awaitable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, get_origin

from pydantic import BaseModel
from typing_extensions import TypeVar

from admission import CAPABILITIES, NO_VERSION, entry_points, registry
from chains import (
    Chain,
    ChainError,
    ChainInvalid,
    ChainTypeError,
    Finding,
    InvalidInput,
    ValidationReport,
)
from contracts import check_contract
from enforcement import Contract, ContractEnforcerMeta, combine_metaclass
from registry import (
    Plugin,
    PluginDisabledError,
    Registry,
    RegistryError,
    State,
    UnknownPluginError,
    WrongKindError,
)
from versions import Version
from violations import ContractRuntimeError, ContractViolationError, Violation

__all__ = [
    "CAPABILITIES",
    "APIContractBase",
    "APIContractMeta",
    "Chain",
    "ChainError",
    "ChainInvalid",
    "ChainTypeError",
    "Contract",
    "ContractEnforcerMeta",
    "ContractRuntimeError",
    "ContractViolationError",
    "Finding",
    "InvalidInput",
    "Plugin",
    "PluginBase",
    "PluginDisabledError",
    "Processor",
    "PydanticPlugin",
    "Registry",
    "RegistryError",
    "State",
    "Transformer",
    "UnknownPluginError",
    "ValidationReport",
    "Validator",
    "Version",
    "Violation",
    "WrongKindError",
    "check_contract",
    "combine_metaclass",
    "entry_points",
    "get_all_plugins",
    "registry",
]

In = TypeVar("In", default=Any)
Out = TypeVar("Out", default=Any)


class Processor(Contract, Generic[In, Out], attributes="optional"):
    """Makes something of its input."""

    __slots__ = ()

    @abc.abstractmethod
    def process(self, data: In) -> Out:
        """Return what comes out."""
        raise NotImplementedError


class Validator(Contract, Generic[In], attributes="optional"):
    """Says whether its input is right, or a `ValidationReport` with what is wrong."""

    __slots__ = ()

    @abc.abstractmethod
    def validate(self, data: In) -> bool | ValidationReport:
        """Return the verdict."""
        raise NotImplementedError


class Transformer(Contract, Generic[In, Out], attributes="optional"):
    """Brings its input into another form."""

    __slots__ = ()

    @abc.abstractmethod
    def transform(self, data: In) -> Out:
        """Return the new form."""
        raise NotImplementedError


class PluginBase(Contract, attributes="optional", any_of=True):
    """The lenient base: one of the three methods is enough, async or not; no version is 0.0.0."""

    __slots__ = ()

    version: ClassVar[str] = NO_VERSION
    description: ClassVar[str] = ""
    author: ClassVar[str] = ""

    def process(self, data: Any) -> Any | Awaitable[Any]:
        """Return what comes out."""
        raise NotImplementedError(f"{type(self).__name__} has no process.")

    def validate(self, data: Any) -> Any | Awaitable[Any]:
        """Return a bool or a ValidationReport."""
        raise NotImplementedError(f"{type(self).__name__} has no validate.")

    def transform(self, data: Any) -> Any | Awaitable[Any]:
        """Return the new form."""
        raise NotImplementedError(f"{type(self).__name__} has no transform.")

    @classmethod
    def get_all_plugins(cls) -> list[type]:
        """The registered classes that derive from this one."""
        return get_all_plugins(cls)


class APIContractMeta(ContractEnforcerMeta):
    """The metaclass of `APIContractBase`; knows which classes keep that contract, here and afar."""

    @classmethod
    def get_registry(mcs) -> Mapping[str, type]:
        """Class name to class, in the default version, of this process."""
        found = {
            plugin.cls.__name__: plugin.cls
            for plugin in registry.snapshot()
            if isinstance(plugin.cls, mcs) and registry.is_default(plugin)
        }
        return MappingProxyType(found)

    @classmethod
    def get_redis_registry(mcs) -> dict[str, Any]:
        """Plugin name to its record, of every process that shares the store.

        The store is Redis where REDIS_URL or REDIS_HOST is set, else the embedded one. The plugins
        of this process are announced first, and stay announced while it lives.
        """
        from cluster import join  # imports this module

        return join().by_name()


class APIContractBase(Contract, metaclass=APIContractMeta, attributes="required"):
    """The strict base: version, description and author, `process` and `validate`."""

    __slots__ = ()

    @abc.abstractmethod
    def process(self, data: Any) -> Any:
        """Return what comes out."""
        raise NotImplementedError

    @abc.abstractmethod
    def validate(self, data: Any) -> bool | ValidationReport:
        """Return the verdict."""
        raise NotImplementedError


if TYPE_CHECKING:  # no type checker follows a metaclass that is computed

    class PydanticPlugin(BaseModel):
        """A plugin whose settings are a pydantic model; version and the like are ClassVars."""

        version: ClassVar[str]
        description: ClassVar[str]
        author: ClassVar[str]

        def __init_subclass__(
            cls, *, name: str | None = None, abstract: bool = False, register: bool = True,
            **config: Any,
        ) -> None: ...  # fmt: skip

        def __rshift__(self, other: Any) -> Chain: ...

else:

    class PydanticPlugin(
        PluginBase, BaseModel, metaclass=combine_metaclass(PluginBase, BaseModel), abstract=True
    ):
        """A plugin whose settings are a pydantic model; version and the like are ClassVars."""

        version: ClassVar[str] = NO_VERSION
        description: ClassVar[str] = ""
        author: ClassVar[str] = ""


def get_all_plugins(kind: type | None = None, *, include_disabled: bool = False) -> list[type]:
    """The registered classes, by name and version; only those of a kind, where one is given."""
    return [
        plugin.cls
        for plugin in registry.snapshot()
        if (include_disabled or plugin.state is State.ENABLED)
        and (kind is None or issubclass(plugin.cls, get_origin(kind) or kind))
    ]
