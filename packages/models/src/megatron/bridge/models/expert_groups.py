"""Choice of experts from the best of several groups, with groups ranked by any number of their best experts.

Megatron-Core ranks a group by its best topk / (chosen groups) experts; families differ (one in DeepSeek-V2, two in
DeepSeek-V3). Its routers hand the choice to an object that was made to replay recorded choices; ours makes them anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class GroupRanking:
    """Ranks each group of experts by the sum of its `best` highest scores.

    Stands in for Megatron-Core's `RouterReplay`.
    """

    best: int

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """The `topk` experts of the best `group_topk` of `num_groups` groups.

        Args:
            scores: `[tokens, experts]`.

        Returns:
            Scores and indices of the chosen experts, `[tokens, topk]` each.
        """
        by_group = scores.unflatten(1, (num_groups or 1, -1))
        ranks = by_group.topk(self.best, dim=-1).values.sum(-1)
        chosen = ranks.topk(group_topk or 1, dim=-1, sorted=False).indices
        outside = ranks.new_ones(ranks.shape).scatter(1, chosen, 0.0).bool()
        allowed = by_group.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
        values, experts = allowed.topk(topk, dim=-1)
        return values, experts


def rank_groups(model: nn.Module, best: int) -> None:
    """Let every router of a model rank groups by their `best` best experts."""
    from megatron.core.transformer.moe.router import TopKRouter

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.router_replay = GroupRanking(best)
