"""mypy --strict sees what the metaclass does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent


@pytest.mark.integration
def test_mypy_strict_knows_the_types_and_finds_exactly_the_marked_errors(
    needs: Any, tmp_path: Path
) -> None:
    needs.package("mypy")

    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--cache-dir",
         str(tmp_path), "--follow-imports=silent", "tests/typing_cases.py"],
        cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
