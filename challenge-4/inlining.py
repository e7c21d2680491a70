"""Which functions may be written into the loop instead of being called, and as what.

A call costs more than most bodies. A function of one argument whose bytecode only loads that
argument and constants, computes and returns is turned back into the text of an expression. Nothing
else is: no closure, global, call or jump, so the text cannot mean anything but the function.
"""

import dis
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, CO_VARARGS, CO_VARKEYWORDS
from itertools import islice
from types import CodeType, FunctionType
from typing import Any

from expressions import CONSTANT, VALUE, Expr, Face

MAX_INSTRUCTIONS = 60
_FLAGS = CO_VARARGS | CO_VARKEYWORDS | CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR
_OPERATORS = frozenset({"+", "-", "*", "/", "//", "%", "**", "<<", ">>", "&", "|", "^"})
_COMPARISONS = frozenset({"<", "<=", "==", "!=", ">", ">="})
_UNARY = {"UNARY_NEGATIVE": "-", "UNARY_NOT": "not ", "UNARY_INVERT": "~", "UNARY_POSITIVE": "+"}
_IGNORED = frozenset({"RESUME", "PRECALL", "CACHE", "TO_BOOL", "NOP"})
_COMPARE_TO_BOOL = 16  # a flag of COMPARE_OP since 3.13
_UNARY_POSITIVE_INTRINSIC = 5


def is_on() -> bool:
    """LAZY_INLINE=0 switches inlining off, 1 on; unset: on, but off while a debugger traces."""
    wish = os.environ.get("LAZY_INLINE")
    if wish is None:
        return sys.gettrace() is None
    return wish != "0"


def face_of(function: Callable[..., Any] | Expr) -> Face | None:
    """The code that stands for a call of this function, or None: it has to be called."""
    if type(function) is FunctionType:
        return _face(function.__code__)
    return function.face if isinstance(function, Expr) else None


@lru_cache(maxsize=1024)
def _face(code: CodeType) -> Face | None:
    # Equal code objects have equal bytecode and constants (0.0 and -0.0, 1 and True differ).
    if code.co_argcount != 1 or code.co_kwonlyargcount or code.co_flags & _FLAGS:
        return None
    if code.co_freevars or code.co_cellvars or code.co_exceptiontable or code.co_nlocals != 1:
        return None
    if len(code.co_code) > 16 * MAX_INSTRUCTIONS:
        return None
    return _Reader().read(code)


class _Reader:
    """A stack of texts in place of the interpreter's stack of values."""

    def __init__(self) -> None:
        # Each text carries its constants: texts are put together in the order of evaluation.
        self.stack: list[tuple[str, tuple[Any, ...]]] = []

    def read(self, code: CodeType) -> Face | None:
        instructions = list(islice(dis.get_instructions(code), MAX_INSTRUCTIONS + 2))
        if len(instructions) > MAX_INSTRUCTIONS + 1:
            return None
        for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
            if instruction.opname == "RETURN_VALUE" and len(self.stack) == 1:
                return Face(*self.stack[0], guarded=False)
            if instruction.opname == "RETURN_CONST" and not self.stack:
                return Face(CONSTANT, (instruction.argval,), guarded=False)
            if not self.step(instruction):
                return None
            # From 3.13 on `not not x` is compiled to the truth of x alone.
            negated = following is not None and following.opname == "UNARY_NOT"
            if _asks_for_truth(instruction) and not negated:
                self.join(1, "(not not {})")
        return None

    def step(self, instruction: dis.Instruction) -> bool:
        """Take one instruction; False: it is not on the white list."""
        name, argument = instruction.opname, instruction.argval
        if name in _IGNORED:
            return True
        if name == "LOAD_FAST":
            self.stack.append((VALUE, ()))
        elif name == "LOAD_FAST_LOAD_FAST":
            self.stack += [(VALUE, ()), (VALUE, ())]
        elif name == "LOAD_CONST":
            self.stack.append((CONSTANT, (argument,)))
        elif name == "BINARY_OP" and instruction.argrepr in _OPERATORS:
            self.join(2, "({} " + instruction.argrepr + " {})")
        elif name == "BINARY_SUBSCR":
            self.join(2, "{}[{}]")
        elif name == "COMPARE_OP":
            sign = argument if isinstance(argument, str) else ""
            sign = sign.removeprefix("bool(").removesuffix(")")
            if sign not in _COMPARISONS:
                return False
            self.join(2, "({} " + sign + " {})")
        elif name == "IS_OP":
            self.join(2, "({} is not {})" if instruction.arg else "({} is {})")
        elif name == "CONTAINS_OP":
            self.join(2, "({} not in {})" if instruction.arg else "({} in {})")
        elif name in _UNARY:
            self.join(1, "(" + _UNARY[name] + "{})")
        elif name == "CALL_INTRINSIC_1" and instruction.arg == _UNARY_POSITIVE_INTRINSIC:
            self.join(1, "(+{})")
        elif name == "LOAD_ATTR" and isinstance(argument, str) and argument.isascii():
            self.join(1, "{}." + argument)
        elif name == "BUILD_TUPLE" and instruction.arg:
            self.join(instruction.arg, "(" + "{}, " * instruction.arg + ")")
        elif name == "BUILD_LIST" and instruction.arg:
            self.join(instruction.arg, "[" + ", ".join(["{}"] * instruction.arg) + "]")
        elif name == "BINARY_SLICE":
            self.join(3, "{}[{}:{}]")
        else:
            return False
        return True

    def join(self, count: int, pattern: str) -> None:
        parts = self.stack[-count:]
        del self.stack[-count:]
        text = pattern.format(*(text for text, _ in parts))
        self.stack.append((text, tuple(constant for _, some in parts for constant in some)))


def _asks_for_truth(instruction: dis.Instruction) -> bool:
    """Whether its result is made True or False."""
    if instruction.opname == "COMPARE_OP" and sys.version_info >= (3, 13):
        return bool((instruction.arg or 0) & _COMPARE_TO_BOOL)
    return instruction.opname == "TO_BOOL"
