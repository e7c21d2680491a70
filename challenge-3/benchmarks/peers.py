"""Who judges how many of the 54 class definitions right: `python benchmarks/peers.py [--markdown]`.

Each checker is used through its own best entry point, as its documentation shows it. A checker that
is not installed is left out.
"""

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "benchmarks")]

from corpus import CASES, CONTRACT, PRELUDE, Case  # noqa: E402  (found by the line above)

Judge = Callable[[Case], bool]  # whether the definition is accepted


def body(decorate: str = "") -> str:
    """The members of the contract, each `def` decorated where the peer wants it."""
    text = "\n".join(CONTRACT.values())
    if decorate:
        text = re.sub(r"^(\s*)((?:async )?def )", rf"\1{decorate}\n\1\2", text, flags=re.M)
    return indent(text, "    ")


def run(text: str) -> dict[str, Any]:
    """The names that the text defines."""
    space: dict[str, Any] = {"__name__": "corpus_case"}
    exec(compile(f"{PRELUDE}\n{text}", "<case>", "exec"), space)
    return space


def accepts(text: str, check: Callable[[dict[str, Any]], Any]) -> bool:
    """Whether neither the definition nor the check raises, or the check says no."""
    try:
        return check(run(text)) is not False
    except Exception:
        return False


def ours(case: Case) -> bool:
    """The metaclass, at definition."""
    head = f"from utils import Contract\nclass K(Contract):\n{body()}\n"
    text = head + case.definition(header="class P({bases}, register=False):")
    return accepts(text, lambda _: True)


def by_abc(case: Case) -> bool:
    """abc: abstract methods, at instantiation."""
    head = f"import abc\nclass K(abc.ABC):\n{body('@abc.abstractmethod')}\n"
    return accepts(head + case.definition(), lambda space: space["P"]())


def by_protocol(case: Case) -> bool:
    """typing.Protocol: isinstance of a runtime-checkable protocol."""
    head = (
        "from typing import Protocol, runtime_checkable\n"
        f"@runtime_checkable\nclass K(Protocol):\n{body()}\n"
    )
    return accepts(head + alone(case), lambda space: isinstance(space["P"](), space["K"]))


def by_typeguard(case: Case) -> bool:
    """typeguard: check_type of an instance against the protocol."""
    head = (
        "from typing import Protocol\nfrom typeguard import check_type\n"
        f"class K(Protocol):\n{body()}\n"
    )
    return accepts(head + alone(case), lambda space: space["check_type"](space["P"](), space["K"]))


def by_zope(case: Case) -> bool:
    """zope.interface: verifyObject."""
    text = re.sub(r"@\w+\n", "", "\n".join(CONTRACT.values()))
    text = re.sub(r"\((self|cls)(, )?", "(", text).replace("async ", "")
    text = re.sub(r"def ready\(\) -> bool: \.\.\.", "ready = Attribute('ready')", text)
    head = (
        "from zope.interface import Attribute, Interface, implementer\n"
        "from zope.interface.verify import verifyObject\n"
        f"class K(Interface):\n{indent(text, '    ')}\n"
    )
    definition = head + "@implementer(K)\n" + alone(case)
    return accepts(definition, lambda space: space["verifyObject"](space["K"], space["P"]()))


def by_overrides(case: Case) -> bool:
    """overrides: EnforceOverrides beside abc, every overriding method decorated."""
    head = (
        "import abc\nfrom overrides import EnforceOverrides, override\n"
        f"class K(EnforceOverrides):\n{body('@abc.abstractmethod')}\n"
    )
    names = "|".join(CONTRACT)
    text = re.sub(
        rf"^(\s+)((?:async )?def (?:{names})\()",
        r"\1@override\n\1\2",
        case.definition(),
        flags=re.M,
    )
    text = re.sub(
        rf"^(\s+(?:{names}) = )(lambda.*|partialmethod.*)$", r"\1override(\2)", text, flags=re.M
    )
    return accepts(head + text, lambda space: space["P"]())


def alone(case: Case) -> str:
    """The class without the contract among its bases."""
    return case.definition().replace(", K)", ")").replace("(K)", "")


def by_mypy() -> Judge:
    """mypy: all definitions in one file, errors sorted by the lines of their class."""
    text = f"import abc\n{PRELUDE}\nclass K(abc.ABC):\n{body('@abc.abstractmethod')}\n\n"
    ranges: list[tuple[int, int, str]] = []
    for number, case in enumerate(CASES):
        start = text.count("\n") + 1
        text += case.definition(header=f"class P{number}({{bases}}):") + f"P{number}()\n\n"
        ranges.append((start, text.count("\n"), case.title))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cases.py"
        path.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--check-untyped-defs", "--cache-dir", scratch,
             str(path)],
            capture_output=True, text=True, cwd=scratch, check=False,
        )  # fmt: skip
    lines = [int(n) for n in re.findall(r"cases\.py:(\d+): error", done.stdout)]
    rejected = {
        title for start, end, title in ranges if any(start <= line <= end for line in lines)
    }
    return lambda case: case.title not in rejected


ROWS: list[tuple[str, str, str, Callable[[], Judge]]] = [
    ("this folder", "definition", "", lambda: ours),
    ("abc", "instantiation", "", lambda: by_abc),
    ("Protocol, runtime_checkable", "isinstance", "", lambda: by_protocol),
    ("zope.interface verifyObject", "on demand", "zope.interface", lambda: by_zope),
    ("typeguard check_type", "on demand", "typeguard", lambda: by_typeguard),
    ("overrides EnforceOverrides + abc", "definition", "overrides", lambda: by_overrides),
    ("mypy (static)", "before it runs", "mypy", by_mypy),
]


def scores() -> list[tuple[str, str, int, int, int]]:
    """Checker, when, right of all, wrongly accepted, wrongly rejected."""
    found = []
    for name, when, package, make in ROWS:
        if package and importlib.util.find_spec(package) is None:
            continue
        judge = make()
        verdicts = [(case.is_legal, judge(case)) for case in CASES]
        right = sum(legal == accepted for legal, accepted in verdicts)
        accepts_wrongly = sum(accepted and not legal for legal, accepted in verdicts)
        found.append((name, when, right, accepts_wrongly, len(CASES) - right - accepts_wrongly))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Score checkers on the corpus.")
    parser.add_argument("--markdown", action="store_true", help="as the README shows it")
    markdown = parser.parse_args().markdown
    legal = sum(case.is_legal for case in CASES)
    head = (
        "checker",
        "when",
        f"right of {len(CASES)}",
        f"wrongly accepted of {len(CASES) - legal}",
        f"wrongly rejected of {legal}",
    )
    rows = [head, *[tuple(map(str, row)) for row in scores()]]
    if markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * 5, *rows[1:]]))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
