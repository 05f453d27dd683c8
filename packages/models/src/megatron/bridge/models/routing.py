"""How a mixture of experts weighs its experts, in Megatron-Core's terms.

Hugging Face models differ in where softmax or sigmoid stands, whether the chosen weights are normalised, and what
scales them; Megatron-Core has a switch for each, and a few combinations it cannot express.
"""

from typing import Any

from megatron.bridge.errors import BridgeError


def softmax_routing(topk: int, *, normalised: bool, scaling: float = 1.0) -> dict[str, Any]:
    """Provider fields of softmax over all experts, then the `topk` largest, normalised to sum to one or not.

    The weights are multiplied by `scaling`. Normalising after the choice is softmax over the chosen ones alone, which
    is how Megatron computes it.
    """
    if normalised and topk == 1:
        raise BridgeError("routing: one expert per token with normalised weights gives every expert the weight 1")
    return {
        "moe_router_score_function": "softmax",
        "moe_router_topk": topk,
        "moe_router_pre_softmax": not normalised,
        "moe_router_topk_scaling_factor": None if scaling == 1.0 else float(scaling),
    }


def sigmoid_routing(
    topk: int, *, normalised: bool, scaling: float, groups: int | None = None, chosen_groups: int | None = None
) -> dict[str, Any]:
    """Provider fields of sigmoid scores, chosen with a bias per expert and weighed without it (arXiv:2412.19437).

    Args:
        topk: experts per token.
        normalised: whether the chosen scores are divided by their sum.
        scaling: factor on the weights.
        groups, chosen_groups: experts are chosen from the best `chosen_groups` of `groups` only; a group is as good as
            the sum of its two best experts.

    Raises:
        BridgeError: Megatron-Core computes this combination otherwise.
    """
    if normalised != (topk > 1):
        raise BridgeError(
            f"routing: norm_topk_prob={normalised} with {topk} experts per token; "
            "Megatron-Core normalises sigmoid scores exactly when there are several"
        )
    fields: dict[str, Any] = {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": topk,
        "moe_router_topk_scaling_factor": float(scaling),
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    }
    return fields | group_fields(topk, groups, chosen_groups, ranking=2)


def group_fields(topk: int, groups: int | None, chosen_groups: int | None, *, ranking: int) -> dict[str, Any]:
    """Provider fields of a choice from the best `chosen_groups` of `groups` groups of experts; none where that is all.

    Args:
        topk: experts per token.
        ranking: a group is as good as the sum of this many of its best experts.
    """
    if not (groups and chosen_groups and chosen_groups < groups):
        return {}
    return {
        "moe_router_num_groups": groups,
        "moe_router_group_topk": chosen_groups,
        # Megatron-Core's own ranking is by this many.
        "group_ranking": None if topk // chosen_groups == ranking else ranking,
    }


def sparsemixer_routing(topk: int, *, jitter: float) -> dict[str, Any]:
    """Provider fields of SparseMixer (arXiv:2409.12136), which samples in training and chooses the best otherwise.

    Raises:
        BridgeError: more or fewer than the two experts per token that it is made for.
    """
    if topk != 2:
        raise BridgeError(f"routing: SparseMixer chooses 2 experts per token, not {topk}")
    return {**softmax_routing(topk, normalised=False), "routing": "sparsemixer", "routing_eps": float(jitter)}


def biased_softmax_routing(topk: int, *, least_sum: float) -> dict[str, Any]:
    """Provider fields of softmax scores, chosen with a bias per expert and weighed without it, normalised.

    The bias is no parameter, and training leaves it as it is.

    Args:
        topk: experts per token.
        least_sum: what the chosen scores are divided by, where their sum is less.
    """
    return {
        **softmax_routing(topk, normalised=False),
        "moe_router_dtype": "fp32",
        "routing": "softmax",
        "routing_eps": float(least_sum),
        "routing_bias": True,
    }


def sigmoid_of_chosen(topk: int, *, normalised: bool, bias: bool = False) -> dict[str, Any]:
    """Provider fields of the `topk` largest logits' sigmoids.

    Args:
        topk: experts per token.
        normalised: whether they are divided by their sum.
        bias: whether a bias per expert is added to the logits for the choice; training leaves it as it is.
    """
    if normalised and topk == 1:
        raise BridgeError("routing: one expert per token with normalised weights gives every expert the weight 1")
    fields = {"moe_router_dtype": "fp32"}
    if not bias and normalised == (topk > 1):
        return {**fields, "moe_router_score_function": "sigmoid", "moe_router_topk": topk}
    rule = "normalised_sigmoid" if normalised else "sigmoid"
    return {**fields, **softmax_routing(topk, normalised=False), "routing": rule, "routing_bias": bias}


def balancing(coefficient: float | None) -> dict[str, Any]:
    """Provider fields of the load-balancing loss, which acts in training only; None or 0 for none."""
    return {
        "moe_router_load_balancing_type": "aux_loss" if coefficient else "none",
        "moe_aux_loss_coeff": float(coefficient or 0.0),
    }
