"""A tour of plugins under contract, to be read from top to bottom: `python demo_test.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

FOLDER = Path(__file__).resolve().parent
PLUGIN = """
from pydantic import BaseModel
from utils import Processor

class Order(BaseModel):
    quantity: int
    price: float

class Total(Processor[Order, float], name="total"):
    version = "{version}"

    def process(self, data: Order) -> float:
        return data.quantity * data.price * {factor}
"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TestClient]:
    """The app with an empty plugins directory. It serves loopback only: so we are loopback."""
    import app
    from settings import Settings

    directory = tmp_path / "dropped"
    directory.mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings(plugins_dir=directory, admin_token=SecretStr("sesame"), log_level="ERROR")
    built = app.build(settings)
    with TestClient(built, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        yield client


def told(step: str) -> None:
    print(f"  {step}")


def test_a_class_that_breaks_its_contract_does_not_come_into_being() -> None:
    from utils import APIContractBase, ContractViolationError, registry

    with pytest.raises(ContractViolationError) as caught:

        class Wrong(APIContractBase):
            version = "1.0"  # no SemVer

            def process(self, payload: Any) -> Any:  # renamed, and validate is missing
                return payload

    assert [v.code for v in caught.value.violations] == ["C130", "C131", "C132", "C104", "C101"]
    assert "Wrong" not in registry
    told(str(caught.value.violations[3]).replace(str(FOLDER), "").replace("\n", "\n  "))


def test_versions_live_side_by_side_and_every_call_is_counted() -> None:
    from utils import Processor, registry

    class One(Processor[int, int], name="step"):
        version = "1.0.0"

        def process(self, data: int) -> int:
            return data + 1

    class Two(Processor[int, int], name="step"):
        version = "2.0.0"

        def process(self, data: int) -> int:
            return data + 2

    try:
        assert registry.create("step", Processor).process(0) == 2
        assert registry.create("step", Processor, "1.0.0").process(0) == 1
        figures = registry.plugin("step").figures()["process"]
        assert figures.calls == 1
        told(f"step has {registry.versions('step')}; the default was called {figures.calls} time")
    finally:
        registry.unregister("step")


def test_a_dropped_in_file_is_a_typed_operation(client: TestClient, tmp_path: Path) -> None:
    token = {"Authorization": "Bearer sesame"}
    (tmp_path / "dropped" / "total.py").write_text(PLUGIN.format(version="1.0.0", factor=1))

    told(f"POST /plugins/reload -> {client.post('/plugins/reload', headers=token).json()}")
    answer = client.post("/plugins/total/process", json={"quantity": 3, "price": 4.5})
    refused = client.post("/plugins/total/process", json={"quantity": "three"})

    assert answer.json() == 13.5
    assert [e["pointer"] for e in refused.json()["errors"]] == ["/quantity", "/price"]
    assert "/plugins/total/process" in client.get("/openapi.json").json()["paths"]
    told(f"POST /plugins/total/process -> {answer.json()}; nonsense -> {refused.status_code}")


def test_a_bad_reload_keeps_the_old_version(client: TestClient, tmp_path: Path) -> None:
    token = {"Authorization": "Bearer sesame"}
    file = tmp_path / "dropped" / "total.py"
    file.write_text(PLUGIN.format(version="1.0.0", factor=1))
    client.post("/plugins/reload", headers=token)
    file.write_text(PLUGIN.format(version="1.0.0", factor=1).replace("data: Order", "order: Order"))

    failed = client.post("/plugins/total/reload", headers=token)

    assert failed.status_code == 409
    assert client.post("/plugins/total/process", json={"quantity": 2, "price": 1}).json() == 2
    (failure,) = client.get("/plugins/failed").json()
    assert (failure["phase"], failure["line"]) == ("contract", 12)
    told(f"reload -> {failed.json()['detail']}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s"]))
