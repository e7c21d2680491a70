"""Loggers that write as the program does; in a plain script they say warnings only."""

import logging
from typing import Any

import structlog


def get_logger(name: str) -> Any:
    """A structured logger over the standard one; without configuration nothing goes to stdout."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
    )
