"""InternLM2 (`InternLM2ForCausalLM`, arXiv:2403.17297): Llama's layout under other names, q, k and v in one weight.

It holds them group by group, each group's queries before its key and its value, as Megatron does.
"""

from typing import ClassVar

# Importing it lets transformers read the configuration.
from internlm2_bridge import config as _config  # noqa: F401
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.models.fragments import HFNames


class InternLM2Bridge(DenseBridge):
    """`InternLM2ForCausalLM`."""

    names: ClassVar[HFNames] = HFNames(
        embedding="model.tok_embeddings",
        output="output",
        input_norm="attention_norm",
        mlp_norm="ffn_norm",
        qkv=("attention.wqkv",),
        grouped_qkv=True,
        attention_output="attention.wo",
        fc1=("feed_forward.w1", "feed_forward.w3"),
        fc2="feed_forward.w2",
    )

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.bias)

    output_bias = qkv_bias
