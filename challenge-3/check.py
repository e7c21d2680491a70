"""Check plugin files without starting anything: `python check.py my_plugin.py`.

Prints every violation of every class in the files, `file:line` first, and exits with 1 when there
is one; nothing is registered.
"""

import argparse
import logging
import sys
from pathlib import Path

from admission import collecting
from loading import PluginLoader
from probing import Probe
from registry import Plugin, Registry
from violations import ContractViolationError

LOAD_SECONDS = 10.0


def check(path: Path, say: list[str]) -> bool:
    """Whether all classes of the file keep their contracts; what is wrong is added to `say`."""
    found: list[Plugin | ContractViolationError] = []
    loader = PluginLoader(Registry(), path.parent, Probe(LOAD_SECONDS))
    token = collecting.set(found)
    try:
        failure = loader.read_alone(path)
    finally:
        loader.close()
        collecting.reset(token)
    errors = [each for each in found if isinstance(each, ContractViolationError)]
    plugins = [each for each in found if isinstance(each, Plugin)]
    for error in errors:
        for violation in error.violations:
            first, *rest = str(violation).split("\n")
            code = first.partition("  at ")[0]
            say.append(f"{violation.location}: {error.cls_name}: {code}")
            say.extend(rest)
    if failure is not None:
        where = f"{path}:{failure.line}" if failure.line else str(path)
        say.append(f"{where}: failed in phase {failure.phase}: {failure.error}")
    if errors or failure is not None:
        return False
    names = ", ".join(f"{plugin.name} {plugin.version}" for plugin in plugins)
    say.append(f"{path}: {names or 'no plugins'}: all contracts kept")
    return True


def main(arguments: list[str] | None = None) -> int:
    """0: all kept; 1: something is wrong; 2: called the wrong way."""
    parser = argparse.ArgumentParser(
        description="Check plugin files against their contracts, without starting anything.",
        epilog="Example: python check.py plugins/my_plugin.py",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files: list[Path] = parser.parse_args(arguments).files
    for path in files:
        if not path.is_file():
            print(f"{path}: there is no such file", file=sys.stderr)
            return 2
    logging.disable()  # what the loader would log is printed as a violation
    said: list[str] = []
    good = [check(path.absolute(), said) for path in files]
    print("\n".join(said))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
