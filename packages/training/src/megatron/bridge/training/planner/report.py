"""Plans for people and for programs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.parameters import model_parameters
from megatron.bridge.training.planner.plan import USABLE, Plan, Question, unchecked

_GB = 1e9


def as_data(question: Question, plans: list[Plan]) -> dict[str, Any]:
    """Everything, in bytes, seconds and operations."""
    return {
        "parameters": model_parameters(question.shape),
        "devices": question.cluster.count,
        "device": dataclasses.asdict(question.cluster.device),
        "global_batch_size": question.global_batch,
        "seq_length": question.shape.seq_length,
        "plans": [_as_data(question, plan) for plan in plans],
    }


def _as_data(question: Question, plan: Plan) -> dict[str, Any]:
    overrides = {f"model.{name}": value for name, value in plan.layout.fields().items()}
    overrides |= {
        "train.micro_batch_size": plan.layout.micro_batch,
        "train.global_batch_size": question.global_batch,
    }
    return {
        **dataclasses.asdict(plan),
        "memory_total": plan.memory.total,
        "step_seconds": plan.time.total,
        "overrides": overrides,
        "reasons": list(reasons(question, plan)),
    }


def as_text(question: Question, plans: list[Plan]) -> str:
    """For people."""
    return "\n".join(_lines(question, plans))


def _lines(question: Question, plans: list[Plan]) -> Iterator[str]:
    shape = question.shape
    yield (
        f"{model_parameters(shape):,} parameters on {question.cluster}, {question.global_batch} sequences of "
        f"{shape.seq_length} tokens per step, {plans[0].flops:.3g} operations"
    )
    for plan in plans:
        memory, sent, time = plan.memory, plan.sent, plan.time
        yield ""
        yield f"{plan.layout}, replicas {plan.replicas}, micro-batches {plan.micro_batches}"
        yield (
            f"  step {time.total:.3g} s ({plan.mfu:.0%} MFU): compute {time.compute:.3g}, bubble {time.bubble:.2g} "
            f"({plan.bubble:.1%}), communication not hidden {time.exposed:.2g}, optimizer {time.optimizer:.2g}"
        )
        yield (
            f"  memory {memory.total / _GB:.3g} GB: weights {memory.weights / _GB:.3g}, gradients "
            f"{memory.gradients / _GB:.3g}, optimizer {memory.optimizer / _GB:.3g}, activations "
            f"{memory.activations / _GB:.3g}, logits {memory.logits / _GB:.3g}, working {memory.working / _GB:.3g}"
        )
        volumes = {name: value for name, value in dataclasses.asdict(sent).items() if value}
        yield "  sent per rank, GB: " + (", ".join(f"{name} {v / _GB:.3g}" for name, v in volumes.items()) or "nothing")
        yield from (f"  {reason}" for reason in reasons(question, plan))
    yield ""
    yield "use the first: " + " ".join(
        f"{key}={_written(value)}" for key, value in _as_data(question, plans[0])["overrides"].items()
    )


def _written(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def reasons(question: Question, plan: Plan) -> Iterator[str]:
    """Why this layout: what each of its parts is for, in memory or time."""
    room = USABLE * question.cluster.device.memory_gb * _GB
    layout = plan.layout
    for name, field, smaller in _SIMPLER:
        if getattr(layout, field) == getattr(smaller, field):
            continue
        changes = {field: getattr(smaller, field)} | ({"virtual": 1} if field == "pipeline" else {})
        other = unchecked(question, dataclasses.replace(layout, **changes))
        if other is None:
            continue
        without = f"{name}: without it {other.memory.total / _GB:.3g} GB"
        if other.memory.total > room:
            yield f"{without} would be needed, and {room / _GB:.3g} can be used"
        else:
            yield f"{without} and {other.time.total:.3g} s"


_PLAIN = Layout()
# What a layout has -> the field, and the layout that lacks it.
_SIMPLER = (
    ("tensor parallelism", "tensor", _PLAIN),
    ("pipeline parallelism", "pipeline", _PLAIN),
    ("virtual stages", "virtual", _PLAIN),
    ("context parallelism", "context", _PLAIN),
    ("expert parallelism", "expert", _PLAIN),
    ("full recomputation", "recompute", _PLAIN),
)
