"""The metaclass that holds classes to their contracts, and `Contract`, which declares them."""

import abc
from typing import TYPE_CHECKING, Any, ClassVar

from admission import (
    DEFINITION,
    Definition,
    admit,
    defining_frame,
    locals_of,
    move_class_cells,
    undo,
    verify,
)
from chains import Chain
from changes import change, is_demanded, refuse_other_bases
from contracts import GONE, SPEC, spec_of

_OF_ABC = frozenset({"__abstractmethods__", "_abc_impl"})  # which it sets for every class


class ContractEnforcerMeta(abc.ABCMeta):
    """Examines a class when it is defined, registers and measures it when it keeps its contracts.

    Keywords of the `class` statement: `name=` (default: the class name), `abstract=True` (neither
    examined nor registered, cannot be instantiated), `register=False` (examined, not registered).
    A class that names `Contract` in its bases is itself a contract: `attributes="optional"` does
    not demand version, description and author, `any_of=True` demands one of its members.
    """

    def __new__(  # noqa: D102
        mcs,
        cls_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        name: str | None = None,
        abstract: bool = False,
        register: bool = True,
        attributes: str = "required",
        any_of: bool = False,
        **keywords: Any,
    ) -> Any:
        frame = defining_frame()
        if "__pydantic_generic_metadata__" in keywords:  # made by `Model[int]`, no class statement
            register = False
        given = {"name": name, "abstract": abstract, "register": register}
        definition = Definition(given, (frame.f_code.co_filename, frame.f_lineno), cls_name)
        previous = None
        earlier: Definition | None = namespace.get(DEFINITION)
        if earlier is not None and earlier.cls_name == cls_name:
            undo(namespace, earlier)
            previous = earlier.cls
            definition = Definition(earlier.keywords, earlier.place, cls_name)
        namespace[DEFINITION] = definition
        namespace.pop(SPEC, None)
        cls = super().__new__(mcs, cls_name, bases, namespace, **keywords)
        definition.cls = cls
        if _is_contract(bases):
            spec = spec_of(cls, attributes=attributes, any_of=any_of, spaces=locals_of(frame))  # type: ignore[arg-type]
            type.__setattr__(cls, SPEC, spec)
            return cls
        if previous is not None:
            move_class_cells(cls, previous)
        if definition.keywords["abstract"] or abc.ABC in bases:
            definition.keywords["abstract"] = True
            return cls
        admit(cls, definition, previous, frame)
        return cls

    def __init__(cls, *args: Any, **_: Any) -> None:
        super().__init__(*args)  # without our keywords

    if not TYPE_CHECKING:  # type checkers would take its return type for that of every class

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            """Make an instance; contracts and abstract classes have none."""
            definition = vars(cls)[DEFINITION]
            if SPEC in vars(cls) or definition.keywords["abstract"]:
                what = "a contract" if SPEC in vars(cls) else "abstract"
                raise TypeError(
                    f"{cls.__name__} is {what} and cannot be instantiated; define a class that "
                    "derives from it."
                )
            if definition.pending_fields or definition.pending_types:
                verify(cls)
                definition.pending_fields = definition.pending_types = False
            return super().__call__(*args, **kwargs)

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "__bases__":
            refuse_other_bases(cls)
        if name in _OF_ABC or (name[0] == "_" and not is_demanded(cls, name)):
            type.__setattr__(cls, name, value)
        else:
            change(cls, name, value)

    def __delattr__(cls, name: str) -> None:
        change(cls, name, GONE)


def _is_contract(bases: tuple[type, ...]) -> bool:
    """`Contract` itself, and classes that name it in their bases, declare members."""
    return "Contract" not in globals() or Contract in bases


class Contract(metaclass=ContractEnforcerMeta, attributes="none"):
    """Name it in the bases of a class to make that class a contract: `class K(Contract): …`.

    Every public method and property in the body of a contract is demanded of the classes that
    derive from it; so are the class attributes version, description and author.
    """

    if TYPE_CHECKING:
        version: ClassVar[str]
        description: ClassVar[str]
        author: ClassVar[str]

    __slots__ = ()

    def __rshift__(self, other: Any) -> Chain:
        """`validator >> transformer >> processor`."""
        return Chain(self, other)


def combine_metaclass(*bases: type) -> Any:
    """A metaclass for classes with all these bases: `class P(K, Enum, metaclass=…(K, Enum))`."""
    metas: list[type] = []
    for meta in map(type, bases):
        if not any(issubclass(each, meta) for each in metas):
            metas = [each for each in metas if not issubclass(meta, each)] + [meta]
    metas.sort(key=lambda meta: not issubclass(meta, ContractEnforcerMeta))
    if len(metas) == 1:
        return metas[0]
    return type("".join(meta.__name__ for meta in metas), tuple(metas), {})
