"""How long a step takes: products at a share of the peak, the rest at a share of the memory's speed, and what waits.

The shares are ours: chosen so that the step times that NVIDIA published (`integration_tests/test_planner_published.py`)
come out with the least median error, which the same tests hold to rows that took no part. They hold for well-tuned
kernels; a run may be slower.
"""

from dataclasses import dataclass

from megatron.bridge.training.flops import attention_flops_per_token, config_flops_per_token
from megatron.bridge.training.planner.activations import Kept
from megatron.bridge.training.planner.communication import communication
from megatron.bridge.training.planner.hardware import Accelerator
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.parameters import stage_layers, stage_parts
from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.shape import ModelShape

# Shares of the peak that matrix products reach in 16 and in 8 bits, and attention (which skips half of the scores).
PRODUCTS, PRODUCTS_8_BIT, ATTENTION = 0.65, 0.45, 0.40
# Rows at which an expert's products reach half of that: no published time says, so this is a guess.
EXPERT_ROWS = 256
# Seconds that a token takes in a layer of experts beside products and exchange: routing, sorting, many small kernels.
EXPERT_TOKEN = 1.6e-6
# How often each kept byte is read or written beside the products, forwards and backwards; share of the memory's speed.
TOUCHED, MEMORY = 6.0, 0.75
# Shares of communication that nothing hides.
EXPOSED_TENSOR, EXPOSED_CONTEXT, EXPOSED_EXPERT, EXPOSED_PIPELINE = 0.2, 0.2, 1.0, 0.2
# Of the time of a network, how much is not overhead.
NETWORK = 0.8


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on the busiest rank.

    Attributes:
        compute: of forward and backward passes.
        bubble: waiting for other pipeline stages, at start and end.
        exposed: communication that nothing hides.
        optimizer: the update of parameters.
    """

    compute: float
    bubble: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.bubble + self.exposed + self.optimizer


def step_time(
    shape: ModelShape,
    layout: Layout,
    device: Accelerator,
    *,
    replicas: int,
    micro_batches: int,
    size: Bytes,
    eight_bit: bool = False,
) -> StepTime:
    """The time of a step; arguments as `memory.stage_memory`'s.

    Args:
        shape, layout: the model at the layout.
        device: that each rank has.
        replicas, micro_batches, size: see there.
        eight_bit: whether products are in FP8.
    """
    once = _pass_seconds(shape, layout, device, size, eight_bit=eight_bit)
    compute = micro_batches * once
    sent = communication(shape, layout, replicas=replicas, micro_batches=micro_batches, size=size)
    inner = device.bandwidth(layout.tensor) * NETWORK
    around = device.bandwidth(layout.tensor * layout.context) * NETWORK
    outer = device.bandwidth(layout.ranks * replicas) * NETWORK
    experts = device.bandwidth(layout.expert * layout.expert_tensor) * NETWORK
    exposed = EXPOSED_TENSOR * sent.tensor / inner + EXPOSED_CONTEXT * sent.context / around
    exposed += EXPOSED_EXPERT * sent.expert / experts + EXPOSED_PIPELINE * sent.pipeline / outer
    # Gradients are reduced during the last backward pass and parameters gathered during the first forward pass.
    exposed += max(0.0, sent.data / outer - once)
    return StepTime(
        compute=compute,
        bubble=(layout.pipeline - 1) / layout.virtual * once,
        exposed=exposed,
        optimizer=_optimizer_seconds(shape, layout, device, replicas, size),
    )


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """The share of a step that a pipeline stage waits: (p - 1) / v of m + (p - 1) / v (arXiv:2104.04473)."""
    waits = (layout.pipeline - 1) / layout.virtual
    return waits / (micro_batches + waits)


def _pass_seconds(shape: ModelShape, layout: Layout, device: Accelerator, size: Bytes, *, eight_bit: bool) -> float:
    """One micro-batch forwards and backwards through one stage."""
    tokens = layout.micro_batch * shape.seq_length / layout.context
    passes = (4 if layout.recompute == "full" else 3) * tokens / (layout.tensor * layout.pipeline)
    scores = passes * attention_flops_per_token(shape, shape.seq_length)
    products = passes * config_flops_per_token(shape, shape.seq_length, shape.padded_vocab_size) - scores
    products += passes * _lost_on_few_rows(shape, layout, tokens)
    if eight_bit and device.fp8_tflops is not None:
        seconds = products / (PRODUCTS_8_BIT * device.fp8_tflops * 1e12)
    else:
        seconds = products / (PRODUCTS * device.bf16_tflops * 1e12)
    seconds += scores / 2 / (ATTENTION * device.bf16_tflops * 1e12)
    kept, kinds = Kept(shape, size), stage_layers(shape, 0)
    layers = sum(kept.layer(experts=kind) for kind in set(kinds)) / len(set(kinds)) * len(kinds)
    seconds += tokens * layers * TOUCHED / (MEMORY * device.memory_gbps * 1e9)
    return seconds + tokens / layout.tensor * sum(kinds) * EXPERT_TOKEN


def _lost_on_few_rows(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Operations per token that experts could have done in the time that small products waste."""
    layers = sum(shape.has_experts)
    if not layers:
        return 0.0
    width = (3 if shape.gated_linear_unit else 2) * (shape.moe_ffn_hidden_size or 0)
    routed = 2.0 * layers * shape.moe_router_topk * shape.hidden_size * width
    rows = tokens / layout.tensor * shape.moe_router_topk * layout.expert / (shape.num_moe_experts or 1)
    return routed * EXPERT_ROWS / rows


def _optimizer_seconds(shape: ModelShape, layout: Layout, device: Accelerator, replicas: int, size: Bytes) -> float:
    """AdamW reads and writes its part and the weight, and reads the gradient."""
    weights = sum(part.count for part in stage_parts(shape, 0))
    shares = replicas * layout.context if size.distributed else 1
    return weights / shares * (2 * size.optimizer + size.gradient + size.weight) / (MEMORY * device.memory_gbps * 1e9)
