"""The name under which the manager was imported once: `from resource_manager import …`."""

from utils import *  # noqa: F403
