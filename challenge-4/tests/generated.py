"""Hypothesis, which makes the cases of some tests; without it a module that imports this skips.

It is in requirements-dev.txt. Where CI is set its absence is an error, as for `needs.package`.
"""

import os

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip(
        "needs the package hypothesis: pip install -r requirements-dev.txt",
        allow_module_level=True,
    )

__all__ = ["HealthCheck", "given", "settings", "st"]
