"""One pytest process per folder: all folders have modules called `app` and `utils`.

A call that names one folder runs in this process, with that folder first on the path. A call that
names several (or none, at the root) starts one process for each, one after the other, and adds up.
The root's own `*_test.py` count as a folder called `.`.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
TALLY_VARIABLE = "FOLDER_TALLY"  # names the file in which a folder's process leaves its counts
GRAVEST_FIRST = (3, 2, 4, 1, 0, 5)  # pytest's exit codes; 5 (nothing ran) only if all say so
SHOWN = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "error")


# --- one process per folder -------------------------------------------------------------------


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run here when one folder is meant, else start one pytest for each."""
    option = config.option
    if option.help or option.version or option.markers or getattr(option, "cacheshow", False):
        return None
    folders = _by_folder(config)
    if len(folders) > 1:
        return _run_each(config, folders)
    for folder, paths in folders.items():
        if folder == ".":
            config.args[:] = paths
        else:
            sys.path.insert(0, str(ROOT / folder))
    return None


def _by_folder(config: pytest.Config) -> dict[str, list[str]]:
    """The paths of the command line, sorted by the folder they lie in."""
    here = config.invocation_params.dir
    folders: dict[str, list[str]] = {}
    for argument in config.args:
        path = Path(os.path.abspath(here / argument.split("::")[0].split("[")[0]))  # noqa: PTH100
        if path == ROOT:
            for folder in sorted(ROOT.glob("challenge-*/app.py")):
                folders.setdefault(folder.parent.name, []).append(str(folder.parent))
            folders.setdefault(".", []).extend(map(str, sorted(ROOT.glob("*_test.py"))))
        elif path.is_relative_to(ROOT):
            first = path.relative_to(ROOT).parts[0]
            name = first if (ROOT / first).is_dir() else "."
            folders.setdefault(name, []).append(argument)
    return folders


def _run_each(config: pytest.Config, folders: dict[str, list[str]]) -> int:
    started = time.monotonic()
    options = _options(config)
    totals: Counter[str] = Counter()
    codes: dict[str, int] = {}
    for folder, paths in folders.items():
        print(f"\n=== {folder} ===", flush=True)
        code, tally = _run_one(config, folder, [*options, *paths])
        codes[folder] = code
        totals.update(tally)
        limit = config.option.maxfail
        if code == 2 or (limit and totals["failed"] + totals["error"] >= limit):
            break
    worst = next(code for code in GRAVEST_FIRST if code in (*codes.values(), 5))
    if getattr(config.option, "cov_source", None):
        worst = _report_coverage(config) or worst
    _print_sum(config, folders, codes, totals, time.monotonic() - started)
    return worst


def _options(config: pytest.Config) -> list[str]:
    """The command line without its paths."""
    given = [str(argument) for argument in config.invocation_params.args]
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        return given
    for path in config.args:
        if given.count(path) != config.args.count(path):
            raise pytest.UsageError(
                f"{path!r} stands both as a path and as the value of an option. Write the option "
                f"and its value in one word, such as -k{path}."
            )
    return [argument for argument in given if argument not in config.args]


def _run_one(config: pytest.Config, folder: str, arguments: list[str]) -> tuple[int, Counter[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        tally = Path(scratch) / "tally.json"
        environment = {**os.environ, TALLY_VARIABLE: str(tally)}
        if getattr(config.option, "cov_source", None):
            environment["COVERAGE_FILE"] = str(ROOT / f".coverage.{folder.strip('.') or 'root'}")
            arguments = [*arguments, "--cov-report=", "--cov-fail-under=0"]
        if xml := config.option.xmlpath:
            path = Path(xml)
            name = f"{path.stem}-{folder.strip('.') or 'root'}{path.suffix}"
            arguments = [*arguments, f"--junitxml={path.with_name(name)}"]
        command = [sys.executable, "-P", "-m", "pytest", *arguments]
        try:
            code = subprocess.call(command, cwd=config.invocation_params.dir, env=environment)
        except KeyboardInterrupt:
            code = 2
        counts = json.loads(tally.read_text()) if tally.exists() else {}
    return code, Counter(counts)


def _report_coverage(config: pytest.Config) -> int:
    """Combine what the folders measured and report it once; return 1 below the floor."""
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.call([*coverage, "combine", "--quiet"], cwd=ROOT)
    floor = config.option.cov_fail_under
    code = subprocess.call(
        [*coverage, "report", *([f"--fail-under={floor}"] if floor else [])], cwd=ROOT
    )
    for kind in ("html", "xml"):
        if kind in (config.option.cov_report or {}):
            subprocess.call([*coverage, kind, "--quiet"], cwd=ROOT)
    return 1 if code else 0


def _print_sum(
    config: pytest.Config,
    folders: dict[str, list[str]],
    codes: dict[str, int],
    totals: Counter[str],
    seconds: float,
) -> None:
    print()
    for folder, code in codes.items():
        if code not in (0, 5):
            print(f"FAILED {folder} (exit code {code})")
    done = f"{len(codes)} of {len(folders)} folders"
    if config.option.collectonly:
        print(f"{done}: {totals['collected']} tests collected in {seconds:.1f}s")
        return
    counts = ", ".join(f"{totals[kind]} {kind}" for kind in SHOWN if totals[kind])
    print(f"{done}: {counts or 'no tests ran'} in {seconds:.1f}s", flush=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Leave the counts of this folder for the process that started it."""
    if not (path := os.environ.get(TALLY_VARIABLE)):
        return
    counts = {kind: len(found) for kind, found in terminalreporter.stats.items() if kind}
    counts["collected"] = getattr(terminalreporter, "_numcollected", 0)
    Path(path).write_text(json.dumps(counts), encoding="utf-8")


# --- for the tests of every folder ------------------------------------------------------------


def pytest_configure() -> None:
    """Make Ctrl-C work in what the tests start, also under a shell's `&`, which has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in an empty directory."""
    monkeypatch.chdir(tmp_path)


class Needs:
    """What a test cannot do without: it skips with the reason here, and fails where CI is set."""

    def package(self, name: str, file: str = "requirements-dev.txt") -> Any:
        """The imported package."""
        try:
            return importlib.import_module(name)
        except ImportError:
            return self._missing(f"needs the package {name}: pip install -r {file}")

    def server(self, what: str, port: int, host: str = "127.0.0.1") -> tuple[str, int]:
        """The address of a server that listens on loopback."""
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            self._missing(f"needs {what} on {host}:{port}: docker compose up -d")
        return host, port

    def _missing(self, reason: str) -> None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def needs() -> Needs:
    """`needs.package("duckdb")`, `needs.server("PostgreSQL", 5432)`."""
    return Needs()
