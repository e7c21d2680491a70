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

    database_url: SecretStr | None = Field(
        default=None,
        description="Path or DSN of the database of the `events` data set; unset: bundled SQLite.",
    )
    lazy_inline: Literal["0", "1"] | None = Field(
        default=None, description="0: call every function; 1: write simple ones into the loop."
    )
    data_dir: Path = Field(
        default=Path("lazy_data"), description="Directory of uploads and saved pipelines."
    )
    cursor_secret: SecretStr | None = Field(
        default=None, description="Signs cursors; unset: one is made and kept in DATA_DIR."
    )
    max_runs: int = Field(
        default=8, ge=1, le=64, description="Pipelines that run at the same time; beyond it 429."
    )
    run_seconds: float = Field(
        default=10, ge=0.05, le=600, description="Time for one page, in seconds."
    )
    stream_seconds: float = Field(
        default=300, ge=0.05, le=86_400, description="Time for one stream, in seconds."
    )
    max_upload_bytes: int = Field(
        default=1024**3, ge=1024, le=1024**4, description="Largest upload, in bytes."
    )
    port: int = Field(default=8080, ge=0, le=65_535, description="Port of `python app.py`.")
    log_level: LogLevel = Field(default="INFO", description="Least level that is logged.")
    api_key: SecretStr | None = Field(
        default=None, description="Required as X-API-Key once set; without it only loopback."
    )
