"""The planner's parameters are a model's own, exactly; its memory is what a training step is measured to take."""

import gc
from typing import Any

import pytest
import torch

from megatron.bridge.models import GPTModelProvider
from megatron.bridge.testing import LiveBytes, run_ranks
from megatron.bridge.training import config as c
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.memory import stage_memory
from megatron.bridge.training.planner.parameters import stage_parts
from megatron.bridge.training.planner.precision import bytes_of
from megatron.bridge.training.planner.shape import shape_of
from megatron.bridge.training.setup import distributed, setup
from megatron.bridge.training.step import train_step

GELU = {
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "num_query_groups": 8,
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 192,
}
TIED = {"share_embeddings_and_output_weights": True}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 192,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_shared_expert_intermediate_size": 128,
}
BF16, FP32 = torch.bfloat16, torch.float32
# Name -> layout, type, and what is particular about the model.
ONE_RANK: dict[str, tuple[Layout, Any, dict[str, Any]]] = {
    "bf16": (Layout(), BF16, {}),
    "fp32, tied": (Layout(), FP32, TIED),
    "two sequences": (Layout(micro_batch=2), BF16, {"qk_layernorm": True}),
    "recomputed": (Layout(micro_batch=2, recompute="full"), BF16, {}),
    "LayerNorms and biases": (Layout(), FP32, GELU),
    "experts": (Layout(), BF16, EXPERTS),
}
TWO_RANKS: dict[str, tuple[Layout, Any, dict[str, Any]]] = {
    "TP2": (Layout(tensor=2), BF16, {}),
    "PP2": (Layout(pipeline=2), BF16, {}),
    "PP2 VPP2, tied": (Layout(pipeline=2, virtual=2), BF16, TIED),
    "CP2": (Layout(context=2), BF16, {}),
    "DP2": (Layout(micro_batch=2), BF16, {}),
    "EP2": (Layout(expert=2), BF16, EXPERTS),
}
# Micro-batches of a step: as many as two pipeline stages have under way.
BATCHES = 2


def run_of(layout: Layout, dtype: torch.dtype, particular: dict[str, Any], replicas: int) -> c.ConfigContainer:
    """A model large enough that its tensors, and not what surrounds them, decide."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 704,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 32,
        "vocab_size": 2048,
        "seq_length": 192,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_spec": "torch",
        "params_dtype": dtype,
        "bf16": dtype == BF16,
    }
    model = GPTModelProvider(**(values | particular | layout.fields()))
    batch = BATCHES * replicas * layout.micro_batch
    return c.ConfigContainer(
        model=model,
        dataset=c.GPTDatasetConfig(mock=True, sequence_length=192, split="90,10,0"),
        train=c.TrainingConfig(train_iters=2, global_batch_size=batch, micro_batch_size=layout.micro_batch),
        optimizer=c.OptimizerConfig(lr=1e-3, use_distributed_optimizer=True),
        ddp=c.DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        scheduler=c.SchedulerConfig(lr_decay_style="constant"),
        tokenizer=c.TokenizerConfig(vocab_size=2048),
        logger=c.LoggerConfig(progress=False),
    )


def measured(cases: dict[str, tuple[Layout, Any, dict[str, Any]]]) -> dict[str, tuple[int, float, int, float]]:
    """Of each case on this rank: parameters and highest bytes of the second step, measured and planned."""
    from megatron.core import parallel_state

    from megatron.bridge import platform

    platform.initialize_distributed()  # once for all: what every one leaves behind takes time
    found = {}
    for name, (layout, dtype, particular) in cases.items():
        replicas = platform.world_size() // layout.ranks
        cfg = run_of(layout, dtype, particular, replicas)
        with distributed(cfg), LiveBytes() as memory:
            run = setup(cfg)
            train_step(run, forward_step)
            memory.peak = memory.live
            train_step(run, forward_step)
            stage = parallel_state.get_pipeline_model_parallel_rank()
            own = sum(each.numel() for chunk in run.model for each in chunk.parameters())
            peak = memory.peak
        shape = shape_of(cfg.model)
        planned = stage_memory(
            shape,
            layout,
            stage,
            replicas=replicas,
            micro_batches=BATCHES,
            size=bytes_of(str(dtype).removeprefix("torch.")),
            spec="torch",
        )
        counted = sum(part.count for part in stage_parts(shape, stage))
        found[name] = (own, peak, counted, planned.total)
        del run
        gc.collect()
    return found


@pytest.mark.parametrize(("ranks", "cases"), [(1, ONE_RANK), (2, TWO_RANKS)], ids=["1", "2"])
def test_parameters_are_exact_and_memory_is_within_a_tenth(
    ranks: int, cases: dict[str, tuple[Layout, Any, dict[str, Any]]]
) -> None:
    for rank, found in enumerate(run_ranks(ranks, measured, cases, timeout=280)):
        for name, (own, peak, counted, planned) in found.items():
            print(f"rank {rank}, {name}: {own} parameters, peak {peak / 1e6:.1f} MB, planned {planned / peak - 1:+.1%}")
            assert counted == own, f"{name}, rank {rank}"
            assert planned == pytest.approx(peak, rel=0.1), f"{name}, rank {rank}"
