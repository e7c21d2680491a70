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

    plugins_dir: Path = Field(
        default=Path(__file__).resolve().parent / "plugins",
        description="Drop-in directory; default: plugins/ beside app.py.",
    )
    call_timeout_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="A call that takes longer is answered with 504."
    )
    load_timeout_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="What runs longer at import is not loaded."
    )
    admin_token: SecretStr | None = Field(
        default=None, description="Opens enable, disable and reload to who sends it as Bearer."
    )
    registry_path: Path = Field(
        default=Path("plugin_registry.db"),
        description="SQLite file that the processes of this machine share, without Redis.",
    )
    redis_url: SecretStr | None = Field(
        default=None, description="Redis as the shared registry, as redis://host:6379/0."
    )
    redis_host: str | None = Field(default=None, description="The same in parts: the host.")
    redis_port: int = Field(default=6379, ge=1, le=65_535, description="The port.")
    redis_db: int = Field(default=0, ge=0, le=1000, description="The number of the database.")
    port: int = Field(default=8080, ge=0, le=65_535, description="Port of `python app.py`.")
    log_level: LogLevel = Field(default="INFO", description="Least level that is logged.")
    api_key: SecretStr | None = Field(
        default=None, description="Required as X-API-Key once set; without it only loopback."
    )

    @property
    def redis(self) -> str | None:
        """The address of Redis, or None where the embedded store is meant."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        if self.redis_host is not None:
            return f"redis://{self.redis_host}:{self.redis_port}/{self.redis_db}"
        return None
