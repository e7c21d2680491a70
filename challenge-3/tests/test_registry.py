"""Versions side by side, and who serves under a name."""

import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from registry import State
from utils import (
    ContractEnforcerMeta,
    ContractViolationError,
    PluginBase,
    PluginDisabledError,
    Processor,
    Registry,
    Transformer,
    UnknownPluginError,
    WrongKindError,
    get_all_plugins,
    registry,
)
from versions import parse_version

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parent.parent


def define(name: str, version: str = "1.0.0", **body: Any) -> Any:
    body.setdefault("process", lambda self, data: data)
    return ContractEnforcerMeta(name, (PluginBase,), {"version": version, **body})


class TestVersions:
    def test_the_highest_release_is_the_default(self) -> None:
        for version in ("1.9.0", "1.10.0", "2.0.0-rc.1", "1.2.0"):
            define("P", version)

        assert registry.versions("P") == ["1.2.0", "1.9.0", "1.10.0", "2.0.0-rc.1"]
        assert registry.get("P").version == "1.10.0"
        assert registry.get("P", "2.0.0-rc.1").version == "2.0.0-rc.1"

    def test_a_pre_release_is_the_default_only_alone(self) -> None:
        define("P", "1.0.0-alpha.2")
        define("P", "1.0.0-alpha.10")

        assert registry.get("P").version == "1.0.0-alpha.10"
        define("P", "0.1.0")
        assert registry.get("P").version == "0.1.0"

    def test_precedence_is_that_of_the_specification(self) -> None:
        ladder = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
                  "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.1.0", "2.0.0"]  # fmt: skip
        versions: Any = [parse_version(text) for text in ladder]
        assert versions == sorted(versions)
        assert parse_version("1.0.0+a") == parse_version("1.0.0+b")

    def test_build_metadata_makes_no_other_version(self) -> None:
        define("P", "1.0.0+a")
        with pytest.raises(ContractViolationError, match="C140"):
            define("P", "1.0.0+b")

    def test_a_pin_holds_until_it_is_let_go_or_gone(self) -> None:
        define("P", "1.0.0")
        define("P", "2.0.0")

        registry.use_default("P", "1.0.0")
        assert registry.get("P").version == "1.0.0"
        define("P", "3.0.0")
        assert registry.get("P").version == "1.0.0"
        registry.use_default("P", None)
        assert registry.get("P").version == "3.0.0"
        registry.use_default("P", "1.0.0")
        registry.unregister("P", "1.0.0")
        assert registry.get("P").version == "3.0.0"
        with pytest.raises(UnknownPluginError):
            registry.use_default("P", "9.9.9")


class TestIdentity:
    def test_a_second_class_is_refused_naming_both_places(self) -> None:
        class One(PluginBase, name="same"):
            def process(self, data: Any) -> Any: ...

        with pytest.raises(ContractViolationError) as caught:

            class Two(PluginBase, name="same"):
                def process(self, data: Any) -> Any: ...

        text = str(caught.value)
        lines = [place.rpartition(":")[2] for place in text.split() if "test_registry.py:" in place]
        assert len(set(lines)) == 2
        assert "One" in text
        assert registry.get("same") is One

    def test_the_same_class_in_a_notebook_replaces(self) -> None:
        code = textwrap.dedent("""
            from utils import Processor, registry
            for step in (1, 2):
                exec('''class P(Processor[int, int]):
                    step = STEP
                    def process(self, data: int) -> int:
                        return data * self.step'''.replace("STEP", str(step)), globals())
                assert registry.create("P", Processor).process(2) == 2 * step
            assert registry.versions("P") == ["0.0.0"]
            assert registry.get("P") is P
            try:
                class Q(Processor[int, int], name="P"):
                    def process(self, data: int) -> int:
                        return data
            except TypeError as error:
                print("refused", "C140" in str(error))
        """)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.stdout == "refused True\n", done.stderr

    def test_another_version_lives_beside_it(self) -> None:
        one, two = define("P", "1.0.0"), define("P", "2.0.0")
        assert (registry.get("P", "1.0.0"), registry.get("P")) == (one, two)


class TestAsking:
    def test_an_unknown_name_is_told_near_ones(self) -> None:
        define("Normalise")
        with pytest.raises(UnknownPluginError, match="Normalise"):
            registry.get("Normalize")
        with pytest.raises(KeyError, match=r"there are: 1\.0\.0"):
            registry.get("Normalise", "3.0.0")

    def test_another_kind_raises(self) -> None:
        class P(Processor[int, int]):
            def process(self, data: int) -> int:
                return data

        assert registry.create("P", Processor).process(1) == 1
        assert get_all_plugins(Processor[int, int]) == [P]
        assert isinstance(registry.create("P", P, "0.0.0"), P)
        with pytest.raises(WrongKindError, match="is no Transformer"):
            registry.create("P", Transformer)
        with pytest.raises(TypeError):
            registry.create("P", int)

    def test_a_disabled_one_refuses_and_comes_back(self) -> None:
        cls = define("P")
        registry.disable("P")

        with pytest.raises(PluginDisabledError, match="disabled"):
            registry.get("P")
        assert cls not in get_all_plugins()
        assert cls in get_all_plugins(include_disabled=True)
        registry.enable("P")
        assert registry.get("P") is cls

    def test_what_was_defined_in_process_cannot_be_reloaded(self) -> None:
        define("P")
        with pytest.raises(LookupError, match="running module"):
            registry.reload("P")

    def test_listeners_hear_what_happens(self) -> None:
        heard: list[tuple[str, str]] = []
        end = registry.subscribe(lambda event: heard.append((event[0], event[1].name)))

        define("P")
        registry.disable("P")
        registry.unregister("P")
        end()
        define("P")

        assert heard == [("added", "P"), ("changed", "P"), ("removed", "P")]


class TestLife:
    def test_what_was_unregistered_dies(self) -> None:
        class P(Processor[int, int]):
            def process(self, data: int) -> int:
                return data

        P().process(1)
        gone = weakref.ref(P)
        registry.unregister("P")
        del P
        gc.collect()

        assert gone() is None
        assert "P" not in registry

    def test_a_plugin_that_serves_is_kept_until_the_call_ends(self) -> None:
        define("P")
        plugin = registry.plugin("P")
        with registry.serving(plugin):
            registry.unregister("P")
            assert plugin.state.name == "DRAINING"
        assert plugin.state is State.UNLOADED

    def test_a_transaction_commits_all_or_nothing(self) -> None:
        with pytest.raises(ZeroDivisionError), registry.transaction():
            define("P")
            assert "P" not in registry
            raise ZeroDivisionError
        assert "P" not in registry
        with registry.transaction():
            define("P")
            define("Q")
        assert "P" in registry
        with pytest.raises(ContractViolationError), registry.transaction():
            define("R")
            define("Q")
        assert "R" not in registry

    def test_readers_never_see_a_half_written_family(self) -> None:
        define("P", "1.0.0")
        stop = threading.Event()
        wrong: list[Any] = []

        def read() -> None:
            while not stop.is_set():
                try:
                    if registry.get("P").version not in ("1.0.0", "2.0.0"):
                        wrong.append("version")
                    registry.versions("P")
                    registry.snapshot()
                except Exception as error:  # noqa: BLE001
                    wrong.append(error)

        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        for _ in range(200):
            define("P", "2.0.0")
            registry.unregister("P", "2.0.0")
        stop.set()
        for reader in readers:
            reader.join()

        assert wrong == []

    def test_two_threads_that_race_for_a_key_leave_one_winner(self) -> None:
        for _ in range(20):
            barrier = threading.Barrier(4)
            outcomes: list[bool] = []

            def race(barrier: threading.Barrier = barrier, told: Any = outcomes) -> None:
                barrier.wait()
                try:
                    define("Raced")
                    told.append(True)
                except ContractViolationError:
                    told.append(False)

            racers = [threading.Thread(target=race) for _ in range(4)]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join()
            assert sorted(outcomes) == [False, False, False, True]
            registry.unregister("Raced")


def test_an_own_registry_is_empty() -> None:
    assert len(Registry()) == 0
