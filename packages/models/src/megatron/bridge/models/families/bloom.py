"""BLOOM of BigScience (arXiv:2211.05100): positions by ALiBi (arXiv:2108.12409)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.activations import gelu_tanh
from megatron.bridge.models.families.dense import BiasedBridge
from megatron.bridge.models.fragments import HFNames


class BloomBridge(BiasedBridge):
    """`BloomForCausalLM`: a norm on the embeddings; q, k and v in one weight by head."""

    shared_fields: ClassVar[Mapping[str, str]] = {
        "num_layers": "n_layer",
        "hidden_size": "hidden_size",
        "num_attention_heads": "n_head",
        "layernorm_epsilon": "layer_norm_epsilon",
        "vocab_size": "vocab_size",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
        "init_method_std": "initializer_range",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
    }
    names = HFNames(
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        layer="transformer.h.{l}",
        final_norm="transformer.ln_f",
        qkv=("self_attention.query_key_value",),
        grouped_qkv=True,
        attention_output="self_attention.dense",
        fc1=("mlp.dense_h_to_4h",),
        fc2="mlp.dense_4h_to_h",
    )

    def rope_fields(self) -> dict[str, Any]:
        return {"position_embedding_type": "none"}

    def sequence_length(self) -> int:
        """2048 tokens, the length BLOOM was trained with; its configuration states none."""
        return int(getattr(self.hf_config, "seq_length", 2048))

    def activation_function(self) -> Any:
        return gelu_tanh

    def differences(self) -> Mapping[str, Any]:
        if self.hf_config.apply_residual_connection_post_layernorm:
            raise BridgeError("config.json: apply_residual_connection_post_layernorm=True is not supported")
        return {
            "ffn_hidden_size": 4 * self.hf_config.hidden_size,
            "embedding_norm": True,
            "alibi_slopes": alibi_slopes(self.hf_config.n_head),
        }


def alibi_slopes(heads: int) -> list[float]:
    """Slopes 2^(-8 k / n) for n heads; where n is no power of two, the rest are taken from twice as many."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * place / power) for place in range(1, power + 1)]
    between = [2 ** (-8 * place / (2 * power)) for place in range(1, 2 * power, 2)]
    return slopes + between[: heads - power]
