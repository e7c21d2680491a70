"""The struct an event is projected to: only the needed fields, wherever they stand.

The decoder skips everything else in a document. A `Leaf` is a value that is read, a `Tree` turns
the paths of all leaves into nested structs, and into the statements that walk down to them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from aggregation import MAX_NAME_CHARS, Moment, Name, Number
from specs import Condition
from windows import BEGINNING

NO_TIME: Final = BEGINNING  # the event takes the time of its arrival

GroupValue = (
    Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
    | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    | float
    | bool
    | None
)
CountedValue = str | int | float | bool | None


@dataclass
class Leaf:
    """A value that is read: what it is needed for, and where it stands."""

    path: str
    numeric: bool = False
    grouped: bool = False
    counted: bool = False  # its distinct values are
    optional: bool = True
    is_time: bool = False
    is_id: bool = False
    strict: bool = False  # built in: neither absent nor null
    conditions: list[Condition] = field(default_factory=list)
    place: str = ""  # the expression that reads it, once its node is at hand

    def type(self) -> Any:
        """What the decoder takes there."""
        kind: Any
        strict = self.strict
        if self.is_id:
            kind = Name | int
        elif self.is_time:
            kind = Moment if strict else Moment | None
        elif self.numeric:
            kind = Number if strict else Number | None
        elif self.grouped:
            kind = Name if strict else GroupValue
        elif self.counted:
            kind = CountedValue
        else:
            kind = Any
        return kind | UnsetType if self.optional and kind is not Any else kind


class Tree:
    """The paths of a spec as nested structs, and the code that walks down to them."""

    def __init__(self, leaves: dict[str, Leaf]) -> None:
        self.steps: list[str] = []  # statements that fetch the inner nodes of `event`
        self.levels = 1
        self._numbers = iter(range(10_000))
        found = [(path.split("."), leaf) for path, leaf in leaves.items()]
        self.shape = self._node(found, "event", optional=False, root=True)

    def _node(
        self,
        found: list[tuple[list[str], Leaf]],
        owner: str,
        *,
        optional: bool,
        root: bool = False,
    ) -> type[Struct]:
        fields: list[tuple[str, Any, Any]] = []
        rename: dict[str, str] = {}
        inner: dict[str, list[tuple[list[str], Leaf]]] = {}
        for parts, leaf in found:
            if len(parts) > 1:
                inner.setdefault(parts[0], []).append((parts[1:], leaf))
                continue
            name = f"f{next(self._numbers)}"
            rename[name] = parts[0]
            default = UNSET if leaf.optional else msgspec.NODEFAULT
            fields.append((name, leaf.type(), default))
            leaf.place = f"{owner}.{name}"
            if optional:
                leaf.place = f"({owner}.{name} if {owner} else UNSET)"
        for key, below in inner.items():
            name = f"f{next(self._numbers)}"
            variable = f"n{name[1:]}"
            rename[name] = key
            lacking = all(leaf.optional for _, leaf in below)
            step = f"{variable} = {owner}.{name}"
            self.steps.append(f"{step} if {owner} else None" if optional else step)
            self.levels += not (lacking or optional)
            shape: Any = self._node(below, variable, optional=lacking or optional)
            if lacking:
                shape = shape | UnsetType | None
            fields.append((name, shape, UNSET if lacking else msgspec.NODEFAULT))
        if root:
            fields.append(("at", Any, NO_TIME))
            rename["at"] = "\u241fat"  # a document may hold it: it is set anew after decoding
        return msgspec.defstruct(
            "Event" if root else "Part",
            fields,
            rename=rename,
            kw_only=True,
            gc=False,
        )
