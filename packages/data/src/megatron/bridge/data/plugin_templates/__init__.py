"""What `megatron-bridge new plugin` writes for those who add to this package."""

from megatron.bridge.cli.new.kinds import PluginTemplate

DATASET_FORMAT = PluginTemplate(
    summary="a format of instruction data",
    files="megatron.bridge.data.plugin_templates.dataset_format",
    entry_points={"megatron.bridge.dataset_formats": {"$module": "$module.rows:$module"}},
    dependencies=("megatron-bridge-data",),
)
