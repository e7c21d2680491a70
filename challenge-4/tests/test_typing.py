"""mypy --strict infers through chains, narrows, and rejects what is wrong."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent
PROMISES = FOLDER / "tests" / "typing_promises.txt"


@pytest.mark.unit
def test_mypy_agrees_with_every_promise(needs: Any, tmp_path: Path) -> None:
    needs.package("mypy")
    copy = tmp_path / "promises.py"
    copy.write_text(PROMISES.read_text())
    expected = {
        (number, match[1])
        for number, line in enumerate(PROMISES.read_text().splitlines(), 1)
        if (match := re.search(r"# error: ([a-z-]+)$", line))
    }
    assert len(expected) == 7

    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"),
         "--follow-imports=silent", str(copy)],
        env={"MYPYPATH": str(FOLDER), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    found = {
        (int(match[1]), match[2])
        for match in re.finditer(r"promises\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)
    }
    assert found == expected, done.stdout + done.stderr
