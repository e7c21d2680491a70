"""What a method of a plugin takes and gives as JSON: its own models, from its annotations."""

import re
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from annotations import EMPTY, UNRESOLVED
from chains import STAGES, Finding, report_of, types_of
from registry import Plugin

LARGEST_OUTPUT_BYTES = 8 * 1024 * 1024
REPORTED_ERRORS = 20
LONGEST_MESSAGE = 300
ERROR_BYTES = 3500


class Verdict(BaseModel):
    """What a validator says."""

    class Reason(BaseModel):
        """One thing that is wrong."""

        pointer: str = Field(description="Where, as a JSON pointer; empty for the whole.")
        message: str

    valid: bool
    errors: list[Reason]


class InputError(ValueError):
    """The input is no JSON (`errors` is empty), or not what the plugin takes."""

    def __init__(self, message: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or []


class OutputError(ValueError):
    """What the plugin gave back is not what it promised; it is not passed on."""


# Numbers that may lie beyond what a float holds: 1e999 would become an infinity, and so would an
# integer of 400 digits where a model wants a float.
_MAY_OVERFLOW = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{200}")
_LARGEST = sys.float_info.max


def read_json(body: bytes) -> Any:
    """Strict JSON: no NaN, no infinities, no lone surrogates, no bottomless nesting."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise InputError("The body is not valid JSON.") from None
    if _MAY_OVERFLOW.search(body) and _overflows(value):
        raise InputError("The body holds a number that is too large.")
    return value


def _overflows(value: Any) -> bool:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (int, float)) and not -_LARGEST <= each <= _LARGEST:
            return True
        if isinstance(each, (list, dict)):
            waiting.extend(each.values() if isinstance(each, dict) else each)
    return False


@dataclass(frozen=True)
class Endpoint:
    """One method, with what reads its input and checks its output."""

    method: str
    takes: TypeAdapter[Any]
    gives: TypeAdapter[Any]
    is_async: bool
    takes_anything: bool
    gives_anything: bool

    def read(self, body: bytes) -> Any:
        """The input out of a JSON body; InputError says where it does not fit."""
        value = read_json(body)
        if self.takes_anything:
            return value
        try:
            return self.takes.validate_json(body)
        except ValidationError as error:
            raise InputError("", errors_of(error)) from None

    def write(self, result: Any) -> bytes:
        """The output as JSON, checked against the plugin's own model; OutputError if it breaks it.

        It is checked in its JSON form, strictly, so that neither a changed instance of the model
        nor a text where a number was promised gets through.
        """
        if self.method == "validate":
            try:
                result = report_of(result).to_dict()
            except TypeError as error:
                raise OutputError(str(error)) from None
        try:
            text = to_json(result, by_alias=False, round_trip=True, inf_nan_mode="constants")
            if b"NaN" in text or b"Infinity" in text:
                from_json(text, allow_inf_nan=False)
            if not self.gives_anything:
                checked = self.gives.validate_json(text, strict=True, by_alias=False, by_name=True)
                text = self.gives.dump_json(checked, by_alias=True)
        except ValidationError as error:
            places = ", ".join(each["pointer"] or "/" for each in errors_of(error)[:5])
            raise OutputError(f"It does not fit its own model at {places}.") from None
        except (PydanticSerializationError, ValueError, RecursionError, TypeError) as error:
            raise OutputError(f"It cannot be written as JSON ({type(error).__name__}).") from None
        if len(text) > LARGEST_OUTPUT_BYTES:
            raise OutputError(f"It is larger than {LARGEST_OUTPUT_BYTES:,} bytes.")
        return text


def errors_of(error: ValidationError) -> list[dict[str, str]]:
    """Pointers and sentences, without what was sent."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return _in_measure((pointer_of(entry["loc"]), entry["msg"]) for entry in found)


def refused(errors: Iterable[Finding]) -> list[dict[str, str]]:
    """What a plugin says of input that it cannot take."""
    reasons = ((each.pointer, each.message) for each in errors)
    return _in_measure(reasons) or [{"pointer": "", "message": "It cannot take this input."}]


def _in_measure(errors: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """As many as an answer of 4 kB has room for."""
    found: list[dict[str, str]] = []
    room = ERROR_BYTES
    for pointer, message in islice(errors, REPORTED_ERRORS):
        each = {"pointer": printable(pointer), "message": printable(message)}
        room -= len(to_json(each))
        if found and room < 0:
            break
        found.append(each)
    return found


def pointer_of(location: tuple[int | str, ...]) -> str:
    """A JSON pointer into the body."""
    parts = (printable(str(part))[:64] for part in location)
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


def printable(text: object) -> str:
    """As much of a text as is shown, in characters that have a byte form."""
    return str(text)[:LONGEST_MESSAGE].encode("utf-8", "replace").decode()


_building = threading.Lock()


def endpoint_of(plugin: Plugin, method: str) -> Endpoint | str | None:
    """The endpoint, made once; None: the plugin has no such method; a text: why it has no JSON."""
    if method not in plugin.capabilities:
        return None
    kept: Endpoint | str | None = plugin.extras.get(method)
    if kept is None:
        with _building:
            kept = plugin.extras.setdefault(method, _build(plugin, method))
    return kept


def _build(plugin: Plugin, method: str) -> Endpoint | str:
    types = types_of(plugin.cls, method)
    if types is None:  # it is there, but nothing is known about it
        types = (EMPTY, EMPTY, False)
    takes, gives, is_async = types
    takes = Any if takes in (EMPTY, UNRESOLVED) else takes
    gives = Any if gives in (EMPTY, UNRESOLVED) else gives
    if method == "validate":
        gives = Verdict
    try:
        return Endpoint(
            method, TypeAdapter(takes), TypeAdapter(gives), is_async, takes is Any, gives is Any
        )
    except Exception as error:  # noqa: BLE001  (pydantic raises many kinds, and calls user code)
        return (
            f"{plugin.name} {plugin.version} takes or gives in {method} what has no JSON form "
            f"({type(error).__name__}); it can be called from Python only."
        )


def endpoints_of(plugin: Plugin) -> list[Endpoint]:
    """Those of a plugin that can be called over HTTP."""
    found = (endpoint_of(plugin, method) for method in STAGES)
    return [endpoint for endpoint in found if isinstance(endpoint, Endpoint)]
