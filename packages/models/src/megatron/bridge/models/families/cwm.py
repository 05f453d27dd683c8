"""Code World Model of Meta (arXiv:2510.02387)."""

from megatron.bridge.models.families.dense import DenseBridge


class CwmBridge(DenseBridge):
    """`CwmForCausalLM`: the Llama layout with attention windows on most layers."""

    def mlp_bias(self) -> bool:
        return bool(self.hf_config.mlp_bias)
