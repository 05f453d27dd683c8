"""What `megatron-bridge new plugin` writes for those who add to this package."""

from megatron.bridge.cli.new.kinds import PluginTemplate

FAMILY = PluginTemplate(
    summary="a model family",
    files="megatron.bridge.models.plugin_templates.family",
    entry_points={"megatron.bridge.model_bridges": {"${Class}ForCausalLM": "$module.family:${Class}Bridge"}},
    dependencies=("megatron-bridge-models", "transformers>=5.12"),
)
