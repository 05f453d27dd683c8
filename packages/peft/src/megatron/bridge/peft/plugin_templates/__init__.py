"""What `megatron-bridge new plugin` writes for those who add to this package."""

from megatron.bridge.cli.new.kinds import PluginTemplate

METHOD = PluginTemplate(
    summary="a PEFT method",
    files="megatron.bridge.peft.plugin_templates.method",
    entry_points={"megatron.bridge.peft": {"$module": "$module.method:$Class"}},
    dependencies=("megatron-bridge-peft",),
    tested_with=("megatron-bridge-models",),
)
