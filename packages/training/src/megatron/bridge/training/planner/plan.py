"""What a run takes at one layout, and the layouts that take the least time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.flops import config_flops_per_token
from megatron.bridge.training.planner.activations import Spec
from megatron.bridge.training.planner.candidates import candidates, problems
from megatron.bridge.training.planner.communication import Communication, communication
from megatron.bridge.training.planner.hardware import Cluster
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.memory import Memory, rank_memory
from megatron.bridge.training.planner.parameters import model_parameters
from megatron.bridge.training.planner.precision import Bytes
from megatron.bridge.training.planner.shape import ModelShape
from megatron.bridge.training.planner.step_time import StepTime, bubble_share, step_time

# How much of a device's memory a plan may fill: the rest is for CUDA, NCCL and fragments. Ours.
USABLE = 0.90


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        shape: the model, with its sequence length, undivided.
        cluster: where it is to run.
        global_batch: sequences per step.
        size: bytes per parameter.
        eight_bit: whether products are in FP8.
        spec: whose modules.
    """

    shape: ModelShape
    cluster: Cluster
    global_batch: int
    size: Bytes = Bytes()
    eight_bit: bool = False
    spec: Spec = "transformer_engine"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes at a layout, per rank and step.

    Attributes:
        layout: how it is divided.
        replicas, micro_batches: how many replicas there are, and micro-batches of a step for each.
        memory, sent, time: of the fullest rank, of the first stage, of the busiest rank.
        bubble: share of the step that pipeline stages wait.
        flops: operations of the step, on all ranks together.
        mfu: the share of the devices' bfloat16 peak that this comes to.
    """

    layout: Layout
    replicas: int
    micro_batches: int
    memory: Memory
    sent: Communication
    time: StepTime
    bubble: float
    flops: float
    mfu: float


def planned(question: Question, layout: Layout) -> Plan:
    """What the run takes at `layout`.

    Raises:
        BridgeError: it cannot run so.
    """
    world = question.cluster.count
    if found := problems(question.shape, layout, world, question.global_batch):
        raise BridgeError(f"{layout} on {question.cluster} cannot run:\n  " + "\n  ".join(found))
    return _planned(question, layout)


def unchecked(question: Question, layout: Layout) -> Plan | None:
    """What it would take at `layout`, whether it fits or not; None where it cannot run."""
    if problems(question.shape, layout, question.cluster.count, question.global_batch):
        return None
    return _planned(question, layout)


def _planned(question: Question, layout: Layout) -> Plan:
    shape, device, run = layout.at(question.shape), question.cluster.device, _run(question, layout)
    time = step_time(shape, layout, device, eight_bit=question.eight_bit, **run)
    flops = step_operations(question)
    return Plan(
        layout=layout,
        replicas=run["replicas"],
        micro_batches=run["micro_batches"],
        memory=_memory(question, layout),
        sent=communication(shape, layout, **run),
        time=time,
        bubble=bubble_share(layout, run["micro_batches"]),
        flops=flops,
        mfu=flops / time.total / question.cluster.count / (device.bf16_tflops * 1e12),
    )


def _memory(question: Question, layout: Layout) -> Memory:
    return rank_memory(layout.at(question.shape), layout, spec=question.spec, **_run(question, layout))


def _run(question: Question, layout: Layout) -> dict[str, Any]:
    """How the batch is divided, and into what."""
    replicas = question.cluster.count // layout.ranks
    batches = question.global_batch // (replicas * layout.micro_batch)
    return {"replicas": replicas, "micro_batches": batches, "size": question.size}


def step_operations(question: Question) -> float:
    """Model FLOPs of a step: forward and backward, nothing for what is computed again."""
    shape = question.shape
    per_token = config_flops_per_token(shape, shape.seq_length, shape.padded_vocab_size)
    return 3 * per_token * question.global_batch * shape.seq_length


def best(question: Question, count: int = 3) -> list[Plan]:
    """The fastest layouts that fit, fastest first.

    Raises:
        BridgeError: none fits, or none can run; says how much memory the smallest one takes.
    """
    room = USABLE * question.cluster.device.memory_gb * 1e9
    fitting: list[Plan] = []
    smallest: tuple[float, Layout] | None = None
    for layout in candidates(question.shape, question.cluster, question.global_batch):
        for each in (layout, dataclasses.replace(layout, recompute="full")):
            taken = _memory(question, each).total
            if smallest is None or taken < smallest[0]:
                smallest = taken, each
            if taken <= room:
                fitting.append(_planned(question, each))
                break
    if not fitting:
        raise BridgeError(_why_none(question, smallest))
    return sorted(fitting, key=lambda plan: plan.time.total)[:count]


def _why_none(question: Question, smallest: tuple[float, Layout] | None) -> str:
    parameters = f"{model_parameters(question.shape) / 1e9:.4g}B parameters"
    if smallest is None:
        return (
            f"no layout of a model of {parameters} on {question.cluster} divides a batch of {question.global_batch} "
            f"sequences and {question.shape.num_layers} layers; change --global-batch-size, or the number of devices"
        )
    return (
        f"a model of {parameters} does not fit {question.cluster}: the smallest layout, {smallest[1]}, takes "
        f"{smallest[0] / 1e9:.4g} GB per device, and {USABLE:.0%} of {question.cluster.device.memory_gb} GB "
        "can be used; take more devices, larger ones, or shorter sequences"
    )
