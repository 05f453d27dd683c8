"""StableLM 1.6B, 3B and 12B of Stability AI (arXiv:2402.17834)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import DenseBridge, shared_fields
from megatron.bridge.models.fragments import WEIGHT_AND_BIAS


class StableLmBridge(DenseBridge):
    """`StableLmForCausalLM`: LayerNorms and partial RoPE; attention and MLP may read the same norm."""

    shared_fields = shared_fields(layernorm_epsilon="layer_norm_eps")
    normalization = "LayerNorm"
    norm_kinds = WEIGHT_AND_BIAS

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.use_qkv_bias)

    def differences(self) -> Mapping[str, Any]:
        if self.hf_config.qk_layernorm:
            raise BridgeError("config.json: qk_layernorm=True is not supported in StableLmForCausalLM")
        parallel = bool(self.hf_config.use_parallel_residual)
        return {"parallel_block": parallel, "shared_pre_norm": parallel}
