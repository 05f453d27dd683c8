"""Placements for people, for programs, and as files of experiments."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.mimo.drawing import written, written_sizes
from megatron.bridge.mimo.parallelism import ModuleParallelismConfig
from megatron.bridge.mimo.planner.search import LANGUAGE, MimoPlan, MimoQuestion
from megatron.bridge.training.planner.parameters import model_parameters

_GB = 1e9
_SCHEDULES = {"homogeneous": "homogeneous", "colocated": "colocated", "heterogeneous": "1f1b"}


def as_text(question: MimoQuestion, found: Mapping[str, Sequence[MimoPlan]]) -> str:
    """For people."""
    return "\n".join(_lines(question, found))


def _lines(question: MimoQuestion, found: Mapping[str, Sequence[MimoPlan]]) -> Iterator[str]:
    asked = question.language
    sizes = {name: each.tower_parameters + each.projector_parameters for name, each in question.encoders.items()}
    parts = [f"{name} {size:,}" for name, size in {**sizes, LANGUAGE: model_parameters(asked.shape)}.items()]
    yield (
        f"{', '.join(parts)} parameters on {question.cluster}, {asked.global_batch} samples of "
        f"{asked.shape.seq_length} tokens per step"
    )
    for mode, plans in found.items():
        if not plans:
            yield f"\n{mode}: no placement can run, or none fits"
        for plan in plans:
            yield ""
            yield from _plan_lines(plan)
    first = winner(found)
    yield f"\nthe least time: {first.mode}, {written(first.placement)}. {reason(first, found)}"


def _plan_lines(plan: MimoPlan) -> Iterator[str]:
    recompute = ", full recomputation" if plan.layout.recompute == "full" else ""
    yield (
        f"{plan.mode}: step {plan.seconds:.3g} s ({plan.mfu:.0%} MFU), {plan.micro_batches} micro-batches of "
        f"{plan.layout.micro_batch}{recompute}, {plan.fullest / _GB:.3g} GB on the fullest rank"
    )
    for name, layout in plan.placement.module_parallelisms.items():
        yield (
            f"  {name} {written_sizes(layout)} on ranks {layout.ranks.start}-{layout.ranks.stop - 1}: "
            f"{plan.memory[name] / _GB:.3g} GB, computes {plan.micro_batches * plan.pass_seconds[name]:.3g} s "
            f"({plan.busy(name):.0%} of the step)"
        )


def winner(found: Mapping[str, Sequence[MimoPlan]]) -> MimoPlan:
    """The placement of the least time, of all modes."""
    return min((plans[0] for plans in found.values() if plans), key=lambda plan: plan.seconds)


def reason(first: MimoPlan, found: Mapping[str, Sequence[MimoPlan]]) -> str:
    """What the other modes lose."""
    told = []
    for mode, plans in found.items():
        if mode != first.mode and plans:
            told.append(f"{mode} takes {plans[0].seconds / first.seconds - 1:.0%} more: {_loses(plans[0])}")
    return "; ".join(told)


def _loses(plan: MimoPlan) -> str:
    """Where the time of a placement goes that another one saves."""
    if plan.mode == "heterogeneous":
        idle = min(plan.pass_seconds, key=plan.busy)
        return f"the ranks of {idle} compute {plan.busy(idle):.0%} of a step"
    repeated = max(
        (layout.total_ranks // layout.data_parallel, name)
        for name, layout in plan.placement.module_parallelisms.items()
        if name != LANGUAGE
    )
    if repeated[0] > 1:
        return f"{repeated[0]} ranks compute the same of {repeated[1]}"
    return f"its ranks compute {sum(map(plan.busy, plan.pass_seconds)):.0%} of a step"


def as_data(question: MimoQuestion, found: Mapping[str, Sequence[MimoPlan]]) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    asked = question.language
    return {
        "devices": question.cluster.count,
        "device": dataclasses.asdict(question.cluster.device),
        "global_batch_size": asked.global_batch,
        "seq_length": asked.shape.seq_length,
        "plans": {mode: [dataclasses.asdict(each) for each in plans] for mode, plans in found.items()},
    }


def write_experiments(
    found: Mapping[str, Sequence[MimoPlan]], question: MimoQuestion, folder: Path, recipe: str | None
) -> list[Path]:
    """Write each placement as a file for `megatron-bridge mimo run`; returns what was written."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for mode, plans in found.items():
        for number, plan in enumerate(plans, start=1):
            files.append(folder / f"{mode}_{number}.yaml")
            files[-1].write_text(yaml.safe_dump(_experiment(plan, question, recipe), sort_keys=False), encoding="utf-8")
    return files


def _experiment(plan: MimoPlan, question: MimoQuestion, recipe: str | None) -> dict[str, Any]:
    modules = {name: _stated(layout) for name, layout in plan.placement.module_parallelisms.items()}
    return {
        **({} if recipe is None else {"recipe": recipe}),
        "model": {"llm_module_name": LANGUAGE, "module_parallelisms": modules},
        "runtime": {
            "pipeline_schedule": _SCHEDULES[plan.mode],
            "global_batch_size": question.language.global_batch,
            "num_microbatches": plan.micro_batches,
        },
    }


def _stated(layout: ModuleParallelismConfig) -> dict[str, int]:
    plain = ModuleParallelismConfig()
    return {name: value for name, value in vars(layout).items() if value != getattr(plain, name)}
