"""K-EXAONE (arXiv:2601.01739)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from megatron.bridge.models.families.sigmoid_moe import SigmoidMoEBridge


class ExaoneMoeBridge(SigmoidMoEBridge):
    """`ExaoneMoeForCausalLM`: layers with an attention window rotate queries and keys, the others do not.

    Layers for multi-token prediction have no rules: a checkpoint that holds them is refused, naming them.
    """

    shared_fields: ClassVar[dict[str, str]] = {**SigmoidMoEBridge.shared_fields, "num_moe_experts": "num_experts"}
    selection_bias = "model.layers.{l}.mlp.e_score_correction_bias"

    def num_shared_experts(self) -> int:
        return int(self.hf_config.num_shared_experts)

    def qkv_bias(self) -> bool:
        return False

    def qk_norm(self) -> bool:
        return True

    def windows(self) -> Sequence[int | None]:
        config = self.hf_config
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]

    def moe_layers(self) -> Sequence[bool]:
        return [kind == "sparse" for kind in self.hf_config.mlp_layer_types]

    def moe_fields(self) -> dict[str, Any]:
        return {**super().moe_fields(), "no_rope_freq": [int(window is None) for window in self.windows()]}
