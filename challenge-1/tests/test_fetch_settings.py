"""Where every setting of the fetcher comes from, and what is said about wrong ones."""

from pathlib import Path

import pytest

from fetch_settings import KEYS, SHIPPED_CONFIG, ConfigurationError, load

pytestmark = pytest.mark.unit


def test_each_key_is_taken_from_the_first_that_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {"timeout": ("11", "22", "33", "44"), "rate_limit_rps": ("1", "2", "3", "4"),
              "worker_pool_size": ("5", "6", "7", "8")}  # fmt: skip
    defaults = {"timeout": 60, "rate_limit_rps": 5, "worker_pool_size": 4}
    for key, (flag, variable, dotenv, file) in values.items():
        other = {name for name in values if name != key}
        config = tmp_path / f"{key}.yaml"
        config.write_text("{}")
        name = f"PIPELINE_{key.upper()}"

        def found(
            flags: dict[str, str] | None = None, *, key: str = key, config: Path = config
        ) -> tuple[float, str]:
            loaded = load(flags, config)
            return getattr(loaded.settings, key), loaded.origins[key]

        assert found() == (defaults[key], "default")
        config.write_text(f"{key}: {file}\n")
        assert found() == (float(file), config.name)
        Path(".env").write_text(f"{name}={dotenv}\n")
        assert found() == (float(dotenv), f".env {name}")
        monkeypatch.setenv(name, variable)
        assert found() == (float(variable), f"environment {name}")
        assert found({key: flag})[0] == float(flag)
        assert found({key: flag})[1].startswith("flag --")
        assert all(load(None, config).origins[each] == "default" for each in other)
        monkeypatch.delenv(name)
        Path(".env").unlink()


def test_the_shipped_file_has_three_sources_on_loopback_and_the_documented_keys() -> None:
    loaded = load()

    assert len(loaded.settings.sources) >= 3
    assert all(each.url.startswith("http://127.0.0.1:9101/") for each in loaded.settings.sources)
    for key in ("timeout", "rate_limit_rps", "worker_pool_size", "sources"):
        assert loaded.origins[key] == "config.yaml"
    assert SHIPPED_CONFIG.name == "config.yaml"


def test_there_is_one_line_per_key_with_value_and_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_TIMEOUT", "33")
    lines = {line.split()[0]: line for line in load({"worker_pool_size": "2"}).lines()}

    assert tuple(lines) == KEYS
    assert lines["timeout"].split() == ["timeout", "33", "environment", "PIPELINE_TIMEOUT"]
    assert lines["worker_pool_size"].split()[1:] == ["2", "flag", "--worker-pool-size"]


def test_all_wrong_values_are_reported_at_once_by_name_and_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "worker_pool_size: many\nrequest_timeout: true\nwroker_pool_size: 3\n"
        "sources: [{name: a, url: 'file:///etc/passwd', fields: {id: i, name: n}}]"
    )
    monkeypatch.setenv("PIPELINE_RATE_LIMIT_RPS", "-1")

    with pytest.raises(ConfigurationError) as raised:
        load({"timeout": "nan"}, config)

    lines = str(raised.value).splitlines()
    assert len(lines) == 6
    for start, end in (
        ("wroker_pool_size: there is no such key (mine.yaml)", "Did you mean worker_pool_size?"),
        ("timeout:", "(flag --timeout)"), ("rate_limit_rps:", "PIPELINE_RATE_LIMIT_RPS)"),
        ("worker_pool_size:", "(mine.yaml)"), ("request_timeout:", "(mine.yaml)"),
        ("sources.0.url:", "(mine.yaml)"),
    ):  # fmt: skip
        assert any(line.startswith(start) and line.endswith(end) for line in lines), start


def test_a_wrong_value_is_reported_also_where_another_goes_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("timeout: never\n")
    Path(".env").write_text("PIPELINE_TIMEOUT=0\nPIPELINE_RATE_LIMT_RPS=1\n")
    monkeypatch.setenv("PIPELINE_TIMEOUT", "soon")

    loaded = load({"timeout": "5"}, config)
    assert loaded.settings.timeout == 5
    told = "\n".join(loaded.warnings)
    with pytest.raises(ConfigurationError) as raised:
        load({"timeout": "-1"}, config)

    for place in ("(environment PIPELINE_TIMEOUT)", "(.env PIPELINE_TIMEOUT)", "(mine.yaml)"):
        assert f"{place} It is overridden." in told
        assert place in str(raised.value)
    assert "(flag --timeout)" in str(raised.value)
    for text in (told, str(raised.value)):
        assert "PIPELINE_RATE_LIMT_RPS is no setting. Did you mean PIPELINE_RATE_LIMIT_RPS?" in text


def test_a_file_of_variables_that_is_no_text_is_named() -> None:
    Path(".env").write_bytes(b"PIPELINE_TIMEOUT=\xff")

    with pytest.raises(ConfigurationError, match=r"\.env"):
        load()


def test_what_stands_in_a_source_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_SOURCES", '[{"name": "a", "headers": "sesame"')
    with pytest.raises(ConfigurationError) as raised:
        load()

    assert "sesame" not in str(raised.value)
    assert "environment PIPELINE_SOURCES" in str(raised.value)


def test_unknown_variables_get_a_did_you_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_TIMOUT", "5")

    monkeypatch.setenv("PIPELINE_WORKER", "5")

    assert load().warnings == [
        "PIPELINE_TIMOUT is no setting. Did you mean PIPELINE_TIMEOUT?",
        "PIPELINE_WORKER is no setting. Did you mean PIPELINE_WORKER_POOL_SIZE?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [("timeout: [", "is no YAML in line"), ("- 1", "keys and values"),
     ("sources: '['", "JSON array"), (None, "cannot be read")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    config = tmp_path / "mine.yaml"
    if text is not None:
        config.write_text(text)

    with pytest.raises(ConfigurationError, match=said):
        load(None, config)


@pytest.mark.parametrize(
    "changes",
    ["paging: single", "paging: single\n    item_url: http://127.0.0.1:2/{id}",
     "url: http://u:p@x/", "url: relative", "decimal_mark: ';'", "colour: red"],
)  # fmt: skip
def test_a_source_that_cannot_work_is_refused(tmp_path: Path, changes: str) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("sources:\n  - name: a\n    fields: {id: i, name: n}\n    "
                      + ("" if changes.startswith("url") else "url: http://127.0.0.1:1/\n    ")
                      + changes + "\n")  # fmt: skip

    with pytest.raises(ConfigurationError, match=r"sources\.0"):
        load(None, config)
