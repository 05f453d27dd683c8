"""nanochat of Andrej Karpathy (2025)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.llama import LlamaBridge
from megatron.bridge.models.fragments import HFNames


class NanoChatBridge(LlamaBridge):
    """`NanoChatForCausalLM`: norms without weights, behind the embeddings and the reversed rotation too."""

    names = HFNames(fc1=("mlp.fc1",), fc2="mlp.fc2")
    norm_kinds = ()
    gated = False

    def mlp_bias(self) -> bool:
        return False

    def qk_norm(self) -> bool:
        return True

    def differences(self) -> Mapping[str, Any]:
        return {
            "embedding_norm": True,
            "qk_norm_after_rope": True,
            "rotary_reversed": True,
            "logits_softcap": self.hf_config.final_logit_softcapping,
        }

    def rope_fields(self) -> dict[str, Any]:
        fields = super().rope_fields()
        if fields["rope_parameters"] is not None:
            raise BridgeError("config.json: a scaled RoPE is not supported in NanoChatForCausalLM")
        return fields
