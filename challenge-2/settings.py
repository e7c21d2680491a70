"""What can be set from outside, under the bare names of the environment."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogLevel = Annotated[Level, BeforeValidator(lambda text: str(text).upper())]


class Settings(BaseSettings):
    """Each field is an environment variable of the same name; a `.env` file works too.

    A URL wins over its parts; without a URL and without a host the embedded one serves.
    """

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    database_url: SecretStr | None = Field(
        default=None, description="`postgresql://user:password@host/db` or `sqlite:///file.db`."
    )
    redis_url: SecretStr | None = Field(
        default=None, description="`redis://:password@host:6379/0` or `memory://`."
    )
    amqp_url: SecretStr | None = Field(
        default=None, description="`amqp://user:password@host/` or `sqlite:///queue.db`."
    )
    api_url: SecretStr | None = Field(
        default=None, description="Base URL of the HTTP API; without it an embedded echo answers."
    )
    postgres_host: str | None = Field(default=None, description="Chooses PostgreSQL by parts.")
    postgres_port: int = Field(default=5432, ge=1, le=65_535)
    postgres_db: str = "postgres"
    postgres_user: str = "postgres"
    postgres_password: SecretStr | None = None
    redis_host: str | None = Field(default=None, description="Chooses Redis by parts.")
    redis_port: int = Field(default=6379, ge=1, le=65_535)
    redis_db: int = Field(default=0, ge=0, le=1_000_000)
    rabbitmq_host: str | None = Field(default=None, description="Chooses RabbitMQ by parts.")
    rabbitmq_port: int = Field(default=5672, ge=1, le=65_535)
    rabbitmq_user: str = "guest"
    rabbitmq_password: SecretStr = SecretStr("guest")
    resource_fallback: Literal["embedded"] | None = Field(
        default=None,
        description="`embedded`: serve degraded from embedded ones when a configured server is "
        "down. Without it that is an error.",
    )
    embedded_dir: Path = Field(
        default=Path(), description="Directory of the embedded database, queue and journal."
    )
    journal_rows: int = Field(
        default=10_000, ge=100, le=10_000_000, description="Log records that are kept."
    )
    port: int = Field(default=8080, ge=0, le=65_535, description="Port of `python app.py`.")
    log_level: LogLevel = Field(default="INFO", description="Least level that is logged.")
    api_key: SecretStr | None = Field(
        default=None, description="Required as X-API-Key once set; without it only loopback."
    )
