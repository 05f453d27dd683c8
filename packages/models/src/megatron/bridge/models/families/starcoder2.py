"""StarCoder 2 of BigCode (arXiv:2402.19173)."""

from collections.abc import Sequence

from megatron.bridge.models.families.dense import BiasedBridge, shared_fields
from megatron.bridge.models.fragments import HFNames


class Starcoder2Bridge(BiasedBridge):
    """`Starcoder2ForCausalLM`: LayerNorms, an MLP without a gate, and one switch for all biases."""

    shared_fields = shared_fields(layernorm_epsilon="norm_epsilon")
    names = HFNames(fc1=("mlp.c_fc",), fc2="mlp.c_proj")

    def has_biases(self) -> bool:
        return bool(self.hf_config.use_bias)

    def windows(self) -> Sequence[int | None]:
        return [self.hf_config.sliding_window] * self.hf_config.num_hidden_layers
