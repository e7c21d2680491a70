"""Is every call that is legal under one signature legal under another? Each one that is not.

A call is a number of positions and a set of names. Three things can go wrong with it: a position or
a name that nobody takes, one parameter that gets two values, and a required one that gets none.
A call that would be legal with its values swapped is a fault too (C105). `tests/test_calls.py`
compares this file with what Python says, for all signatures of a few parameters.
"""

from collections.abc import Iterator

from signatures import (
    KEYWORD_ONLY,
    POSITIONAL,
    POSITIONAL_ONLY,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Fault,
    Param,
    Parameters,
    text_of_parameter,
)


def compare_calls(contract: Parameters, found: Parameters) -> Iterator[Fault]:
    """The calls that are legal under the contract and fail here; self or cls is bound in both."""
    if _only_goes_on(contract, found):
        return iter(())
    return _Comparison(contract, found).faults()


def _only_goes_on(contract: Parameters, found: Parameters) -> bool:
    """The usual case: the same, and behind it perhaps some that no call of the contract reaches."""
    count = len(contract)
    if not same_shape(contract, found[:count]):
        return False
    return len(found) == count or not (
        any(param.kind in (VAR_POSITIONAL, VAR_KEYWORD) for param in contract)
        or any(param.required for param in found[count:])
    )


def same_shape(one: Parameters, other: Parameters) -> bool:
    """Whether names, kinds and optionality are equal, so that nothing has to be compared."""
    return len(one) == len(other) and all(
        a.name == b.name and a.kind == b.kind and a.required == b.required
        for a, b in zip(one, other, strict=True)
    )


class _Comparison:
    def __init__(self, contract: Parameters, found: Parameters) -> None:
        self.contract = contract
        self.found = found
        self.expected = [p for p in contract if p.kind in (POSITIONAL_ONLY, POSITIONAL)]
        self.keywords = {p.name: p for p in contract if p.kind == KEYWORD_ONLY}
        self.also_by_name = {p.name for p in contract if p.kind == POSITIONAL}
        self.gives_args = any(p.kind == VAR_POSITIONAL for p in contract)
        self.gives_names = any(p.kind == VAR_KEYWORD for p in contract)
        self.positions = [p for p in found if p.kind in (POSITIONAL_ONLY, POSITIONAL)]
        self.by_name = {p.name: p for p in found if p.kind in (POSITIONAL, KEYWORD_ONLY)}
        self.takes_args = any(p.kind == VAR_POSITIONAL for p in found)
        self.takes_names = any(p.kind == VAR_KEYWORD for p in found)

    def faults(self) -> Iterator[Fault]:
        for index, param in enumerate(self.expected):
            if index < len(self.positions):
                yield from self.at_position(index, param, self.positions[index])
            elif self.takes_args:
                yield from self.in_var_positional(index, param)
            else:
                yield Fault(
                    "C102", f"{text_of_parameter(param)} by position {index + 1}",
                    f"'{param.name}' by name only" if param.name in self.by_name
                    else "too few positional parameters",
                    f"Accept '{param.name}' as a positional parameter.",
                )  # fmt: skip
        for param in self.keywords.values():
            yield from self.by_keyword(param)
        for param in self.contract:
            lacks_args = param.kind == VAR_POSITIONAL and not self.takes_args
            lacks_names = param.kind == VAR_KEYWORD and not self.takes_names
            if lacks_args or lacks_names:
                shown = text_of_parameter(param)
                yield Fault("C108", shown, f"no {shown}", f"Accept {shown}.")
        yield from self.beyond()

    def at_position(self, index: int, param: Param, here: Param) -> Iterator[Fault]:
        if param.kind == POSITIONAL and here.name != param.name:
            if param.name in self.by_name:
                yield Fault(
                    "C105", f"'{param.name}' at position {index + 1}",
                    f"'{here.name}' at position {index + 1}, '{param.name}' elsewhere",
                    "Keep the order of the contract's parameters.",
                )  # fmt: skip
                return
            if not self.takes_names or here.required:
                yield Fault(
                    "C104", f"parameter '{param.name}'", f"parameter '{here.name}'",
                    f"Rename '{here.name}' to '{param.name}': callers may pass it by name.",
                )  # fmt: skip
                return
        elif (
            param.kind == POSITIONAL
            and here.kind == POSITIONAL_ONLY
            and (here.required or not self.takes_names)
        ):
            yield Fault(
                "C104", f"'{param.name}' also by name", f"'{here.name}' by position only",
                f"Move '/' so that '{param.name}' can be passed by name.",
            )  # fmt: skip
            return
        if here.required and not param.required:
            yield _not_optional(param)
        if fault := self.filled_twice(index, here):
            yield fault

    def filled_twice(self, index: int, here: Param) -> Fault | None:
        """Whether a call may fill this position and pass its name as well."""
        if here.kind != POSITIONAL:
            return None
        later = {p.name for p in self.expected[index + 1 :] if p.kind == POSITIONAL}
        is_free = self.gives_names and here.name not in self.also_by_name
        if here.name not in self.keywords and here.name not in later and not is_free:
            return None
        return Fault(
            "C105", f"'{here.name}' by name beside {index + 1} by position",
            f"'{here.name}' at position {index + 1}, so it gets two values",
            f"Let '{here.name}' be passed in one way: '/' behind it, or '*' before it.",
        )  # fmt: skip

    def in_var_positional(self, index: int, param: Param) -> Iterator[Fault]:
        if param.kind == POSITIONAL_ONLY:
            return
        here = self.by_name.get(param.name)
        if here is None and not self.takes_names:
            yield Fault(
                "C103", f"'{param.name}' also by name", "only positions, in *args",
                f"Name '{param.name}' in the signature, or accept **kwargs too.",
            )  # fmt: skip
        elif here is not None and here.kind == KEYWORD_ONLY and here.required:
            yield Fault(
                "C102", f"{text_of_parameter(param)} by position {index + 1}",
                f"'{param.name}' by name only, and required",
                f"Move '{param.name}' before '*args', or give it a default.",
            )  # fmt: skip

    def by_keyword(self, param: Param) -> Iterator[Fault]:
        here = self.by_name.get(param.name)
        if here is None:
            if not self.takes_names:
                yield Fault(
                    "C107", f"keyword '{param.name}'", f"no keyword '{param.name}'",
                    f"Accept '*, {text_of_parameter(param)}'.",
                )  # fmt: skip
        elif here.required and not param.required:
            yield _not_optional(param)

    def beyond(self) -> Iterator[Fault]:
        """What the contract does not speak of: it may not be required, nor get in the way."""
        for index, param in enumerate(self.positions):
            if index >= len(self.expected):
                by_keyword = param.kind == POSITIONAL and param.name in self.keywords
                if param.required and not by_keyword:
                    yield _too_many(param)
                elif self.gives_args and (fault := self.filled_twice(index, param)):
                    yield fault
        for param in self.found:
            if param.kind == KEYWORD_ONLY and param.required and param.name not in self.keywords:
                in_order = [p.name for p in self.expected if p.kind == POSITIONAL]
                if param.name not in in_order:
                    yield _too_many(param)


def _not_optional(param: Param) -> Fault:
    return Fault(
        "C106", f"'{param.name}' may be left out", f"'{param.name}' is required",
        f"Give '{param.name}' a default.",
    )  # fmt: skip


def _too_many(param: Param) -> Fault:
    return Fault(
        "C109", "no further required parameter", f"'{param.name}' is required",
        f"Give '{param.name}' a default, or remove it.",
    )  # fmt: skip
