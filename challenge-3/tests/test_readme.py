"""The README's examples do what it says."""

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
def test_the_shell_examples_run(bundled_server: Any) -> None:
    assert blocks("bash")
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace("curl -s", "curl -sS --fail")],
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "URL": bundled_server.url},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert '"values":[3.9624,null,1632.204]' in done.stdout
        assert '"value":22.0' in done.stdout
        assert '"calls":' in done.stdout


@pytest.mark.performance
def test_the_benchmark_runs_and_prints_every_goal(needs: Any) -> None:
    needs.package("zope.interface")
    needs.package("pluggy")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "benchmarks" / "speed.py"), "--smoke"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    for goal in ("< 1x", "<= 2x", "<= 2.2x", "<= 0.4x", "<= 1.3x", "<= 1.4x", "= 8,000", "= 0"):
        assert goal in done.stdout


@pytest.mark.performance
def test_the_scores_of_the_peers_are_those_of_the_readme(needs: Any) -> None:
    for package in ("zope.interface", "typeguard", "overrides", "mypy"):
        needs.package(package)
    done = subprocess.run(
        [sys.executable, str(FOLDER / "benchmarks" / "peers.py"), "--markdown"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if not line.startswith(("| Protocol", "| ---")):  # it differs between versions of Python
            assert line in README


@pytest.mark.performance
def test_the_showcase_claims_hold() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "showcase.py"), "plugins", "--quick"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"claim"') >= 7
    assert '"passed": false' not in done.stdout
