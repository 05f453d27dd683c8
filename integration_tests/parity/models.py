"""The models that are trained: transformers' own configurations, small."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.exhibits import FAMILY_TESTS, module_at

from megatron.bridge.testing import save_random_model
from parity.layouts import (
    BALANCED,
    DENSE,
    DENSE_OFTEN,
    EXPERTS_OFTEN,
    FEW,
    FEW_OFTEN,
    LATENT,
    LATENT_FEW,
    Layout,
)

SEQUENCE = 16
_PREDICTIONS = FAMILY_TESTS / "test_prediction_layers.py"
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "dtype": "float32",
    "initializer_range": 0.1,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
# 3 of 4 layers with experts; no bias in transformers' attention, and keys of as many heads as queries.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class Model:
    """One model that trains at several layouts.

    Attributes:
        layouts: at which it trains.
        often: the names of those that every run of the tests trains; of a model without any, `kinds` takes a step.
        config: transformers' class of the configuration, by name.
        values: of the configuration, besides the sizes that all have.
        fields: of the provider.
        plain: whether transformers computes the same loss.
    """

    layouts: Mapping[str, Layout]
    often: tuple[str, ...]
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = True

    def save(self, folder: Path) -> None:
        """Random weights in a Hugging Face folder, with those of prediction layers, which transformers leaves out."""
        import transformers

        config = getattr(transformers, self.config)(**{**_SIZES, **self.values})
        predicts = getattr(config, "num_nextn_predict_layers", 0)
        save = module_at(_PREDICTIONS).save_with_predictions if predicts else save_random_model
        save(config, folder)


_NO_BALANCE = {"moe_router_load_balancing_type": "none"}
# The term is a micro-batch's here, and a whole batch's in transformers.
_BALANCE = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
MODELS: dict[str, Model] = {
    "Llama": Model(DENSE, DENSE_OFTEN, "LlamaConfig", {"tie_word_embeddings": True}),
    "Qwen3-MoE": Model(FEW, FEW_OFTEN, "Qwen3MoeConfig", _EXPERTS, _NO_BALANCE),
    "Qwen3-MoE-balanced": Model(BALANCED, EXPERTS_OFTEN, "Qwen3MoeConfig", _EXPERTS, _BALANCE, plain=False),
    # transformers leaves the routers' biases as they are.
    "DeepSeek-V3": Model(LATENT_FEW, (), "DeepseekV3Config", _LATENT, {"moe_router_bias_update_rate": 0.0}),
    "DeepSeek-V3-MTP": Model(
        LATENT,
        (),
        "DeepseekV3Config",
        {**_LATENT, "num_nextn_predict_layers": 1},
        {"moe_router_bias_update_rate": 1e-2},
        plain=False,
    ),
}
