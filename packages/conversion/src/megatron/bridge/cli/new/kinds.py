"""What a new plugin can be: templates by kind, offered under the group `megatron.bridge.plugin_templates`."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.registry import Registry


@dataclass(frozen=True, kw_only=True)
class PluginTemplate:
    """A kind of plugin, as the package offers it whose plugins these are.

    Every text may hold the names of `naming.Names` as `$name`, `$module`, `$Class`; `$$` stands for a dollar sign.

    Attributes:
        summary: what such a plugin adds, for its description: `a model family`.
        files: import name of the package that holds the files. Each ends in `.tmpl`; a folder `MODULE` gets the
            plugin's import name.
        entry_points: group -> name -> target.
        dependencies: requirements of the plugin.
        tested_with: further requirements of its tests.
    """

    summary: str
    files: str
    entry_points: Mapping[str, Mapping[str, str]]
    dependencies: tuple[str, ...]
    tested_with: tuple[str, ...] = ()


TEMPLATES: Registry[PluginTemplate] = Registry("megatron.bridge.plugin_templates", PluginTemplate, "kind of plugin")
