"""Promises about the repository as a whole."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
FOLDERS = sorted(path.parent for path in ROOT.glob("challenge-*/app.py"))
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()
]  # fmt: skip


def sources(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_folder_has_what_the_card_promises(folder: Path) -> None:
    for name in ("app.py", "utils.py", "web.py", "README.md", "demo_test.py", "tests"):
        assert (folder / name).exists(), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_folder_imports_or_names_another(folder: Path) -> None:
    others = [other.name for other in FOLDERS if other != folder]
    for path in sources(folder):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in others if name in text], path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_module_hides_another(folder: Path) -> None:
    installed = {"conftest"} | set(sys.stdlib_module_names)
    for path in folder.glob("*.py"):
        assert path.stem not in installed, path
        found = importlib.util.find_spec(path.stem)
        assert found is None or Path(str(found.origin)).parent in (ROOT, folder), path
    for path in (folder / "tests").glob("*.py"):
        assert not (folder / path.name).exists(), path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_conftests_import_the_folder_inside_fixtures_only(folder: Path) -> None:
    own = {path.stem for path in folder.glob("*.py")}
    for path in folder.rglob("conftest.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )  # fmt: skip
            assert own.isdisjoint(names), path


def test_what_every_app_shows_the_world_is_the_same_everywhere() -> None:
    assert len({(folder / "web.py").read_bytes() for folder in FOLDERS}) == 1


def test_the_folders_share_settings_names_with_the_example_file() -> None:
    example = set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.M))
    fields = set()
    for folder in FOLDERS:
        tree = ast.parse((folder / "settings.py").read_text(encoding="utf-8"))
        (settings,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Settings"]
        fields |= {
            node.target.id.upper()
            for node in settings.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    assert fields <= example
    assert example - fields <= {"CI"}


def test_every_pinned_version_satisfies_its_bound_and_names_no_host() -> None:
    pinned = dict(
        line.split(" ;")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name in ("requirements.txt", "requirements-services.txt", "requirements-dev.txt"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        for line in text.splitlines():
            if match := re.match(r"([A-Za-z0-9-]+)(\[.*\])?>=", line):
                assert match[1].lower() in pinned, line
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_links_between_the_documents_lead_somewhere() -> None:
    for path in TRACKED:
        if path.suffix != ".md" or not path.exists():
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_no_file_names_a_place_on_the_machine_it_was_written_on() -> None:
    suspicious = re.compile("/" + "work/|/" + "tmp/v3|/" + r"root/\.")
    for path in TRACKED:
        if path.suffix in (".py", ".md", ".txt", ".toml", ".ini", ".yml", ".yaml", ""):
            assert not suspicious.search(path.read_text(encoding="utf-8", errors="ignore")), path


def test_the_lint_rules_carry_reasons() -> None:
    text = (ROOT / "ruff.toml").read_text(encoding="utf-8")
    tomllib.loads(text)
    inside = text.split("ignore = [")[1].split("]")[0]
    assert all("#" in line for line in inside.strip().splitlines())


# --- pytest works everywhere ------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small copy of the layout: two folders with modules of the same names."""
    root = tmp_path_factory.mktemp("repository")
    (root / "conftest.py").write_text((ROOT / "conftest.py").read_text(encoding="utf-8"))
    for name in ("pytest.ini", "run_tests.py"):
        (root / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    (root / "root_test.py").write_text("def test_root(): pass\n")
    for name in ("challenge-1", "challenge-2"):
        folder = root / name
        (folder / "tests").mkdir(parents=True)
        (folder / "app.py").write_text("import utils\n")
        (folder / "utils.py").write_text(f"NAME = {name!r}\ndef double(x): return x * 2\n")
        (folder / "demo_test.py").write_text(
            "import sys, pytest, app, utils\n"
            f"def test_demo(): assert app.utils.NAME == {name!r}\n"
            "if __name__ == '__main__': sys.exit(pytest.main([__file__]))\n"
        )
        (folder / "tests" / "test_parts.py").write_text(
            "import multiprocessing, pytest, utils\n"
            f"def test_own_module(): assert utils.NAME == {name!r}\n"
            "def test_spawn():\n"
            "    if utils.NAME == 'challenge-2':\n"
            "        return\n"
            "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
            "        assert pool.map(utils.double, [2]) == [4]\n"
            "@pytest.mark.unit\n"
            f"def test_only_{name[-1]}(): pass\n"
        )
    return root


def run(root: Path, *arguments: str, cwd: str = ".") -> tuple[int, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    environment.pop("FOLDER_TALLY", None)
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # fewer imports, three times as quick
    done = subprocess.run(
        [sys.executable, "-m", *arguments] if arguments[0] == "pytest"
        else [sys.executable, *arguments],
        cwd=root / cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, (done.stdout.strip().splitlines() or [done.stderr])[-1]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "cwd", "code", "ending"),
    [
        (("pytest",), ".", 0, "3 of 3 folders: 9 passed"),
        (("pytest", "-q", "challenge-1/", "./challenge-2"), ".", 0, "2 of 2 folders: 8 passed"),
        (("pytest", "challenge-1"), ".", 0, "4 passed"),
        (("pytest", "-q", "tests"), "challenge-2", 0, "3 passed"),
        (("pytest", "-q", "demo_test.py"), "challenge-1", 0, "1 passed"),
        (("demo_test.py",), "challenge-1", 0, "1 passed"),
        (("pytest", "challenge-1/tests/test_parts.py::test_own_module"), ".", 0, "1 passed"),
        (("pytest", "../challenge-1", "tests"), "challenge-2", 0, "2 of 2 folders: 7 passed"),
        (("pytest", "-k", "only_2"), ".", 0, "3 of 3 folders: 1 passed, 8 deselected"),
        (("pytest", "-k", "nothing_at_all"), ".", 5, "9 deselected"),
        (("pytest", "-m", "unit"), ".", 0, "2 passed"),
        (("run_tests.py", "--unit"), ".", 0, "2 passed"),
        (("run_tests.py", "--unit", "--webhook", "--pattern", "only_2", "--verbose"), ".", 0,
         "1 passed, 8 deselected"),
        (("pytest", "--collect-only", "-q"), ".", 0, "9 tests collected"),
        (("pytest", "--lf", "-q"), ".", 0, "9 passed"),
        (("pytest", "challenge-9"), ".", 4, ""),
        (("pytest", "challenge-1", "challenge-2", "-k", "challenge-1"), ".", 4, ""),
    ],
)  # fmt: skip
def test_pytest_is_called_as_anywhere_else(
    two_folders: Path, arguments: tuple[str, ...], cwd: str, code: int, ending: str
) -> None:
    found, last = run(two_folders, *arguments, cwd=cwd)

    assert found == code, last
    assert ending in last


@pytest.mark.integration
def test_a_failure_stops_the_other_folders_when_asked_and_is_named(two_folders: Path) -> None:
    bad = two_folders / "challenge-1" / "tests" / "test_bad.py"
    bad.write_text("def test_bad(): assert False\n")
    try:
        code, last = run(two_folders, "pytest", "-x", "-q")
        assert code == 1
        assert last.startswith("1 of 3 folders: 1 failed")
        code, last = run(two_folders, "pytest", "-q")
        assert code == 1
        assert last.startswith("3 of 3 folders: 1 failed, 9 passed")
    finally:
        bad.unlink()


@pytest.mark.integration
def test_coverage_of_all_folders_is_added_up(two_folders: Path, needs: Any) -> None:
    needs.package("pytest_cov")
    code, last = run(two_folders, "pytest", "-p", "pytest_cov", "--cov", "-q")

    assert code == 0
    assert "9 passed" in last


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_setting_that_cannot_be_used_ends_the_start_with_one_line(folder: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "app.py"],
        cwd=folder, env={**os.environ, "PORT": "hunter2", "LOG_LEVEL": "info"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("PORT cannot be used: ")
    assert "hunter2" not in line


@pytest.mark.integration
def test_a_demo_says_what_it_proved_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), "--mode", "lazy", "--quick", "--json"],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    claims = json.loads(done.stdout)["claims"]
    assert claims
    assert all(claim["passed"] and claim["figure"] for claim in claims)
    assert list(tmp_path.iterdir()) == []
