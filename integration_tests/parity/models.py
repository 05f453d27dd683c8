"""The models that are trained: transformers' own configurations, small."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from zoo.exhibits import exhibits

from megatron.bridge.testing import save_random_model
from parity.layouts import ANYWHERE, BALANCED, DENSE, EXPERTS, FEW, Layout

SEQUENCE = 16
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


@dataclass(frozen=True)
class Model:
    """One model that trains at several layouts.

    Attributes:
        layouts: at which it trains.
        config: transformers' class of the configuration, by name; None for the zoo's first case of `architecture`.
        values: of the configuration, besides the sizes that all have.
        fields: of the provider.
        plain: whether transformers computes the same loss.
    """

    layouts: Mapping[str, Layout]
    config: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    plain: bool = True

    def save(self, folder: Path) -> None:
        """Random weights in a Hugging Face folder."""
        import transformers

        if self.config is None:
            save_random_model(_zoo()[str(self.architecture)][0].config, folder)
        else:
            save_random_model(getattr(transformers, self.config)(**_SIZES, **self.values), folder)


_zoo = cache(exhibits)
_NO_BALANCE = {"moe_router_load_balancing_type": "none"}
# The term is a micro-batch's here, and a whole batch's in transformers.
_BALANCE = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
# In every run of the tests.
TESTED: dict[str, Model] = {
    "Llama": Model(DENSE, "LlamaConfig", {"tie_word_embeddings": True}),
    "Qwen3-MoE": Model(FEW, "Qwen3MoeConfig", _EXPERTS, _NO_BALANCE),
    "Qwen3-MoE-balanced": Model(BALANCED, "Qwen3MoeConfig", _EXPERTS, _BALANCE, plain=False),
}


def _of_the_zoo(architecture: str, layouts: Mapping[str, Layout] = ANYWHERE, **fields: Any) -> Model:
    return Model(layouts, architecture=architecture, fields=fields)


# Besides those, in `just parity`.
MODELS: dict[str, Model] = {
    **TESTED,
    "DeepSeek-V3": _of_the_zoo("DeepseekV3ForCausalLM", EXPERTS, **_NO_BALANCE),
    "GPT-OSS": _of_the_zoo("GptOssForCausalLM", EXPERTS, **_NO_BALANCE),
    "Gemma3": _of_the_zoo("Gemma3ForCausalLM"),
    "Qwen3-Next": _of_the_zoo("Qwen3NextForCausalLM", EXPERTS, **_NO_BALANCE),
    "Falcon-H1": _of_the_zoo("FalconH1ForCausalLM"),
    "Cohere2": _of_the_zoo("Cohere2ForCausalLM"),
}
