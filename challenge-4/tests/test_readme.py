"""The README's examples do what it says; demo, showcase and benchmark run."""

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


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.unit
def test_the_python_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZY_INLINE", "1")  # also while coverage traces
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
        assert '"people":178000' in done.stdout
        assert '{"end":true,"count":1}' in done.stdout


@pytest.mark.unit
def test_the_readme_is_short_and_says_where_a_peer_is_faster() -> None:
    assert len(README.splitlines()) <= 135
    assert "faster" in README


@pytest.mark.performance
def test_the_benchmark_runs_and_prints_every_goal(needs: Any) -> None:
    for name in ("toolz", "functional", "streamable", "more_itertools"):
        needs.package(name)
    printed = run(str(FOLDER / "benchmarks" / "chains.py"), "--smoke")

    for goal in ("<= 1.15x by hand", "<= 0.7x best peer", "<= 1.2x by hand", "<= 0.7x by hand",
                 "<= 1.1x by hand", "<= 1.5 us", "<= 2 MiB", "SQLite"):  # fmt: skip
        assert goal in printed


@pytest.mark.performance
def test_the_showcase_claims_hold() -> None:
    printed = run(str(FOLDER / "showcase.py"), "lazy", "--quick")

    claims = [line for line in printed.splitlines() if "at the speed of" not in line]
    assert len(claims) >= 5  # the figures of speed depend on what else the machine does
    assert all('"passed": true' in line for line in claims), printed


@pytest.mark.performance
def test_the_demo_gives_the_same_answer_from_three_sources() -> None:
    printed = run(str(FOLDER / "demo.py"), "--rows", "3000")

    assert "The three sources give the same answer." in printed
    assert "sql: SELECT" in printed
    assert printed.count("op 6 take(10)") == 3
