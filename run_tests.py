"""A thin front of pytest: kinds of tests by marker, a pattern, and a coverage report.

python run_tests.py [--unit|--integration|--performance|--webhook] [--pattern P] [--report]
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
KINDS = ("unit", "integration", "performance", "webhook")


def main() -> int:
    """Translate the flags, and hand over to pytest."""
    parser = argparse.ArgumentParser(
        description="Run the tests of all folders.",
        epilog="Examples: python run_tests.py --unit   python run_tests.py --pattern dedupe -v",
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}", action="store_true", help=f"only tests marked {kind}")
    parser.add_argument("--pattern", metavar="P", help="only tests whose name matches (pytest -k)")
    parser.add_argument("--report", action="store_true", help="measure coverage, write htmlcov/")
    parser.add_argument("--verbose", "-v", action="store_true", help="one line per test")
    chosen = parser.parse_args()
    command = [sys.executable, "-m", "pytest"]
    if kinds := [kind for kind in KINDS if getattr(chosen, kind)]:
        command += ["-m", " or ".join(kinds)]
    if chosen.pattern:
        command += ["-k", chosen.pattern]
    if chosen.report:
        if importlib.util.find_spec("pytest_cov") is None:
            sys.exit("--report needs pytest-cov: pip install -r requirements-dev.txt")
        command += ["--cov", "--cov-report=term", "--cov-report=html"]
    if chosen.verbose:
        command.append("-v")
    return subprocess.call(command, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
