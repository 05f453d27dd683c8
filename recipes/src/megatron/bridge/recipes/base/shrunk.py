"""A tiny model of the same kind, trained for two steps: the same code, on any machine."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.bridge.recipes.base.description import Description

# Field of `config.json` -> the most that a tiny model has of it.
_MOST = {
    "vocab_size": 512,
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "n_positions": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    # State-space layers.
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    # Images.
    "depth": 2,
    "num_heads": 2,
    "image_size": 28,
    "projection_dim": 32,
    "image_seq_length": 4,
    "out_hidden_size": 64,
    "image_token_index": 500,
    "image_token_id": 501,
    "video_token_id": 502,
    "vision_start_token_id": 503,
    "vision_end_token_id": 504,
}
# Lists by layer, or by channel.
_INSTEAD = {"mrope_section": [2, 3, 3], "fullatt_block_indexes": [1]}
# Ids of tokens that the small vocabulary has.
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_RUN = {
    "model.seq_length": 32,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "train.train_iters": 2,
    "scheduler.lr_warmup_fraction": 0.5,
    "logger.progress": False,
}
_LAYOUT = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.sequence_parallel",
    "scheduler.lr_warmup_iters",
    "scheduler.lr_decay_iters",
    "peft.dim",
)


def shrunk(description: Description) -> Description:
    """The same run with a tiny model, for two steps on one rank."""
    small = dataclasses.replace(description, hf_config=_shrunk(description.hf_config))
    return small.without(*_LAYOUT).but("ours: shrunk", _RUN)


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _smaller(name, value) for name, value in config.items()}
    kinds = values.get("layers_block_type")
    if kinds is not None:
        values["layers_block_type"] = list(dict.fromkeys(kinds))  # one of each
        values["num_hidden_layers"] = len(values["layers_block_type"])
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][-values["num_hidden_layers"] :]
        # Where one kind of layer in six sees all, two layers in a row may be of one kind.
        values["layer_types"][-1] = "full_attention"
    if "vocab_size" in config:
        values |= _IDS
    if "num_key_value_heads" in config and config["num_key_value_heads"] == config["num_attention_heads"]:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _shrunk(value)
    if name in _INSTEAD:
        return _INSTEAD[name]
    return min(value, _MOST[name]) if name in _MOST and value is not None else value
