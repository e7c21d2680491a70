"""`python check.py FILE`: all violations of a file, without starting anything."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parent.parent


def check(*files: Path, cwd: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "check.py"), *map(str, files)],
        cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_all_violations_of_all_classes_are_printed(tmp_path: Path) -> None:
    path = tmp_path / "my_plugin.py"
    path.write_text(
        "from utils import APIContractBase, Processor, PluginBase\n"
        "class First(Processor[int, int]):\n"
        "    version = '1.0'\n"
        "    def process(self, payload: int) -> int:\n"
        "        return payload\n"
        "class Good(PluginBase):\n"
        "    def process(self, data): ...\n"
        "class Second(APIContractBase):\n"
        "    version = '1.0.0'\n"
    )

    done = check(path, cwd=tmp_path)

    assert done.returncode == 1
    for text in (
        f"{path}:3: First: C130 version",
        f"{path}:4: First: C104 process",
        f"{path}:8: Second: C131 description",
        f"{path}:8: Second: C132 author",
        f"{path}:8: Second: C101 process",
        f"{path}:8: Second: C101 validate",
        "cure      Rename 'payload' to 'data'",
    ):
        assert text in done.stdout, done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", ":1: failed in phase compile"),
        ("\nimport nothing_like_this", ":2: failed in phase import: ModuleNotFoundError"),
        ("raise SystemExit", ":1: failed in phase import: SystemExit"),
        ("import os\nos._exit(0)\n", ": failed in phase import: ends the process that imports it"),
    ],
)
def test_a_file_that_does_not_run_is_told_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    done = check(path)
    assert done.returncode == 1
    assert f"{path}{said}" in done.stdout
    assert "Traceback" not in done.stdout
    assert done.stderr == ""


def test_good_files_pass_and_missing_ones_are_named(tmp_path: Path) -> None:
    done = check(FOLDER / "plugins" / "_template.py", FOLDER / "plugins" / "events.py")
    assert done.returncode == 0
    assert "MyPlugin 1.0.0: all contracts kept" in done.stdout
    done = check(tmp_path / "absent.py")
    assert done.returncode == 2
    assert "no such file" in done.stderr


def test_the_template_becomes_a_plugin_by_copying(tmp_path: Path) -> None:
    from loading import PluginLoader
    from utils import registry

    directory = tmp_path / "plugins"
    directory.mkdir()
    (directory / "mine.py").write_bytes((FOLDER / "plugins" / "_template.py").read_bytes())
    loader = PluginLoader(registry, directory)

    assert loader.load().loaded == ["mine.py"]
    assert "MyPlugin" in registry
    loader.close()


def test_from_plugins_import_works() -> None:
    code = (
        "from plugins import PluginBase, get_all_plugins\n"
        "class P(PluginBase):\n"
        "    def process(self, data): return data\n"
        "assert get_all_plugins() == [P], get_all_plugins()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
