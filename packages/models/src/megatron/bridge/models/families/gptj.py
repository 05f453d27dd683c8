"""GPT-J 6B of EleutherAI (2021)."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.conversion import hf_config
from megatron.bridge.models.families.gpt2 import GPT2Bridge
from megatron.bridge.models.fragments import HFNames


class GPTJBridge(GPT2Bridge):
    """`GPTJForCausalLM`: attention and MLP read the same LayerNorm; a part of each head turns, by neighbours."""

    names = HFNames(
        embedding="transformer.wte",
        layer="transformer.h.{l}",
        final_norm="transformer.ln_f",
        input_norm="ln_1",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        attention_output="attn.out_proj",
        fc1=("mlp.fc_in",),
        fc2="mlp.fc_out",
    )

    def qkv_bias(self) -> bool:
        return False

    output_bias = qkv_bias

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        return {
            "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
            "rotary_interleaved": True,
            "parallel_block": True,
            "shared_pre_norm": True,
            "output_bias": True,
        }

    def rope_fields(self) -> dict[str, Any]:
        size = hf_config.head_dim(self.hf_config)
        return {"rotary_base": 10000.0, "rotary_percent": (self.hf_config.rotary_dim or size) / size}
