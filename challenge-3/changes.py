"""What is set or deleted on a class after its definition: examined first, and refused as a whole.

The classes below it that inherit the member are examined as well.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from admission import DEFINITION, Definition, measure, registry
from contracts import ATTRIBUTES, GONE, SPEC, contracts_of, examine
from registry import Plugin
from violations import ContractViolationError, Violation

_MACHINERY = (__name__, "enforcement")


def change(cls: type, name: str, value: Any) -> None:
    """Set or delete (GONE) an attribute of a class; a contract member is examined first."""
    affected = list(_affected(cls, name))
    if value is GONE and isinstance(vars(cls).get(name), dataclasses.Field):
        vars(cls)[DEFINITION].pending_fields = True  # @dataclass is at work: a slot may follow
        affected = []
    overrides = {
        (each, name): GONE for each in affected if name in vars(each)[DEFINITION].added
    } | {(cls, name): value}
    found = [
        examine(
            each, contracts_of(each), overrides=overrides,
            decorated=vars(each)[DEFINITION].pending_fields,
        )
        for each in affected
    ]  # fmt: skip
    if violations := [violation for each in found for violation in each.violations]:
        file, line = _caller()
        shown = "deleted" if value is GONE else f"set to {_shown(value)}"
        change = Violation(
            "C150", name, f"{cls.__name__}.{name} keeps the contract", shown, file, line,
            "Change the class statement instead; the old value was kept.",
        )  # fmt: skip
        raise ContractViolationError(cls.__name__, [change, *violations])
    if value is GONE:
        type.__delattr__(cls, name)
    elif name == "version":
        _refuse_other_version(cls, value)
    is_set = value is GONE
    for each, findings in zip(affected, found, strict=True):
        definition: Definition = vars(each)[DEFINITION]
        if name in findings.deferred and name not in definition.meters:
            definition.pending_types = True
        if (member := findings.members.get(name)) is not None:
            definition.added.discard(name)
            definition.originals.pop(name, None)
            is_set |= measure(each, definition, member, findings) and each is cls
    if not is_set:
        type.__setattr__(cls, name, value)


def _refuse_other_version(cls: type, value: Any) -> None:
    """The version is half of the key under which a class is registered."""
    plugin: Plugin | None = vars(cls)[DEFINITION].plugin
    if plugin and registry.peek(*plugin.key) is plugin and value != plugin.version.text:
        file, line = _caller()
        refusal = Violation(
            "C150", "version", f"{plugin.version}, under which {plugin.name} is registered",
            f"set to {_shown(value)}", file, line,
            "Define a class with the new version; both can be registered.",
        )  # fmt: skip
        raise ContractViolationError(cls.__name__, [refusal])


def refuse_other_bases(cls: type) -> None:
    """The bases are what the class was examined with, and measured."""
    if vars(cls)[DEFINITION].plugin is not None:
        file, line = _caller()
        refusal = Violation(
            "C150", "__bases__", f"those of the class statement of {cls.__name__}", "others",
            file, line, "Define a class with the new bases.",
        )  # fmt: skip
        raise ContractViolationError(cls.__name__, [refusal])


def _affected(cls: type, name: str) -> Iterator[type]:
    """The class and those below that inherit the member, as far as a contract asks for it."""
    waiting, seen = [cls], set()
    while waiting:
        each = waiting.pop()
        definition = vars(each).get(DEFINITION)
        own = name in vars(each) and definition is not None and name not in definition.added
        if each in seen or definition is None or definition.cls is not each:
            continue
        if each is not cls and own:
            continue
        seen.add(each)
        waiting.extend(type.__subclasses__(each))
        if definition.keywords["abstract"] or SPEC in vars(each):
            continue
        specs = contracts_of(each)
        if any(name in spec.members or name in ATTRIBUTES for spec in specs):
            yield each


def _caller() -> tuple[str, int]:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _MACHINERY:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def is_demanded(cls: type, name: str) -> bool:
    """Whether a contract of the class speaks of the name."""
    return any(name in spec.members for spec in contracts_of(cls))
