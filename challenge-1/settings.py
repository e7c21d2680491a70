"""What can be set from outside, under the bare names of the environment."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogLevel = Annotated[Level, BeforeValidator(lambda text: str(text).upper())]


class Settings(BaseSettings):
    """Each field is an environment variable of the same name; a `.env` file works too."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    queue_maxsize: int = Field(
        default=1000, ge=1, le=100_000, description="Requests that may wait at the same time."
    )
    window_secs: float = Field(
        default=10, ge=0.001, le=31_622_400, description="Size of a window in seconds."
    )
    db_path: Path = Field(
        default=Path("webhook_results.db"), description="SQLite file of the aggregates."
    )
    queue_dir: Path = Field(
        default=Path("message_queue"), description="Directory of the durable log."
    )
    port: int = Field(default=8080, ge=0, le=65_535, description="Port of `python app.py`.")
    log_level: LogLevel = Field(default="INFO", description="Least level that is logged.")
    max_event_bytes: int = Field(
        default=1024 * 1024, ge=1024, le=16 * 1024 * 1024, description="Largest single event."
    )
    backlog_max_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=64 * 1024,
        description="Acknowledged bytes that may wait to be aggregated; beyond it 429.",
    )
    dedupe_keys: int = Field(
        default=1_000_000,
        ge=1_000,
        le=20_000_000,
        description="At least so many event ids and idempotency keys are remembered.",
    )
    max_future_seconds: float = Field(
        default=3600, ge=0, le=366 * 86_400,
        description="An event time further ahead than this is refused as `future`.",
    )  # fmt: skip
    max_keys: int = Field(
        default=100_000,
        ge=1,
        le=10_000_000,
        description="Groups with open windows per pipeline; more are counted as `(other)`.",
    )
    queue_retain_days: float = Field(
        default=7, gt=0, le=3660, description="Applied log and topics are kept for so long."
    )
    queue_max_bytes: int = Field(
        default=512 * 1024 * 1024,
        ge=1024 * 1024,
        description="Applied log and uploads, and each topic, are kept up to so many bytes.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="One or several secrets; once set, events must be signed (Standard Webhooks).",
    )
    parser: Literal["msgspec", "ijson"] = Field(
        default="msgspec", description="What decodes events; ijson sends NDJSON through ijson too."
    )
    api_key: SecretStr | None = Field(
        default=None, description="Required as X-API-Key once set; without it only loopback."
    )
