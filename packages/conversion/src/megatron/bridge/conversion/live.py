"""The live executor's way in: Hugging Face weights to a model that is spread over tensor-, pipeline- and
expert-parallel ranks.

Every rank reads only the bytes it owns. The plan is proven before the first byte moves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron.bridge.conversion.entries import entry_of
from megatron.bridge.conversion.live_weights import Layout, as_chunks, canonical_weights
from megatron.bridge.conversion.plan import Plan, PlanError, PlanItem, import_plan
from megatron.bridge.conversion.rank_agreement import on_every_rank
from megatron.bridge.conversion.shards import Expert, cut_axis
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.conversion.transforms import Region, Shape, whole

if TYPE_CHECKING:
    import torch

type Model = "torch.nn.Module | Sequence[torch.nn.Module]"
type Progress = Callable[[str, int], None]


class WeightSource(Protocol):
    """Hugging Face weights by name: an open folder, or tensors in memory."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str, region: Region) -> "torch.Tensor": ...


@dataclass(frozen=True)
class TensorsInMemory:
    """A `WeightSource` over tensors at hand, e.g. a transformers state dict."""

    tensors: "Mapping[str, torch.Tensor]"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, region: Region) -> "torch.Tensor":
        return self.tensors[name][tuple(slice(start, stop) for start, stop in region)]


@dataclass(frozen=True)
class SourceTensor:
    """A weight of a source, for transforms to read."""

    source: WeightSource
    name: str
    shape: Shape

    def read(self, region: Region) -> "torch.Tensor":
        entry = entry_of(self.name)
        if entry is None:
            return self.source.read(self.name, region)
        name, index = entry
        return self.source.read(name, ((index, index + 1), *region))[0]


@dataclass(frozen=True)
class MegatronIndex:
    """Every weight of a spread model: global shape, dtype, and the ranks that hold it.

    `owners` are pipeline ranks, several when a weight is tied; `expert_owners` the expert-parallel rank of each weight
    of an expert.
    """

    shapes: Mapping[str, Shape]
    dtypes: "Mapping[str, torch.dtype]"
    owners: Mapping[str, tuple[int, ...]]
    expert_owners: Mapping[str, int]


@dataclass(frozen=True)
class _Held:
    """What an index says of one weight; `expert_rank` is None for a weight that every expert-parallel rank holds."""

    shape: Shape
    dtype: "torch.dtype"
    expert_rank: int | None


def megatron_index(table: WeightTable, local: "Mapping[str, torch.Tensor]", layout: Layout) -> MegatronIndex:
    """Gather names, global shapes and dtypes. Collective over the expert-parallel and the pipeline groups."""
    here = {name: _held(table, name, tensor, layout) for name, tensor in local.items()}
    # The ranks of an expert-parallel group differ in their experts only.
    experts = {name: held for name, held in here.items() if held.expert_rank is not None}
    here = {name: held for name, held in here.items() if held.expert_rank is None}
    for of_rank in _all_gathered(experts, layout.expert_group, layout.expert_size):
        here |= of_rank
    by_stage = _all_gathered(here, layout.pipeline_group, layout.pipeline_size)
    everything = {name: held for stage in by_stage for name, held in stage.items()}
    return MegatronIndex(
        shapes={name: held.shape for name, held in everything.items()},
        dtypes={name: held.dtype for name, held in everything.items()},
        owners={name: tuple(stage for stage, names in enumerate(by_stage) if name in names) for name in everything},
        expert_owners={name: held.expert_rank for name, held in everything.items() if held.expert_rank is not None},
    )


def _held(table: WeightTable, name: str, tensor: "torch.Tensor", layout: Layout) -> _Held:
    met, shape = table.resolve(name), tuple(tensor.shape)
    if met is None:  # refused by the plan, which shows the local shape
        return _Held(shape, tensor.dtype, layout.expert_rank)
    rule = met[0].shard
    whole_shape = rule.global_shape(shape, layout.dividing(rule).size())
    return _Held(whole_shape, tensor.dtype, layout.expert_rank if isinstance(rule, Expert) else None)


def _all_gathered[T](value: T, group: Any, size: int) -> list[T]:
    import torch.distributed as dist

    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def load_weights(
    model: Model,
    table: WeightTable,
    source: WeightSource,
    what: str = "import",
    progress: Progress | None = None,
    groups: Any = None,
    kept: Sequence[str] = (),
    adapter: "Mapping[str, torch.Tensor] | None" = None,
) -> Plan:
    """Fill a model with Hugging Face weights. Collective over the model's ranks.

    Args:
        model: chunks of this rank, wrapped or not.
        table: the family's rules.
        source: where the weights are.
        what: named in errors, e.g. the folder.
        progress: called with each Megatron name and the elements read for it on this rank.
        groups: process groups, as in `Layout.of`.
        kept: Megatron weights that keep their values, because the caller knows that the source has none for them.
        adapter: this rank's weights of an adapter, by canonical name, which are filled instead of the model's own.

    Raises:
        PlanError: the two sides do not correspond; no weight was touched.
        BridgeError: reading failed on some rank (raised on all).
    """
    chunks = as_chunks(model)
    layout = Layout.of(chunks, groups)
    held = canonical_weights(chunks, layout) if adapter is None else adapter
    local = {name: weight for name, weight in held.items() if name not in kept}
    index = megatron_index(table, local, layout)
    plan = import_plan(table, source.shapes, index.shapes, what)
    _refuse_uneven(plan, layout, what)

    def fill() -> None:
        check_ties(plan, source, what)
        for item in plan:
            if item.megatron in local:
                _fill(local[item.megatron], item, source, layout)
                if progress is not None:
                    progress(item.megatron, local[item.megatron].numel())

    # A framework with groups of its own may have ranks besides that do not load.
    on_every_rank(fill, f"{what} failed", PlanError, None if groups is None else layout.groups)
    return plan


def _refuse_uneven(plan: Plan, layout: Layout, what: str) -> None:
    for item in plan:
        rule = item.rule.shard
        size = layout.dividing(rule).size()
        if not rule.divides(item.shape, size):
            kind = "expert-tensor" if isinstance(rule, Expert) else "tensor"
            raise PlanError(
                f"{what}: {item.megatron} {list(item.shape)} cannot be divided evenly over "
                f"{size} {kind}-parallel ranks ({rule})"
            )


def _fill(target: "torch.Tensor", item: PlanItem, source: WeightSource, layout: Layout) -> None:
    import torch

    inputs = [SourceTensor(source, name, shape) for name, shape in zip(item.hf, item.hf_shapes, strict=True)]
    rule = item.rule.shard
    group, axis = layout.dividing(rule), cut_axis(rule)
    regions = rule.regions(item.shape, group.rank(), group.size())
    with torch.no_grad():
        done = 0
        for region in regions:
            piece = item.rule.transform.forward(inputs, region)
            if len(regions) == 1:
                target.copy_(piece)
            else:
                target.narrow(axis, done, piece.shape[axis]).copy_(piece)
                done += piece.shape[axis]


def check_ties(plan: Plan, source: WeightSource, what: str) -> None:
    """Refuse a tied weight that the checkpoint holds twice, unless it is the same tensor twice."""
    shapes = source.shapes
    for name, to in plan.tied.items():
        if shapes[name] != shapes[to] or not source.read(name, whole(shapes[name])).equal(
            source.read(to, whole(shapes[to]))
        ):
            raise PlanError(
                f"{what}: {name} differs from {to}, but the configuration ties them (tie_word_embeddings); "
                "one of the two would be lost. Set tie_word_embeddings to false in config.json if they should differ"
            )
