"""GLM-4.5, GLM-4.6 and GLM-4.5-Air (arXiv:2508.06471)."""

from collections.abc import Sequence

from megatron.bridge.models.families.moe import after_dense_prefix
from megatron.bridge.models.families.prediction import PredictionBridge
from megatron.bridge.models.families.sigmoid_moe import SigmoidMoEBridge


class Glm4MoeBridge(PredictionBridge, SigmoidMoEBridge):
    """`Glm4MoeForCausalLM`: a dense prefix, half of each head rotated, biases on q, k and v only."""

    def qk_norm(self) -> bool:
        return bool(self.hf_config.use_qk_norm)

    def moe_layers(self) -> Sequence[bool]:
        return after_dense_prefix(self)
