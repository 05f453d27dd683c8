"""Every placement that can run, with what it takes; and the fastest that fit. Torch-free."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.parallelism import DEPLOYMENT_MODES, MimoParallelismConfig, ModuleParallelismConfig
from megatron.bridge.mimo.planner.costs import EncoderCost, encoder_cost, encoder_flops
from megatron.bridge.mimo.planner.encoder_shape import EncoderShape
from megatron.bridge.mimo.violations import find_violations
from megatron.bridge.training.planner.candidates import candidates
from megatron.bridge.training.planner.hardware import Cluster
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.memory import stage_memory
from megatron.bridge.training.planner.plan import USABLE, Plan, Question, step_operations, unchecked

LANGUAGE = "language_module"


@dataclass(frozen=True)
class MimoQuestion:
    """What is to be placed.

    Attributes:
        language: the language model's question, for all devices.
        encoders: by name of the modality.
        modes: of deployment that are looked at.
    """

    language: Question
    encoders: Mapping[str, EncoderShape]
    modes: tuple[str, ...] = DEPLOYMENT_MODES

    @property
    def cluster(self) -> Cluster:
        """All devices."""
        return self.language.cluster

    @property
    def room(self) -> float:
        """Bytes of a device that a plan may fill."""
        return USABLE * self.cluster.device.memory_gb * 1e9

    @property
    def flops(self) -> float:
        """Model FLOPs of a step, of all modules."""
        samples = self.language.global_batch
        return step_operations(self.language) + sum(encoder_flops(each, samples) for each in self.encoders.values())


@dataclass(frozen=True, kw_only=True)
class MimoPlan:
    """A placement, and what a step takes.

    Attributes:
        placement: which has been found to work.
        layout: the language model's, with micro-batch and recomputation.
        micro_batches: of a step.
        memory: bytes of a module on its fullest rank.
        pass_seconds: of a module for one micro-batch on one of its ranks, forwards and backwards.
        fullest: bytes on the fullest rank, of all its modules.
        seconds: of a step.
        mfu: the share of the devices' bfloat16 peak.
    """

    placement: MimoParallelismConfig
    layout: Layout
    micro_batches: int
    memory: Mapping[str, float]
    pass_seconds: Mapping[str, float]
    fullest: float
    seconds: float
    mfu: float

    @property
    def mode(self) -> str:
        """The deployment mode."""
        return self.placement.mode

    def busy(self, module: str) -> float:
        """The share of a step in which a rank computes for a module."""
        return self.micro_batches * self.pass_seconds[module] / self.seconds


def best(question: MimoQuestion, count: int) -> dict[str, list[MimoPlan]]:
    """Of each mode the fastest placements that fit, fastest first; nothing of modes that cannot.

    Raises:
        BridgeError: none fits in any mode; says how much the smallest takes.
    """
    found: dict[str, list[MimoPlan]] = {mode: [] for mode in question.modes}
    smallest: MimoPlan | None = None
    for plan in plans(question):
        if smallest is None or plan.fullest < smallest.fullest:
            smallest = plan
        if plan.fullest <= question.room:
            found[plan.mode].append(plan)
    if not any(found.values()):
        raise BridgeError(_why_none(question, smallest))
    return {mode: _distinct(sorted(each, key=lambda plan: plan.seconds))[:count] for mode, each in found.items()}


def plans(question: MimoQuestion) -> Iterator[MimoPlan]:
    """Every placement that can run, whether it fits or not, with full recomputation where it does not without."""
    for mode in question.modes:
        for taken in _taken_ranks(question, mode):
            left = question.cluster.count - sum(taken.values())
            own = dataclasses.replace(question.language, cluster=Cluster(left, question.cluster.device))
            for layout in candidates(own.shape, own.cluster, own.global_batch):
                if layout.virtual == 1 and (layout.pipeline == 1 or mode != "colocated"):
                    yield from _with_and_without(question, own, mode, taken, layout)


def _with_and_without(
    question: MimoQuestion, own: Question, mode: str, taken: Mapping[str, int], layout: Layout
) -> Iterator[MimoPlan]:
    for each in (layout, dataclasses.replace(layout, recompute="full")):
        plan = _plan(question, own, mode, taken, each)
        if plan is not None:
            yield plan
        if plan is None or plan.fullest <= question.room:
            return


def _taken_ranks(question: MimoQuestion, mode: str) -> Iterator[dict[str, int]]:
    """Ranks that each encoder has for itself."""
    if mode != "heterogeneous":
        yield {}
        return
    powers = [1 << power for power in range((question.cluster.count - 1).bit_length())]
    for numbers in itertools.product(powers, repeat=len(question.encoders)):
        if sum(numbers) < question.cluster.count:
            yield dict(zip(question.encoders, numbers, strict=True))


def _plan(
    question: MimoQuestion, own: Question, mode: str, taken: Mapping[str, int], layout: Layout
) -> MimoPlan | None:
    """What the placement takes; None where it cannot run."""
    language = unchecked(own, layout)
    if language is None:
        return None
    placement = _placement(question, mode, taken, layout, language.replicas)
    samples = layout.micro_batch * language.replicas
    replicas = {name: each.data_parallel for name, each in placement.module_parallelisms.items()}
    if find_violations(placement, question.cluster.count) or any(samples % each for each in replicas.values()):
        return None
    stages = layout.pipeline + (mode == "heterogeneous")
    costs = {
        name: encoder_cost(
            encoder,
            question.cluster,
            own.size,
            replicas=replicas[name],
            samples=samples / replicas[name],
            under_way=min(language.micro_batches, stages),
        )
        for name, encoder in question.encoders.items()
    }
    return _put_together(question, own, placement, language, costs)


def _placement(
    question: MimoQuestion, mode: str, taken: Mapping[str, int], layout: Layout, replicas: int
) -> MimoParallelismConfig:
    language = ModuleParallelismConfig(
        tensor_parallel=layout.tensor,
        pipeline_parallel=layout.pipeline,
        context_parallel=layout.context,
        expert_parallel=layout.expert,
        data_parallel=replicas,
        rank_offset=sum(taken.values()),
    )
    modules: dict[str, ModuleParallelismConfig] = {}
    end = 0
    for name in question.encoders:
        if mode == "heterogeneous":
            modules[name] = ModuleParallelismConfig(data_parallel=taken[name], rank_offset=end)
            end += taken[name]
        else:
            modules[name] = dataclasses.replace(language)
        if mode == "colocated":
            modules[name] = _spread(question.cluster.count, replicas, layout.micro_batch * replicas)
    return MimoParallelismConfig(
        llm_module_name=LANGUAGE, deployment_mode=mode, module_parallelisms={**modules, LANGUAGE: language}
    )


def _spread(ranks: int, replicas: int, samples: int) -> ModuleParallelismConfig:
    """As many replicas of a colocated encoder as there are samples for; the rest of the ranks repeats their work."""
    data = max(
        each
        for each in range(1, ranks + 1)
        if ranks % each == 0 and samples % each == 0 and (each % replicas == 0 or replicas % each == 0)
    )
    return ModuleParallelismConfig(tensor_parallel=ranks // data, data_parallel=data)


def _put_together(
    question: MimoQuestion,
    own: Question,
    placement: MimoParallelismConfig,
    language: Plan,
    costs: Mapping[str, EncoderCost],
) -> MimoPlan:
    once, layout = language.time.compute / language.micro_batches, language.layout
    encoding = [cost.pass_seconds for cost in costs.values()]
    apart = placement.mode == "heterogeneous"
    stages = [once] * layout.pipeline
    # Encoders on ranks of their own work at the same time, before the language model's first stage; others within it.
    stages = [max(encoding), *stages] if apart else [once + sum(encoding), *stages[1:]]
    ends = [cost.step_seconds for cost in costs.values()]
    own_end = language.time.exposed + language.time.optimizer
    seconds = sum(stages) + (language.micro_batches - 1) * max(stages)
    seconds += max([own_end, *ends]) if apart else own_end + sum(ends)
    beside = sum(cost.memory for cost in costs.values())
    first = _first_stage(own, language)
    fullest = max([language.memory.total, *(cost.memory for cost in costs.values())])
    return MimoPlan(
        placement=placement,
        layout=layout,
        micro_batches=language.micro_batches,
        memory={**{name: cost.memory for name, cost in costs.items()}, LANGUAGE: language.memory.total},
        pass_seconds={**{name: cost.pass_seconds for name, cost in costs.items()}, LANGUAGE: once},
        fullest=fullest if apart else max(language.memory.total, first + beside),
        seconds=seconds,
        mfu=question.flops / seconds / question.cluster.count / (question.cluster.device.bf16_tflops * 1e12),
    )


def _first_stage(own: Question, language: Plan) -> float:
    """Bytes of the language model where the encoders stand beside it."""
    layout = language.layout
    return stage_memory(
        layout.at(own.shape),
        layout,
        0,
        replicas=language.replicas,
        micro_batches=language.micro_batches,
        size=own.size,
        spec=own.spec,
    ).total


def _distinct(plans: list[MimoPlan]) -> list[MimoPlan]:
    """The first of those with the same placement: they differ in micro-batches alone."""
    found: dict[str, MimoPlan] = {}
    for plan in plans:
        found.setdefault(repr(plan.placement), plan)
    return list(found.values())


def _why_none(question: MimoQuestion, smallest: MimoPlan | None) -> str:
    modes = ", ".join(question.modes)
    if smallest is None:
        return (
            f"no {modes} placement on {question.cluster} divides a batch of {question.language.global_batch} samples, "
            f"{question.language.shape.num_layers} layers and the ranks; change --global-batch-size or the number of "
            "devices"
        )
    return (
        f"no {modes} placement fits {question.cluster}: the smallest, {smallest.mode} with the language model at "
        f"{smallest.layout}, takes {smallest.fullest / 1e9:.4g} GB per device, and {USABLE:.0%} of "
        f"{question.cluster.device.memory_gb} GB can be used; take more devices, larger ones, or shorter sequences"
    )
