"""Mellum 2 of JetBrains (2026)."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.models.families.dense import windows_by_layer_type
from megatron.bridge.models.families.layer_ropes import rope_fields_by_layer_type
from megatron.bridge.models.families.qwen3_moe import Qwen3MoeBridge


class MellumBridge(Qwen3MoeBridge):
    """`MellumForCausalLM`: Qwen3's mixture with windows, and with rotary settings by kind of layer.

    Layers for multi-token prediction have no rules: a checkpoint that holds them is refused, naming them.
    """

    def windows(self) -> Sequence[int | None]:
        return windows_by_layer_type(self.hf_config)

    def rope_fields(self) -> dict[str, Any]:
        return rope_fields_by_layer_type(self.hf_config)

    def moe_layers(self) -> Sequence[bool]:
        return [kind == "sparse" for kind in self.hf_config.mlp_layer_types]
