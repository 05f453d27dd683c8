"""The live executor: Hugging Face weights to and from a model that is spread over tensor-, pipeline- and
expert-parallel ranks.

On the way in every rank reads only the bytes it owns. On the way out one weight (of one expert) at a time is gathered,
so memory is bounded by the largest Hugging Face weight. Plans are proven before the first byte moves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron.bridge.conversion.entries import base_name, entry_of, join_entries
from megatron.bridge.conversion.live_weights import Layout, as_chunks, canonical_weights
from megatron.bridge.conversion.plan import Plan, PlanError, PlanItem, export_plan, import_plan
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
    kept: Sequence[str] = (),
) -> Plan:
    """Fill a model with Hugging Face weights. Collective over the model's ranks.

    Args:
        model: chunks of this rank, wrapped or not.
        table: the family's rules.
        source: where the weights are.
        what: named in errors, e.g. the folder.
        progress: called with each Megatron name and the elements read for it on this rank.
        kept: Megatron weights that keep their values, because the caller knows that the source has none for them.

    Raises:
        PlanError: the two sides do not correspond; no weight was touched.
        BridgeError: reading failed on some rank (raised on all).
    """
    chunks = as_chunks(model)
    layout = Layout.of(chunks)
    local = {name: weight for name, weight in canonical_weights(chunks).items() if name not in kept}
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

    on_every_rank(fill, f"{what} failed", PlanError)
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


class Exporter:
    """An export of a spread model: its proven plan, then its weights. Made collectively, on every rank of the model."""

    def __init__(self, model: Model, table: WeightTable, what: str = "export") -> None:
        chunks = as_chunks(model)
        self._what = what
        self._layout = Layout.of(chunks)
        self._local = canonical_weights(chunks)
        self._index = megatron_index(table, self._local, self._layout)
        self.plan = export_plan(table, self._index.shapes, what)

    def dtypes(self, dtype: "torch.dtype | None" = None) -> "dict[str, torch.dtype]":
        """dtype of every Hugging Face weight that `weights(dtype)` yields."""
        return {base_name(name): self._dtype(item, dtype) for item in self.plan for name in item.hf}

    def _dtype(self, item: PlanItem, wanted: "torch.dtype | None") -> "torch.dtype":
        held = self._index.dtypes[item.megatron]
        return wanted if wanted and held.is_floating_point and not item.rule.keeps_dtype else held

    def weights(self, dtype: "torch.dtype | None" = None) -> "Iterator[tuple[str, torch.Tensor]]":
        """The Hugging Face weights, whole, in plan order. Collective."""
        self._refuse_diverged_copies()
        yield from join_entries(self._single_weights(dtype), self.plan.hf_shapes)

    def _single_weights(self, dtype: "torch.dtype | None") -> "Iterator[tuple[str, torch.Tensor]]":
        for item in self.plan:
            tensor = self._whole(item).to(self._dtype(item, dtype))
            yield from zip(item.hf, item.rule.transform.inverse(tensor), strict=True)

    def _whole(self, item: PlanItem) -> "torch.Tensor":
        """The global Megatron weight on every rank."""
        import torch.distributed as dist

        layout, stage = self._layout, self._index.owners[item.megatron][0]
        tensor = self._of_stage(item) if layout.pipeline_rank == stage else self._empty(item)
        if layout.pipeline_size > 1:
            dist.broadcast(tensor, group=layout.pipeline_group, group_src=stage)
        return tensor

    def _of_stage(self, item: PlanItem) -> "torch.Tensor":
        """The global Megatron weight on every rank of the pipeline stage that holds it."""
        import torch.distributed as dist

        layout, owner = self._layout, self._index.expert_owners.get(item.megatron)
        tensor = self._gathered(item) if owner in (None, layout.expert_rank) else self._empty(item)
        if owner is not None and layout.expert_size > 1:
            dist.broadcast(tensor, group=layout.expert_group, group_src=owner)
        return tensor

    def _empty(self, item: PlanItem) -> "torch.Tensor":
        import torch

        device = next(iter(self._local.values())).device
        return torch.empty(item.shape, dtype=self._index.dtypes[item.megatron], device=device)

    def _gathered(self, item: PlanItem) -> "torch.Tensor":
        import torch
        import torch.distributed as dist

        tensor = self._local[item.megatron].detach()
        group = self._layout.dividing(item.rule.shard)
        sharded = item.rule.shard.local_shape(item.shape, group.size()) != item.shape
        if not sharded:
            return tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return item.rule.shard.join(parts)

    def _refuse_diverged_copies(self) -> None:
        """Pipeline stages that hold the same weight (tied embeddings) must hold the same values."""
        import torch.distributed as dist

        shared = [name for name, owners in self._index.owners.items() if len(owners) > 1]
        if not shared:
            return
        here = {name: _fingerprint(self._local[name]) for name in shared if name in self._local}
        by_stage: list[Any] = [None] * self._layout.pipeline_size
        dist.all_gather_object(by_stage, here, group=self._layout.pipeline_group)
        for name in shared:
            values = {stage: held[name] for stage, held in enumerate(by_stage) if name in held}
            if len(set(values.values())) > 1:
                raise PlanError(
                    f"{self._what}: pipeline stages {sorted(values)} hold different values of {name}, which is tied; "
                    "the model was loaded or trained without keeping them in step, so neither copy can be exported"
                )


def _fingerprint(tensor: "torch.Tensor") -> str:
    import hashlib

    import torch

    raw = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()
