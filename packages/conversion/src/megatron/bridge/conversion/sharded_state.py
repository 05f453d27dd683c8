"""What is in a Megatron-Core sharded state dict: tensors and objects, factories applied."""

from collections.abc import Iterable
from typing import Any

from megatron.bridge.conversion.checkpoint_layout import CheckpointError
from megatron.bridge.conversion.rank_agreement import gather, on_every_rank

type ShardedStateDict = dict[str, Any]


def expanded(sharded_state_dict: ShardedStateDict) -> list[Any]:
    """Every sharded tensor and object, factories applied; the given dict stays as it is."""
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    return list(shards(load_preprocess(sharded_state_dict)[0]))


def shards(sharded_state_dict: ShardedStateDict) -> Iterable[Any]:
    """Every sharded entry as it is, factories included."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    return (value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedBase))


def unique_key(shard: Any) -> str:
    """The key under which a checkpoint has it: objects one by one (`key/shard_0_2`), tensors under their global key."""
    return str(getattr(shard, "unique_key", shard.key))


def check_sharding(described: list[Any]) -> None:
    """Refuse shards that do not cover each tensor exactly once over all ranks (checked on rank 0)."""
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    everywhere = gather([shard.without_data() for shard in described])
    on_every_rank(
        lambda: validate_sharding_integrity(everywhere), "the ranks' shards do not fit together", CheckpointError
    )
