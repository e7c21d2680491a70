"""Shows what the folders can do, with figures: one mode per ability, all when none is named.

    python demo.py [--mode etl|webhook|performance|pipelines|queue|…] [--quick] [--json] [--seed N]

A mode is a row of MODES: its name and the folder whose `showcase.py` knows it. Each runs in a
process of its own (all folders have modules called `app` and `utils`) in an empty directory that
is removed afterwards. `showcase.py MODE` prints its progress on stderr and, on stdout, one JSON
object per claim: {"claim": …, "figure": …, "passed": …}. With --quick two modes run side by side;
otherwise each has the machine for itself, because its figures depend on it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
MODES = {
    "etl": "challenge-1",
    "webhook": "challenge-1",
    "performance": "challenge-1",
    "plugins": "challenge-3",
    "fetch": "challenge-1",
    "deliver": "challenge-1",
    "resilience": "challenge-1",
    "lazy": "challenge-4",
    "resources": "challenge-2",
    "scheduler": "challenge-5",
    "pipelines": "challenge-1",
    "queue": "challenge-1",
}
MODE_SECONDS = 120  # a mode that takes longer is ended and counts as failed


def main() -> int:
    """Run the modes asked for; 0 when every claim holds, else 1."""
    parser = argparse.ArgumentParser(
        description="Show what the folders can do, with figures.",
        epilog="Examples: python demo.py --quick   python demo.py --mode webhook --json",
    )
    parser.add_argument("--mode", choices=MODES, action="append", help="one ability (default: all)")
    parser.add_argument("--quick", action="store_true", help="small numbers, all modes in < 20 s")
    parser.add_argument("--json", action="store_true", help="print the claims as one JSON document")
    parser.add_argument("--seed", type=int, default=7, help="for everything generated (default: 7)")
    arguments = parser.parse_args()
    if arguments.quick and not arguments.json:
        print("Quick: the same claims on small numbers; run without --quick for real ones.")
    modes = list(arguments.mode or MODES)
    with ThreadPoolExecutor(2 if arguments.quick else 1) as side_by_side:
        found = side_by_side.map(partial(run_mode, arguments=arguments), modes)
        claims = [
            {"mode": mode, **claim}
            for mode, made in zip(modes, found, strict=True)
            for claim in made
        ]
    passed = bool(claims) and all(claim["passed"] for claim in claims)
    if arguments.json:
        print(json.dumps({"passed": passed, "quick": arguments.quick, "claims": claims}, indent=2))
    else:
        print_table(claims)
    return 0 if passed else 1


def run_mode(mode: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The claims of one mode; a mode that ends badly is itself a claim that failed."""
    folder = ROOT / MODES[mode]
    command = [sys.executable, str(folder / "showcase.py"), mode, "--seed", str(arguments.seed)]
    if arguments.quick:
        command.append("--quick")
    title = f"\n--- {mode} ({folder.name})"
    live = not (arguments.quick or arguments.json)  # side by side, each shows its lines at its end
    if live:
        print(title, flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                command,
                cwd=scratch,
                env={**os.environ, "PYTHONPATH": str(folder)},
                stdout=subprocess.PIPE,
                stderr=None if live else subprocess.PIPE,
                timeout=MODE_SECONDS,
                check=False,
                text=True,
            )
            code: int | str = done.returncode
            output, progress = done.stdout, done.stderr or ""
        except subprocess.TimeoutExpired:
            code, output, progress = f"none within {MODE_SECONDS} s", "", ""
    claims = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if code != 0 or not claims:
        claims.append(
            {"claim": f"{mode} runs to its end", "figure": f"exit code {code}", "passed": False}
        )
    if not arguments.json:
        shown = "" if live else f"{title}\n{progress}"
        print(f"{shown}    {time.monotonic() - started:.1f} s", flush=True)
    return claims


def print_table(claims: list[dict[str, Any]]) -> None:
    """The claims, their figures and whether they hold."""
    rows = [("mode", "claim", "figure", "")]
    rows += [
        (c["mode"], c["claim"], str(c["figure"]), "pass" if c["passed"] else "FAIL") for c in claims
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for number, row in enumerate(rows):
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
        if number == 0:
            print("  ".join("-" * width for width in widths).rstrip())
    failed = sum(not c["passed"] for c in claims)
    print(f"\n{len(claims) - failed} of {len(claims)} claims hold.")


if __name__ == "__main__":
    sys.exit(main())
