"""Whether a model's sizes fit its parallel layout; every misfit is told with the sizes that would fit."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider


def layout_problems(provider: "GPTModelProvider") -> list[str]:
    """Every size that the layout cannot divide, in words."""
    checks = (_sizes, _tensor_parallel, _heterogeneous_layers, _latents, _pipeline_parallel, _experts)
    return [problem for check in checks for problem in check(provider)]


def _sizes(provider: "GPTModelProvider") -> Iterator[str]:
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(provider, name) <= 0:
            yield f"{name}={getattr(provider, name)}: must be positive"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if getattr(provider, name) < 1:
            yield f"{name}={getattr(provider, name)}: must be at least 1"


def _tensor_parallel(provider: "GPTModelProvider") -> Iterator[str]:
    size = provider.tensor_model_parallel_size
    heads, groups = provider.num_attention_heads, provider.num_query_groups or provider.num_attention_heads
    if size < 1 or heads <= 0:
        return
    if heads % groups:
        yield f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}"
    if heads % size:
        yield (
            f"tensor_model_parallel_size={size} does not divide num_attention_heads={heads}; "
            f"sizes that do: {_divisors(heads)}"
        )
    elif groups % size and size % groups:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        yield (
            f"tensor_model_parallel_size={size} and num_query_groups={groups}: one must divide the other; "
            f"sizes that fit: {', '.join(map(str, fitting))}"
        )
    ffn = provider.ffn_hidden_size
    if ffn is not None and ffn % size:
        fitting_ffn = _divisors(ffn)
        yield f"tensor_model_parallel_size={size} does not divide ffn_hidden_size={ffn}; sizes that do: {fitting_ffn}"
    if provider.sequence_parallel and size == 1:
        yield "sequence_parallel=True needs tensor_model_parallel_size > 1; set sequence_parallel=False"


def _heterogeneous_layers(provider: "GPTModelProvider") -> Iterator[str]:
    layers, told = provider.heterogeneous_layers, set(_tensor_parallel(provider))
    for index, sizes in enumerate(layers.sizes if layers else ()):
        for problem in _tensor_parallel(provider.replace(**sizes)):
            if problem not in told:
                told.add(problem)
                yield f"layer {index}: {problem}"


def _latents(provider: "GPTModelProvider") -> Iterator[str]:
    size = provider.tensor_model_parallel_size
    if not provider.multi_latent_attention or size < 1:
        return
    latents = {
        "q_lora_rank": provider.q_lora_rank,
        "kv_lora_rank + qk_pos_emb_head_dim": provider.kv_lora_rank + provider.qk_pos_emb_head_dim,
    }
    for name, rank in latents.items():
        if rank is not None and rank % size:
            yield f"tensor_model_parallel_size={size} does not divide {name}={rank}; sizes that do: {_divisors(rank)}"


def _pipeline_parallel(provider: "GPTModelProvider") -> Iterator[str]:
    stages, virtual = provider.pipeline_model_parallel_size, provider.virtual_pipeline_model_parallel_size
    if stages < 1 or provider.pipeline_model_parallel_layout is not None:
        return
    uneven = provider.num_layers_in_first_pipeline_stage, provider.num_layers_in_last_pipeline_stage
    if uneven != (None, None):
        return
    if virtual is not None and stages == 1:
        yield "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1; set it to None"
        return
    parts = stages * (virtual or 1)
    layers = provider.num_layers
    if layers > 0 and layers % parts:
        what = f"pipeline_model_parallel_size={stages}" + (
            f" x virtual_pipeline_model_parallel_size={virtual} = {parts} parts" if virtual else ""
        )
        yield f"{what} does not divide num_layers={layers}; numbers of parts that do: {_divisors(layers)}"


def _experts(provider: "GPTModelProvider") -> Iterator[str]:
    experts, parts = provider.num_moe_experts, provider.expert_model_parallel_size
    if experts is None:
        if parts > 1:
            yield f"expert_model_parallel_size={parts}: the model has no experts (num_moe_experts); set it to 1"
        return
    if parts >= 1 and experts % parts:
        yield (
            f"expert_model_parallel_size={parts} does not divide num_moe_experts={experts}; "
            f"sizes that do: {_divisors(experts)}"
        )
    size = provider.expert_tensor_parallel_size or provider.tensor_model_parallel_size
    ffn = provider.moe_ffn_hidden_size or provider.ffn_hidden_size
    if size >= 1 and ffn is not None and ffn % size:
        fitting = _divisors(ffn)
        yield f"expert_tensor_parallel_size={size} does not divide moe_ffn_hidden_size={ffn}; sizes that do: {fitting}"


def _divisors(number: int, listed: int = 12) -> str:
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found[:listed])) + (", ..." if len(found) > listed else "")
