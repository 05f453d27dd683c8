"""Routers that choose and weigh experts in ways for which Megatron-Core has no switch, or keep their dtype."""

from collections.abc import Callable
from typing import Any, Self

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron.bridge.errors import BridgeError

# (logits [tokens, experts], the router) -> the chosen experts' weights and numbers, [tokens, experts per token] each
type RoutingRule = Callable[[Tensor, "VariantRouter"], tuple[Tensor, Tensor]]


class VariantRouter(TopKRouter):
    """Megatron-Core's router, with its losses and statistics, around another rule or another dtype.

    Args:
        rule: a name in `ROUTING_RULES`; None for Megatron-Core's own.
        eps: what the rule makes of it.
        bias: whether the rule has a bias per expert, which takes part in the choice only and is not trained.
        fp32: the weight stays in fp32, whatever the model's dtype.
    """

    def __init__(self, *args: Any, rule: str | None, eps: float, bias: bool, fp32: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rule is not None and self.config.moe_router_fusion:
            raise BridgeError(f"the routing rule {rule!r} has no fused kernel; set moe_router_fusion=False")
        self.rule, self.eps, self.fp32 = None if rule is None else ROUTING_RULES[rule], eps, fp32
        if fp32:
            self.weight.data = self.weight.data.float()
        if bias:
            # Megatron-Core has this buffer beside sigmoid scores only, and trains it there.
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `Module.to`, `bfloat16` and their like are made of."""
        if not self.fp32:
            return super()._apply(fn, recurse)

        def keeping_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keeping_dtype, recurse)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Megatron-Core's: weights and choices, `[tokens, experts]` each."""
        if self.rule is not None:
            self.router_replay = _Choice(*self.rule(logits.view(-1, self.num_experts), self))
        weights, chosen = super().routing(logits, padding_mask)
        return weights, chosen

    def largest(self, scores: Tensor) -> Tensor:
        """The experts of the largest scores, with the bias where there is one: `[tokens, experts per token]`."""
        biased = scores if self.expert_bias is None else scores + self.expert_bias
        return biased.topk(self.topk, dim=-1).indices


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


def softmax(logits: Tensor, router: VariantRouter) -> tuple[Tensor, Tensor]:
    """The largest of softmax over all experts plus bias, divided by their sum, which counts as `eps` at least."""
    scores = logits.float().softmax(-1)
    experts = router.largest(scores)
    weights = scores.gather(-1, experts)
    return weights / weights.sum(-1, keepdim=True).clamp(min=router.eps), experts


def sigmoid(logits: Tensor, router: VariantRouter) -> tuple[Tensor, Tensor]:
    """The sigmoids of the largest logits, chosen by logit plus bias, as they are."""
    experts = router.largest(logits.float())
    return logits.gather(-1, experts).float().sigmoid(), experts


def normalised_sigmoid(logits: Tensor, router: VariantRouter) -> tuple[Tensor, Tensor]:
    """The same divided by their sum."""
    weights, experts = sigmoid(logits, router)
    return weights / weights.sum(-1, keepdim=True), experts


ROUTING_RULES: dict[str, RoutingRule] = {
    "sparsemixer": sparsemixer,
    "softmax": softmax,
    "sigmoid": sigmoid,
    "normalised_sigmoid": normalised_sigmoid,
}
