"""Files of the drop-in directory: whole or not at all, and never the end of the app."""

import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loading import EntryPoints, LoadError, PluginLoader
from models import FailedPlugin
from probing import DoesNotLoad, Probe
from registry import Failure
from utils import Processor, Registry, get_all_plugins, registry

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parent.parent
GOOD = """
from utils import Processor

class {name}(Processor[int, int]):
    version = "{version}"

    def process(self, data: int) -> int:
        return data + {step}
"""


def good(name: str = "Adds", version: str = "1.0.0", step: int = 1) -> str:
    return GOOD.format(name=name, version=version, step=step)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "dropped"
    path.mkdir()
    return path


@pytest.fixture
def loader(directory: Path) -> Any:
    loader = PluginLoader(registry, directory)
    yield loader
    loader.close()
    registry.failures.clear()


HOSTILE = {
    "syntax": ("x = (\n", "compile", 1),
    "null": ("x = 1\n\0", "compile", None),
    "deep": ("x = " + "(" * 5000, "compile", None),
    "missing": ("import nothing_like_this\n", "import", 1),
    "leaves": ("import sys\nsys.exit(3)\n", "import", 2),
    "interrupts": ("\n\nraise KeyboardInterrupt\n", "import", 3),
    "recursion": ("def f():\n    f()\nf()\n", "import", 2),
    "mute": ("class E(Exception):\n    def __str__(self): 1/0\nraise E\n", "import", 3),
    "unspeakable": ("class E(BaseException):\n    def __str__(self): raise SystemExit\nraise E\n",
                    "import", 3),
    "masked": ("class E(BaseException):\n    @property\n    def __class__(self): raise SystemExit\n"
               "raise E\n", "import", None),
    "nameless": ("class M(type):\n    @property\n    def __name__(cls): raise SystemExit\n"
                 "class E(BaseException, metaclass=M): ...\nraise E\n", "import", 5),
    "nowhere": ("raise SyntaxError('x', (__file__, 10**9, 1, ''))\n", "import", None),
    "surrogate": ("raise ValueError('\\ud800')\n", "import", 1),
    "stops": ("raise StopIteration\n", "import", 1),
    "half": (good("Half") + "\nraise ValueError('after half')\n", "import", 10),
    "contract": ("from utils import Processor\nclass Broken(Processor[int, int]):\n"
                 "    def process(self, payload): ...\n", "contract", 3),
}  # fmt: skip


class TestHostileFiles:
    def test_good_ones_are_loaded_beside_hostile_ones_which_are_listed(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        for name, (text, _, _) in HOSTILE.items():
            (directory / f"{name}.py").write_text(text)
        (directory / "bytes.py").write_bytes(b"\xff\xfe\x00\x00")
        (directory / "adds.py").write_text(good())
        (directory / "zebra.py").write_text(good("Zebra"))

        report = loader.load()

        assert report.loaded == ["adds.py", "zebra.py"]
        assert registry.create("Adds", Processor).process(1) == 2
        found = {failure.file: failure for failure in report.failed}
        assert len(found) == len(HOSTILE) + 1
        for name, (_, phase, line) in HOSTILE.items():
            failure = found[f"{name}.py"]
            assert failure.phase == phase, failure
            if line:
                assert failure.line == line, failure
            assert failure.error
            assert str(directory) not in failure.error
            assert FailedPlugin(**asdict(failure)).model_dump_json()
        assert "Half" not in registry
        assert not [key for key in registry._meters if key[0] in ("Half", "Broken")]
        assert not [m for m in sys.modules if m.startswith("_c3_plugins.half")]

    def test_what_its_threads_define_is_not_registered_either(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        (directory / "threads.py").write_text(
            "import threading\nfrom utils import PluginBase\ntold = []\n"
            "def work():\n"
            "    try:\n"
            "        class Half(PluginBase):\n"
            "            def process(self, data): ...\n"
            "    except TypeError as error:\n"
            "        told.append(error.violations[0].code)\n"
            "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
            "raise ValueError(told)\n"
        )

        (failure,) = loader.load().failed

        assert failure.error == "ValueError: ['C140']"
        assert len(registry) == 0

    @pytest.mark.parametrize(
        "text",
        [
            "import dataclasses\n"
            "make = dataclasses.make_dataclass\n"
            "make('Made', [], bases=(PluginBase,), namespace={'process': process})\n",
            "type(PluginBase)('Made', (PluginBase,), {'process': process, '__module__': 'odd'})\n",
            "class Made(PluginBase):\n    __module__ = 'odd'\n    process = process\n",
        ],
        ids=["make_dataclass", "metaclass", "module"],
    )
    def test_however_a_class_is_made_it_comes_and_goes_with_the_file(
        self, directory: Path, loader: PluginLoader, text: str
    ) -> None:
        path = directory / "made.py"
        path.write_text("from utils import PluginBase\ndef process(self, data): ...\n" + text)
        assert loader.load().loaded == ["made.py"]
        registry.reload("Made")

        path.unlink()
        loader.load()

        assert len(registry) == 0

    def test_a_class_of_a_module_that_it_imports_stays(
        self, directory: Path, loader: PluginLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "shared_by_files.py").write_text(good("Shared"))
        path = directory / "uses.py"
        path.write_text("import shared_by_files\n" + good())
        loader.load()
        registry.reload("Adds")

        path.unlink()
        loader.load()

        assert [plugin.name for plugin in registry.snapshot()] == ["Shared"]

    def test_a_real_interrupt_is_not_swallowed(self, directory: Path) -> None:
        (directory / "waits.py").write_text(
            "import time\nprint('in', flush=True)\ntime.sleep(60)\n"
        )
        code = (
            "import loading, utils, pathlib\n"
            f"loading.PluginLoader(utils.registry, pathlib.Path({str(directory)!r})).load()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout
        assert process.stdout.readline() == b"in\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert b"KeyboardInterrupt" in stderr

    def test_files_that_are_not_trusted_are_refused(
        self, directory: Path, loader: PluginLoader, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside.py"
        outside.write_text(good("Outside"))
        (directory / "link.py").symlink_to(outside)
        (directory / "open.py").write_text(good("Open"))
        (directory / "open.py").chmod(0o666)
        (directory / "large.py").write_text("#" * 1_100_000)
        (directory / "folder.py").mkdir()
        (directory / "dangling.py").symlink_to(tmp_path / "nothing.py")

        report = loader.load()

        assert {(f.file, f.phase) for f in report.failed} == {
            (name, "read")
            for name in ("link.py", "open.py", "large.py", "folder.py", "dangling.py")
        }
        directory.chmod(0o777)
        assert [f.phase for f in loader.load().failed] == ["read"]
        assert PluginLoader(Registry(), tmp_path / "absent").load().failed[0].phase == "read"

    def test_underscores_and_the_package_file_are_no_plugins(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        (directory / "_template.py").write_text(good())
        (directory / "__init__.py").write_text("1/0")

        report = loader.load()

        assert (report.loaded, report.failed) == ([], [])

    def test_a_file_cannot_hide_an_installed_module(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        (directory / "json.py").write_text(good("Json"))
        loader.load()
        import json

        assert json.dumps({}) == "{}"
        assert "Json" in registry


DEADLY = {
    "exits": ("import os\nos._exit(0)\n", "ends the process that imports it (exit code 0)", None),
    "fails": ("import os\nos._exit(3)\n", "ends the process that imports it (exit code 3)", None),
    "crashes": ("import ctypes\nctypes.string_at(0)\n",
                "ends the process that imports it (SIGSEGV)", None),
    "kills": ("import os\nos.kill(0, 9)\n", "ends the process that imports it (SIGKILL)", None),
    "loops": ("x = 1\nwhile True:\n    x += 1\n", "did not end within 0.3 s", (2, 3)),
    "sleeps": ("import time\n\n\ntime.sleep(9999)\n", "did not end within 0.3 s", (4,)),
    "orphans": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n"
                "    time.sleep(9)\nos._exit(1)\n",
                "ends the process that imports it (exit code 1)", None),
}  # fmt: skip


class TestFilesThatNeverEnd:
    """They run in another process first, which may die."""

    @pytest.mark.parametrize("name", DEADLY)
    def test_one_that_ends_the_process_or_hangs_is_listed(self, directory: Path, name: str) -> None:
        text, error, lines = DEADLY[name]
        (directory / f"{name}.py").write_text(text)
        loader = PluginLoader(registry, directory, Probe(0.3))
        try:
            (failure,) = loader.load().failed
        finally:
            loader.close()

        assert (failure.file, failure.phase, failure.error) == (f"{name}.py", "import", error)
        assert failure.line in (lines or (None,))

    def test_what_is_right_loads_and_what_raises_is_told_by_the_loader(
        self, directory: Path
    ) -> None:
        (directory / "adds.py").write_text("import os\nos.write(1, b'{}')\n" + good())
        (directory / "raises.py").write_text("\nraise SystemExit(3)\n")
        probe = Probe(30)
        loader = PluginLoader(registry, directory, probe)
        try:
            report = loader.load()
            assert report.loaded == ["adds.py"]
            assert [(f.file, f.phase, f.line) for f in report.failed] == [
                ("raises.py", "import", 2)
            ]
            probe.close()  # as an idle helper does by itself
            registry.reload("Adds")
            (directory / "adds.py").write_text("import os\nos._exit(1)\n")
            with pytest.raises(LoadError, match="keeps serving"):
                registry.reload("Adds")
            assert registry.create("Adds", Processor).process(1) == 2
        finally:
            loader.close()

    def test_a_file_that_still_runs_does_not_outlive_the_loader(self, directory: Path) -> None:
        number = directory / "pid"
        text = f"import os\nopen({str(number)!r}, 'w').write(str(os.getpid()))\nwhile True: pass\n"
        probe = Probe(60)
        (directory / "loops.py").write_text(text)
        told: list[str] = []

        def ask() -> None:
            try:
                probe.check(directory / "loops.py", text.encode())
            except DoesNotLoad as error:
                told.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        while not number.exists() or not number.read_text():
            time.sleep(0.01)
        pid = int(number.read_text())

        probe.close()

        asking.join()
        assert told == ["was not tried: the process for that has ended"]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_the_app_comes_up_beside_them(self, make_server: Any) -> None:
        server = make_server()
        server.write("exits.py", "import os\nos._exit(1)\n")
        server.write("loops.py", "while True:\n    pass\n")
        server.write("zebra.py", good("Zebra"))

        server.start(LOAD_TIMEOUT_SECONDS="3")

        assert server.post("/plugins/Zebra/process", 1).json() == 2
        failed = {entry["file"]: entry for entry in server.get("/plugins/failed")}
        assert sorted(failed) == ["exits.py", "loops.py"]
        assert failed["loops.py"]["error"] == "did not end within 3 s"


class TestReload:
    def test_a_change_of_the_same_size_in_the_same_second_is_seen(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        path = directory / "adds.py"
        for step in (1, 2, 3):
            path.write_text(good(step=step))
            os.utime(path, (1_700_000_000, 1_700_000_000))
            loader.load()
            assert registry.create("Adds", Processor).process(0) == step
            assert (
                registry.plugin("Adds").code_hash == hashlib.sha256(path.read_bytes()).hexdigest()
            )
        assert loader.load().unchanged == ["adds.py"]

    @pytest.mark.parametrize("broken", [good().replace("data:", "payload:"), "x = (", "1/0"])
    def test_a_failing_reload_keeps_the_old_version(
        self, directory: Path, loader: PluginLoader, broken: str
    ) -> None:
        path = directory / "adds.py"
        path.write_text(good())
        loader.load()
        old = registry.get("Adds")
        path.write_text(broken)

        with pytest.raises(LoadError, match=r"adds.py failed in phase"):
            registry.reload("Adds")

        assert registry.get("Adds") is old
        assert registry.create("Adds", Processor).process(1) == 2
        assert registry.failures["adds.py"].file == "adds.py"
        assert loader.load().failed
        path.write_text(good(step=5))
        registry.reload("Adds")
        assert registry.create("Adds", Processor).process(1) == 6
        assert "adds.py" not in registry.failures

    def test_counts_go_on_over_a_reload(self, directory: Path, loader: PluginLoader) -> None:
        (directory / "adds.py").write_text(good())
        loader.load()
        old = registry.create("Adds", Processor)
        old.process(1)

        registry.reload("Adds")
        old.process(1)
        registry.create("Adds", Processor).process(1)

        assert registry.plugin("Adds").figures()["process"].calls == 3

    def test_versions_that_a_file_no_longer_has_are_gone_and_dead(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        path = directory / "adds.py"
        path.write_text(good(version="1.0.0"))
        loader.load()
        gone = weakref.ref(registry.get("Adds"))
        path.write_text(good(version="2.0.0"))

        loader.load()

        assert registry.versions("Adds") == ["2.0.0"]
        gc.collect()
        assert gone() is None
        path.unlink()
        assert loader.load().removed == ["adds.py"]
        assert "Adds" not in registry
        assert not [m for m in sys.modules if m.startswith("_c3_plugins.adds")]

    def test_a_key_of_another_file_is_refused_naming_both(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        (directory / "a.py").write_text(good())
        (directory / "b.py").write_text(good("Fine") + good())

        report = loader.load()

        assert report.loaded == ["a.py"]
        assert report.failed[0].phase == "register"
        assert "a.py:4" in report.failed[0].error
        assert "b.py:12" in report.failed[0].error
        assert "Fine" not in registry

    def test_a_disabled_plugin_stays_disabled(self, directory: Path, loader: PluginLoader) -> None:
        (directory / "adds.py").write_text(good())
        loader.load()
        registry.disable("Adds")

        registry.reload("Adds")

        assert get_all_plugins() == [] or registry.find("Adds").state.value == "disabled"
        assert registry.find("Adds").state.value == "disabled"

    def test_instances_of_dropped_in_classes_can_be_pickled(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        (directory / "adds.py").write_text(good())
        loader.load()
        cls = registry.get("Adds")
        assert type(pickle.loads(pickle.dumps(cls()))) is cls
        assert pickle.loads(pickle.dumps(cls.process)) is cls.process

    def test_fifty_reloads_under_load_fail_no_call(
        self, directory: Path, loader: PluginLoader
    ) -> None:
        path = directory / "adds.py"
        path.write_text(good(step=0))
        loader.load()
        stop = threading.Event()
        wrong: list[Any] = []
        calls = [0] * 4

        def call(number: int) -> None:
            while not stop.is_set():
                try:
                    plugin = registry.create("Adds", Processor)
                    step = plugin.process(0)
                    if step != plugin.process(0):
                        wrong.append("two versions in one instance")
                    calls[number] += 2
                except Exception as error:  # noqa: BLE001
                    wrong.append(error)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for step in range(1, 51):
            path.write_text(good(step=step))
            registry.reload("Adds")
        stop.set()
        for thread in threads:
            thread.join()

        assert wrong == []
        assert registry.create("Adds", Processor).process(0) == 50
        assert registry.plugin("Adds").figures()["process"].calls == sum(calls) + 1


def distribution(root: Path, name: str, module: str, text: str, points: str) -> None:
    (root / f"{module}.py").write_text(textwrap.dedent(text))
    info = root / f"{name.replace(chr(45), chr(95))}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[challenge3.plugins]\n{points}\n")


class TestEntryPoints:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        root = tmp_path / "site"
        root.mkdir()
        monkeypatch.syspath_prepend(str(root))
        return root

    def test_installed_plugins_are_imported_when_they_are_asked_for(self, root: Path) -> None:
        distribution(root, "dist-one", "ep_one", good("FromOne"), "one = ep_one:FromOne")
        distribution(root, "dist-two", "ep_two", good("FromTwo"), "two = ep_two:FromTwo")

        assert "FromOne" not in registry
        assert registry.create("FromOne", Processor).process(1) == 2
        assert "ep_one" in sys.modules
        assert "ep_two" not in sys.modules
        assert registry.plugin("FromOne").source.label == "dist-one 1.2"
        assert len(registry.plugin("FromOne").code_hash) == 64
        with pytest.raises(LookupError, match="dist-one"):
            registry.reload("FromOne")

    @pytest.mark.parametrize("name", DEADLY)
    def test_one_that_ends_the_process_or_hangs_is_listed(self, root: Path, name: str) -> None:
        text, error, lines = DEADLY[name]
        distribution(root, "dist-deadly", f"ep_{name}", text, f"{name} = ep_{name}:Any")
        distribution(root, "dist-fine", f"ep_fine_{name}", good(), f"fine = ep_fine_{name}:Adds")
        points = EntryPoints(registry)
        points.probe = Probe(0.3)
        try:
            points.load_all()
        finally:
            points.probe.close()

        failure = registry.failures[f"{name} of dist-deadly 1.2"]
        assert (failure.name, failure.error) == (name, f"dist-deadly 1.2: {error}")
        assert failure.line in (lines or (None,))
        assert registry.create("Adds", Processor).process(1) == 2

    def test_the_app_answers_beside_them(self, root: Path, make_server: Any) -> None:
        distribution(root, "dist-exits", "ep_exits", "import os\nos._exit(1)\n", "a = ep_exits:A")
        distribution(root, "dist-loops", "ep_loops", "\nwhile True:\n    pass\n", "b = ep_loops:B")
        distribution(root, "dist-fine", "ep_fine", good("Fine"), "fine = ep_fine:Fine")
        server = make_server().start(PYTHONPATH=str(root), LOAD_TIMEOUT_SECONDS="1")

        assert server.get("/plugins/failed") == []
        assert server.post("/plugins/Fine/process", 1).json() == 2
        assert server.post("/plugins/Nothing/process", 1).status_code == 404
        failed = {entry["name"]: entry for entry in server.get("/plugins/failed")}
        assert failed["a"]["error"] == (
            "dist-exits 1.2: ends the process that imports it (exit code 1)"
        )
        assert failed["b"]["error"] == "dist-loops 1.2: did not end within 1 s"
        assert failed["b"]["line"] in (2, 3)

    @pytest.mark.parametrize(
        ("points", "name", "told"),
        [
            ("bad = not a valid!!", "bad", "is no module:attribute"),
            ("bad =", "bad", "is no module:attribute"),
            ("no equals sign", "entry_points.txt", "TypeError"),
        ],
    )
    def test_broken_metadata_of_one_hides_no_other(
        self, root: Path, points: str, name: str, told: str
    ) -> None:
        distribution(root, "dist-bad", "ep_odd", "", points)
        distribution(root, "dist-fine", "ep_beside", good("Beside"), "beside = ep_beside:Beside")
        sys.modules.pop("ep_beside", None)
        found = EntryPoints(registry)

        found.load_all()

        assert "Beside" in registry
        assert told in registry.failures[f"{name} of dist-bad 1.2"].error
        assert not found.resolve("Nothing")

    @pytest.mark.parametrize(
        ("text", "line"),
        [("\nraise KeyboardInterrupt", 2), ("\n\nx = (", 3), ("import json\njson.loads('')", 2),
         (good("Odd").replace("data:", "payload:"), 7)],
    )  # fmt: skip
    def test_what_it_raises_is_listed_with_its_line(self, root: Path, text: str, line: int) -> None:
        distribution(root, "dist-bad", "ep_raises", text, "bad = ep_raises:Bad")

        EntryPoints(registry).load_all()

        failure = registry.failures["bad of dist-bad 1.2"]
        assert (failure.phase, failure.line) == ("entry point", line)
        assert str(root) not in failure.error

    def test_one_that_fails_is_listed_with_its_distribution(self, root: Path) -> None:
        distribution(root, "dist-bad", "ep_bad", "raise SystemExit(1)", "bad = ep_bad:Bad")
        distribution(root, "dist-same", "ep_same", good("Same"), "same = ep_same:Same")
        distribution(root, "dist-same2", "ep_same2", good("Same"), "same2 = ep_same2:Same")
        points = EntryPoints(registry)

        points.load_all()

        failures: dict[str, Failure] = registry.failures
        try:
            assert "SystemExit" in failures["bad of dist-bad 1.2"].error
            assert failures["bad of dist-bad 1.2"].phase == "entry point"
            clash = next(f for key, f in failures.items() if key.startswith("same"))
            assert "ep_same.py:4" in clash.error
            assert "ep_same2.py:4" in clash.error
            assert registry.versions("Same") == ["1.0.0"]
        finally:
            registry.failures.clear()

    def test_unknown_names_cost_no_scan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.metadata

        points = EntryPoints(registry)
        points.pending()
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: 1 / 0)
        assert not points.resolve("Nothing")
