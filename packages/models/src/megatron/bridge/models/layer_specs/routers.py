"""Routers that choose and weigh experts in ways for which Megatron-Core has no switch."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron.bridge.errors import BridgeError

# (logits [tokens, experts], the router) -> the chosen experts' weights and numbers, [tokens, experts per token] each
type RoutingRule = Callable[[Tensor, "VariantRouter"], tuple[Tensor, Tensor]]


class VariantRouter(TopKRouter):
    """Megatron-Core's router, with its losses and statistics, around another rule.

    Args:
        rule: a name in `ROUTING_RULES`.
        eps: what the rule makes of it.
    """

    def __init__(self, *args: Any, rule: str, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.moe_router_fusion:
            raise BridgeError(f"the routing rule {rule!r} has no fused kernel; set moe_router_fusion=False")
        self.rule, self.eps = ROUTING_RULES[rule], eps
        if rule == "biased_softmax":
            # Megatron-Core has this buffer beside sigmoid scores only, and trains it there.
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Megatron-Core's: weights and choices, `[tokens, experts]` each."""
        self.router_replay = _Choice(*self.rule(logits.view(-1, self.num_experts), self))
        weights, chosen = super().routing(logits, padding_mask)
        return weights, chosen


class _Choice:
    """What Megatron-Core asks for the largest scores: here, the experts that a rule has chosen, with their weights."""

    def __init__(self, weights: Tensor, experts: Tensor) -> None:
        self.weights, self.experts = weights, experts

    def get_replay_topk(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.weights, self.experts


def sparsemixer(logits: Tensor, router: VariantRouter) -> tuple[Tensor, Tensor]:
    """Two experts, each by softmax over the scores near the best that is left (arXiv:2409.12136).

    "Near" is within 2 * eps of it, relatively. Training draws from them at random; transformers' own function does so.
    """
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    weights, experts = sparsemixer(logits, jitter_eps=router.eps, training=router.training)
    return weights, experts


def biased_softmax(logits: Tensor, router: VariantRouter) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, chosen with a bias per expert and weighed without it, then divided by their sum.

    The sum counts as `eps` at least.
    """
    scores = logits.float().softmax(-1)
    experts = (scores + router.expert_bias).topk(router.topk, dim=-1).indices
    weights = scores.gather(-1, experts)
    return weights / weights.sum(-1, keepdim=True).clamp(min=router.eps), experts


def sigmoid(logits: Tensor, router: VariantRouter) -> tuple[Tensor, Tensor]:
    """The sigmoids of the largest logits as they are."""
    values, experts = logits.topk(router.topk, dim=-1)
    return values.float().sigmoid(), experts


ROUTING_RULES: dict[str, RoutingRule] = {
    "sparsemixer": sparsemixer,
    "biased_softmax": biased_softmax,
    "sigmoid": sigmoid,
}
