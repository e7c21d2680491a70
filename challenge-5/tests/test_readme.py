"""The README's examples, the demo mode and the benchmark do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.unit
def test_the_python_examples_run() -> None:
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.webhook
def test_the_shell_examples_run(server: Any) -> None:
    assert blocks("bash")
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace("curl -s", "curl -sS --fail")],
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "URL": server.url},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert '"output":9592' in done.stdout


@pytest.mark.performance
def test_the_benchmark_runs_and_prints_every_goal(needs: Any) -> None:
    parts = ("throughput", "priority", "cpu", "ends", "scale")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "benchmarks" / "scheduler.py"), "--smoke",
         *(word for part in parts for word in ("--part", part))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    for goal in (">= 1.5x", ">= 2x", ">= 2.5x", "<= 20 ms", "<= 1.3x", ">= 0.95x", "<= 100 ms",
                 "<= 50 ms", "<= 600 MB", "<= 1000 ms"):  # fmt: skip
        assert goal in done.stdout


@pytest.mark.performance
def test_the_showcase_claims_hold() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "showcase.py"), "scheduler", "--quick"],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"passed": true') == 4, done.stdout
