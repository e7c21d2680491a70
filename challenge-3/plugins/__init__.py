"""The drop-in directory: every `*.py` here that does not begin with an underscore is loaded.

`from plugins import PluginBase, get_all_plugins` works from outside; this file is no plugin.
"""

from utils import PluginBase, get_all_plugins

__all__ = ["PluginBase", "get_all_plugins"]
