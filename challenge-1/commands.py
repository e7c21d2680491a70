"""What the commands of this folder have in common: logs on stderr, and settings."""

import logging
import sys
from typing import TextIO, cast

import structlog
from pydantic import ValidationError

from fetch_settings import ConfigurationError
from settings import Settings


def configure_logs(level: str) -> None:
    """Structured logs: JSON when piped; on a terminal only warnings, beside what is shown there."""
    is_terminal = sys.stderr.isatty()
    least = max(logging.getLevelName(level), logging.WARNING if is_terminal else logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=True)
            if is_terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Stderr())),
        cache_logger_on_first_use=False,
    )


class _Stderr:
    """Whatever sys.stderr is now: a live table takes its place, and shows lines above itself."""

    def write(self, text: str) -> None:
        """Write it there."""
        sys.stderr.write(text)

    def flush(self) -> None:
        """Flush that."""
        sys.stderr.flush()


def service_settings() -> Settings:
    """The settings of the service; ConfigurationError names every variable that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = [f"{str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors()]
        raise ConfigurationError("\n".join(wrong)) from None
    except UnicodeDecodeError:
        raise ConfigurationError(".env: it cannot be read as UTF-8.") from None
