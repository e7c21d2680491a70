"""What an exception is told on its way out: which operation, which function, which element."""

from reprlib import Repr
from typing import Any, Protocol

from expressions import Expr
from sources import Op, Source, name_of

NOTE_CHARACTERS = 200


class Blamed(Protocol):
    """What is known about the iteration in which an error came up."""

    source: Source
    upstream: Any
    ops: list[Op]
    numbers: list[int]


def blame(error: Exception, run: Blamed, owners: list[int | None]) -> None:
    """Say on the error which operation failed on which element; errors of the source pass."""
    traceback = error.__traceback__
    owner = None if traceback is None else owners[traceback.tb_lineno]
    if traceback is None or owner is None:
        return
    local = traceback.tb_frame.f_locals
    op, number = run.ops[owner], run.numbers[owner]
    from_source = run.upstream is None and "source" in local
    index = run.source.index_of(local["source"]) if from_source else None
    note = f"in {describe_op(op, number)}"
    if index is not None:
        note += f" · source #{index}"
    if "v" in local:
        note += f" · value {shorten(local['v'])}"
    add_note(error, note)
    if isinstance(error, StopIteration):
        failure = RuntimeError(f"StopIteration was raised in {describe_op(op, number)}.")
        failure.add_note(note)
        raise failure from error


def add_note(error: BaseException, note: str) -> None:
    """Add the note once: an error that is kept and raised again has it already."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def describe_op(op: Op, number: int) -> str:
    """`op 2 map(double (file.py:12))`."""
    named = [name_of(part) for part in op[1:] if callable(part) or isinstance(part, Expr)]
    return f"op {number} {op[0]}({', '.join(named)})"


def shorten(value: Any) -> str:
    """The value in at most NOTE_CHARACTERS characters; a repr that fails is no second error."""
    try:
        text = _SHORT.repr(value)
    except Exception as error:  # noqa: BLE001  (a repr is anybody's code)
        text = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= NOTE_CHARACTERS else f"{text[: NOTE_CHARACTERS - 3]}..."


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
