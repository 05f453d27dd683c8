"""Which ranks hold a weight at a parallel layout, told without a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.conversion.plan import Plan, PlanItem
from megatron.bridge.conversion.shards import Expert
from megatron.bridge.conversion.transforms import Shape
from megatron.bridge.errors import BridgeError

_EMBEDDING = "embedding."


@dataclass(frozen=True)
class Owner:
    """The ranks that hold a weight and what each of them holds.

    Args:
        stages: pipeline stages.
        expert_rank: expert-parallel rank, None for what all of them hold.
        local_shape: of the part on one rank.
    """

    stages: tuple[int, ...]
    expert_rank: int | None
    local_shape: Shape

    def __str__(self) -> str:
        stages = "stage " + " and ".join(map(str, self.stages))
        return stages if self.expert_rank is None else f"{stages}, expert rank {self.expert_rank}"


def owners(plan: Plan, layout: Mapping[str, int]) -> dict[str, Owner]:
    """Canonical name -> owner.

    Args:
        plan: of the whole model.
        layout: provider fields, e.g. `tensor_model_parallel_size=2`; absent ones are 1. Layers are spread evenly.

    Raises:
        BridgeError: layers, experts or a weight cannot be divided evenly.
    """
    tensor = layout.get("tensor_model_parallel_size", 1)
    stages = layout.get("pipeline_model_parallel_size", 1)
    chunks = stages * layout.get("virtual_pipeline_model_parallel_size", 1)
    layers = 1 + max((item.indices.get("l", -1) for item in plan), default=-1)
    experts = 1 + max((item.indices.get("e", -1) for item in plan), default=-1)
    expert_ranks = layout.get("expert_model_parallel_size", 1)
    if layers % chunks:
        raise BridgeError(f"{layers} layers cannot be divided evenly over {chunks} (virtual) pipeline stages")
    if experts % expert_ranks:
        raise BridgeError(f"{experts} experts cannot be divided evenly over {expert_ranks} expert-parallel ranks")
    expert_tensor = layout.get("expert_tensor_parallel_size", tensor)
    tied = bool(plan.tied) or not any(item.megatron.startswith("output_layer.") for item in plan)
    found = {}
    for item in plan:
        size = expert_tensor if isinstance(item.rule.shard, Expert) else tensor
        if not item.rule.shard.divides(item.shape, size):
            raise BridgeError(f"{item.megatron} {list(item.shape)} cannot be divided evenly over {size} ranks")
        expert = item.indices.get("e")
        rank = None if expert is None else expert // (experts // expert_ranks)
        local = item.rule.shard.local_shape(item.shape, size)
        found[item.megatron] = Owner(_stages(item, layers // chunks, stages, tied), rank, local)
    return found


def _stages(item: PlanItem, layers_per_chunk: int, stages: int, tied: bool) -> tuple[int, ...]:
    if "l" in item.indices:
        return (item.indices["l"] // layers_per_chunk % stages,)
    if item.megatron.startswith(_EMBEDDING):
        shared = tied and item.megatron == f"{_EMBEDDING}word_embeddings.weight" and stages > 1
        return (0, stages - 1) if shared else (0,)
    return (stages - 1,)
