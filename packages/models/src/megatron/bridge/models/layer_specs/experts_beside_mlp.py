"""A mixture of experts beside an MLP (Gemma 4): each with norms before and behind, and a router with one of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron.bridge.models.layer_specs.moe_layer import VariantMoELayer
from megatron.bridge.models.layer_specs.norms import rms_norm, torch_norm
from megatron.bridge.models.layer_specs.routers import VariantRouter


class ExpertsBesideMLP(VariantMoELayer):
    """A mixture of experts whose shared expert is the MLP. It is given, as its router, what no norm has changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experts_layernorm, self.experts_post_layernorm = self._norm(), self._norm()
        self.mlp_layernorm, self.mlp_post_layernorm = self._norm(), self._norm()

    def _norm(self) -> nn.Module:
        return torch_norm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor:
        output = super().shared_experts_compute(self.mlp_layernorm(hidden_states))
        return self.mlp_post_layernorm(output)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
        return super().preprocess(self.experts_layernorm(hidden_states), probs, routing_map)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        return self.experts_post_layernorm(super().postprocess(output, None)) + shared_expert_output


class ScaledRouter(VariantRouter):
    """A router with a norm and a scale per channel on what it reads, and a scale per expert on the weights it gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, rule=None, eps=0.0, bias=False, fp32=False, **kwargs)
        options = {"dtype": self.config.params_dtype, "device": self.weight.device}
        self.input_scale = nn.Parameter(torch.ones(self.config.hidden_size, **options))
        self.expert_scale = nn.Parameter(torch.ones(self.num_experts, **options))
        for scale in (self.input_scale, self.expert_scale):
            scale.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: Tensor) -> Tensor:
        normed = rms_norm(input, self.config.layernorm_epsilon)
        return super().gating(normed * self.input_scale * self.config.hidden_size**-0.5)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, chosen = super().routing(logits, padding_mask)
        return weights * self.expert_scale.to(weights.dtype), chosen
