"""What `megatron-bridge new plugin` writes for those who add to this package."""

from megatron.bridge.cli.new.kinds import PluginTemplate

_TASKS = ("pretrain_config", "finetune_config", "lora_config")

RECIPE = PluginTemplate(
    summary="recipes of a model",
    files="megatron.bridge.recipes.plugin_templates.recipe",
    entry_points={
        "megatron.bridge.recipes": {f"${{module}}_{task}": f"$module.recipes:${{module}}_{task}" for task in _TASKS}
    },
    dependencies=("megatron-bridge-recipes",),
)
