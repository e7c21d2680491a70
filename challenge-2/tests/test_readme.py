"""The README's examples, the showcase and the benchmark do what they say."""

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
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.webhook
def test_the_shell_examples_run(shared_server: Any) -> None:
    assert blocks("bash")
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace("curl -s", "curl -sS --fail")],
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "URL": shared_server.url},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert '"type":"ReleaseError"' in done.stdout
        assert '"leaked":0' in done.stdout
        assert '"event": "release_failed"' in done.stdout


@pytest.mark.performance
def test_the_benchmark_runs_and_prints_every_goal(needs: Any) -> None:
    needs.package("aiotools")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "benchmarks" / "managers.py"), "--smoke"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    for goal in ("<= 1.4x", "<= 1x", "<= 2.5x", "<= 1.03x", "<= 1.05x", "<= 1.1x", "none", "flat"):
        assert goal in done.stdout
    assert "anyio-contextgroup" in done.stdout
    left = next(line for line in done.stdout.splitlines() if line.startswith("left after"))
    assert "0 tasks, 0 descriptors, 0 threads" in left


@pytest.mark.performance
def test_the_showcase_claims_hold() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "showcase.py"), "resources", "--quick"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"passed": true') == 6
    assert '"passed": false' not in done.stdout


@pytest.mark.integration
def test_debug_mode_with_warnings_as_errors_is_clean() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(FOLDER / "showcase.py"), "resources",
         "--quick"],
        env={**os.environ, "PYTHONASYNCIODEBUG": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    for word in ("Warning", "never retrieved", "destroyed", "Traceback", "Exception ignored"):
        assert word not in done.stderr
