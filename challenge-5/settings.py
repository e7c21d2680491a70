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

    scheduler_workers: int = Field(default=4, ge=1, le=64, description="Worker processes.")
    scheduler_threads: int = Field(
        default=8, ge=1, le=256, description="Threads for tasks that wait (kind io)."
    )
    scheduler_max_tasks: int = Field(
        default=1000, ge=1, le=10_000_000, description="Unfinished tasks; beyond it 429."
    )
    scheduler_task_timeout: float = Field(
        default=300, gt=0, le=86_400 * 365, description="Seconds a task may run by default."
    )
    scheduler_db_path: Path = Field(
        default=Path("scheduler.db"), description="SQLite file of the tasks."
    )
    scheduler_durability: Literal["full", "normal", "off"] = Field(
        default="full", description="full survives power cuts, normal crashes, off neither."
    )
    scheduler_data_dir: Path = Field(
        default=Path(), description="Folder whose files the tasks of the catalogue may read."
    )
    port: int = Field(default=8080, ge=0, le=65_535, description="Port of `python app.py`.")
    log_level: LogLevel = Field(default="INFO", description="Least level that is logged.")
    api_key: SecretStr | None = Field(
        default=None, description="Required as X-API-Key once set; without it only loopback."
    )
