"""What is shown and measured about pulling and delivering runs, and the names are kept in step."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import simulators
from fetch_settings import KEYS, PREFIX

FOLDER = Path(__file__).resolve().parent.parent


@pytest.mark.unit
def test_every_setting_of_the_fetcher_stands_in_the_example_file() -> None:
    example = (FOLDER.parent / ".env.example").read_text()

    assert [key for key in KEYS if f"{PREFIX}{key.upper()}=" not in example] == []


@pytest.mark.performance
@pytest.mark.parametrize("mode", ["fetch", "deliver", "resilience"])
def test_the_showcase_claims_hold(mode: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "showcase.py"), mode, "--quick"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert '"claim"' in done.stdout
    assert '"passed": false' not in done.stdout


@pytest.mark.performance
def test_the_benchmark_runs_and_prints_every_goal(needs: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "benchmarks" / "traffic.py"), "--smoke"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    for goal in ("<= 5 requests", ">= 95 %", ">= 85 %", "<= 1.15 s", "aiolimiter", "naive"):
        assert goal in done.stdout


@pytest.mark.unit
@pytest.mark.parametrize(
    "arguments",
    ["--latency-ms abc", "--latency-ms 60-10", "--dead x", "--dead corner:x", "--port 99999",
     "--failure-rate nan", "--failure-rate 2", "--products -1"],
)  # fmt: skip
def test_mock_servers_that_make_no_sense_are_refused_by_name(
    arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulators.py", *arguments.split()])
    with pytest.raises(SystemExit) as raised:
        simulators.main()

    assert raised.value.code == 2
    assert f"argument {arguments.split()[0]}" in capsys.readouterr().err


@pytest.mark.integration
def test_imported_the_scenario_starts_nothing() -> None:
    script = "import threading, data_streaming_pipeline_test; assert threading.active_count() == 1"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=FOLDER, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
