"""The live executor's way out: the Hugging Face weights of a model that is spread over ranks, one by one or in buckets.

The plan is proven once and used as often as wanted, whatever has happened to the values since. Memory is bounded:
beside the bucket at hand, no more than the largest weight.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.adapters import MergedWeights
from megatron.bridge.conversion.dtype_policy import export_dtype, refuse_unmet_patterns
from megatron.bridge.conversion.entries import base_name, join_entries
from megatron.bridge.conversion.export_tasks import ConversionTask, TaskBucket, groups, in_batches, in_buckets
from megatron.bridge.conversion.gathering import WeightGatherer
from megatron.bridge.conversion.live import Model, megatron_index
from megatron.bridge.conversion.live_weights import Layout, as_chunks, canonical_weights
from megatron.bridge.conversion.plan import PlanError, PlanItem, export_plan
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.conversion.transforms import Shape
from megatron.bridge.errors import BridgeError
from megatron.bridge.platform.roll_call import RollCall

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.dtype_policy import DtypePolicy


class Bucket(Mapping[str, "torch.Tensor"]):
    """Hugging Face weights by name, for as long as no further bucket is asked for.

    A loop's variable would hold one bucket while the next is gathered; so asking for the next lets go of this one's
    tensors, and using it after that is an error.
    """

    def __init__(self, weights: "dict[str, torch.Tensor]") -> None:
        self._weights: dict[str, torch.Tensor] | None = weights

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.nbytes for tensor in self._held.values())

    @property
    def _held(self) -> "dict[str, torch.Tensor]":
        if self._weights is None:
            raise BridgeError(
                "this bucket was let go when the next one was asked for; use its weights inside the loop, or keep "
                "those you need: dict(bucket)"
            )
        return self._weights

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def release(self) -> None:
        """Let go of the tensors."""
        self._weights = None


class Exporter:
    """An export of a spread model, to be made once and used after every step. Made collectively, on all its ranks.

    Iterating over it gives the tasks, in the order of the Hugging Face weights.

    Args:
        model: chunks of this rank.
        table: the family's rules.
        what: named in errors.
        dtype: one for all floating-point weights, one per pattern of names, or a function; None keeps the model's.
        process_groups: as in `Layout.of`.
        rank_timeout: seconds that absent ranks are waited for.
        merged: of layers with an active adapter, give the weights with the adapter in them.
        weights: what to export instead of the model's own weights: a function of nothing that gives this rank's by
            canonical name. They need not be of all layers.

    Raises:
        PlanError: a weight of the model is unaccounted for.
        BridgeError: a rank stayed away.
    """

    def __init__(
        self,
        model: Model,
        table: WeightTable,
        what: str = "export",
        *,
        dtype: "DtypePolicy" = None,
        process_groups: Any = None,
        rank_timeout: float = 600.0,
        merged: bool = True,
        weights: "Callable[[], Mapping[str, torch.Tensor]] | None" = None,
    ) -> None:
        self._chunks = as_chunks(model)
        self._what = what
        self._merged, self._weights = merged and weights is None, weights
        self._layout = Layout.of(self._chunks, process_groups)
        self._roll_call = RollCall(self._layout.groups, rank_timeout)
        self._roll_call(what)
        local = self._local()
        self._known = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in local.items()}
        self._index = megatron_index(table, local, self._layout)
        self.plan = export_plan(table, self._index.shapes, what, of_all_layers=weights is None)
        self.tasks = tuple(self._task(item, dtype) for item in self.plan)
        refuse_unmet_patterns(dtype, self.dtypes, what)

    def __iter__(self) -> Iterator[ConversionTask]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every Hugging Face weight with its shape, in order."""
        return self.plan.hf_shapes

    @property
    def dtypes(self) -> "dict[str, torch.dtype]":
        """dtype of every Hugging Face weight."""
        pairs = (pair for task in self.tasks for pair in zip(task.hf, task.dtypes, strict=True))
        return {base_name(name): dtype for name, dtype in pairs}

    @property
    def nbytes(self) -> int:
        """Bytes of all Hugging Face weights."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest weight that no bucket parts, on either side."""
        parted = groups(self.tasks)
        return max(sum(max(task.nbytes, task.exchanged_bytes) for task in group) for group in parted)

    def buckets(self, bucket_bytes: int) -> list[TaskBucket]:
        """How `stream` will divide the weights: at most `bucket_bytes` each, never parting a group.

        A group is what one Megatron weight becomes, or all entries of a stacked weight; a larger group stands alone.
        """
        if bucket_bytes < 1:
            raise BridgeError(f"{self._what}: a bucket of {bucket_bytes} bytes holds nothing; give a size above 0")
        return in_buckets(self.tasks, bucket_bytes)

    def belongs_to(self, model: Model) -> bool:
        """Whether this export was made of `model`."""
        theirs = as_chunks(model)
        return len(theirs) == len(self._chunks) and all(a is b for a, b in zip(theirs, self._chunks, strict=True))

    def weights(self, *, cpu: bool = False, stacked: bool = True) -> "Iterator[tuple[str, torch.Tensor]]":
        """The Hugging Face weights, whole, in order, each gathered by itself. Collective.

        A weight that this rank holds may be yielded as a view of the model's own memory.

        Args:
            cpu: yield CPU tensors.
            stacked: join the experts of a stacked weight; otherwise yield each as `NAME[e]`.
        """
        gatherer = self._begin()
        pieces = self._pieces(gatherer, [[task] for task in self.tasks], cpu)
        yield from join_entries(pieces, self.plan.hf_shapes) if stacked else pieces

    def stream(self, bucket_bytes: int, *, cpu: bool = False, stacked: bool = True) -> Iterator[Bucket]:
        """The Hugging Face weights in buckets (see `buckets`), each gathered in few exchanges. Collective.

        Beside the bucket, at most the bytes of the largest weight are held. Arguments as in `weights`.

        Raises:
            BridgeError: a rank stayed away from some bucket, or its model is not what the plan was made of.
        """
        gatherer, shapes = self._begin(), self.plan.hf_shapes
        # Received bytes and the weight made of them share the room of the largest weight.
        limit = self.largest_bytes // 2
        for number, tasks in enumerate(self.buckets(bucket_bytes)):
            if number:
                self._roll_call(f"{self._what}, bucket {number}")
            pieces = self._pieces(gatherer, in_batches(tasks.tasks, limit), cpu)
            bucket = Bucket(dict(join_entries(pieces, shapes) if stacked else pieces))
            yield bucket
            bucket.release()

    def _task(self, item: PlanItem, dtype: "DtypePolicy") -> ConversionTask:
        held, keeps = self._index.dtypes[item.megatron], item.rule.keeps_dtype
        size = int(group.size()) if (group := self._layout.dividing(item.rule.shard)) is not None else 1
        divided = item.rule.shard.local_shape(item.shape, size) != item.shape
        return ConversionTask(
            item,
            held,
            tuple(export_dtype(dtype, base_name(name), held, keeps) for name in item.hf),
            self._index.owners[item.megatron],
            self._index.expert_owners.get(item.megatron),
            size if divided else 1,
        )

    def _local(self) -> "Mapping[str, torch.Tensor]":
        """This rank's weights by canonical name."""
        return canonical_weights(self._chunks, self._layout) if self._weights is None else self._weights()

    def _begin(self) -> WeightGatherer:
        """See that all ranks are here and hold what the plan was made of."""
        from megatron.bridge import platform

        local = self._local()
        self._roll_call(self._what, self._stale(local))
        self._refuse_diverged_copies(local)
        if self._merged:
            local = MergedWeights(self._chunks, local)
        # Offloaded weights wait on the CPU; groups may talk between accelerators only.
        alone = all(group is None or group.size() == 1 for group in self._layout.groups)
        return WeightGatherer(self._layout, local, None if alone else platform.device())

    def _stale(self, local: "Mapping[str, torch.Tensor]") -> str | None:
        """Why these weights cannot be exported by this plan, if so."""
        held = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in local.items()}
        changed = sorted(name for name in held.keys() | self._known.keys() if held.get(name) != self._known.get(name))
        if changed:
            return f"the model has changed since this plan was made ({', '.join(changed[:4])}); make a new one"
        gone = [name for name, tensor in local.items() if _is_offloaded(tensor)]
        if gone:
            return (
                f"weights are offloaded, there are no values to export ({', '.join(gone[:4])}); bring them back first"
            )
        return None

    def _pieces(
        self, gatherer: WeightGatherer, batches: list[list[ConversionTask]], cpu: bool
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        for batch in batches:
            gathered = gatherer.gather(batch)
            for task in batch:
                parts = task.rule.transform.inverse(next(gathered))
                # A view without the padding would keep it in memory.
                padded = sum(part.numel() for part in parts) < task.item.numel and not gatherer.holds_whole(task)
                for name, dtype in zip(task.hf, task.dtypes, strict=True):
                    piece = parts.pop(0).to(dtype)
                    piece = piece.clone() if padded and piece.dtype == task.held else piece
                    yield name, piece.cpu() if cpu else piece
                    del piece

    def _refuse_diverged_copies(self, local: "Mapping[str, torch.Tensor]") -> None:
        """Pipeline stages that hold the same weight (tied embeddings) must hold the same values."""
        import torch.distributed as dist

        shared = [name for name, owners in self._index.owners.items() if len(owners) > 1]
        if not shared:
            return
        here = {name: _fingerprint(local[name]) for name in shared if name in local}
        by_stage: list[Any] = [None] * self._layout.pipeline_size
        dist.all_gather_object(by_stage, here, group=self._layout.pipeline_group)
        for name in shared:
            values = {stage: held[name] for stage, held in enumerate(by_stage) if name in held}
            if len(set(values.values())) > 1:
                raise PlanError(
                    f"{self._what}: pipeline stages {sorted(values)} hold different values of {name}, which is tied; "
                    "the model was loaded or trained without keeping them in step, so neither copy can be exported"
                )


def _is_offloaded(tensor: "torch.Tensor") -> bool:
    return tensor.is_meta or (tensor.numel() > 0 and tensor.untyped_storage().size() == 0)


def _fingerprint(tensor: "torch.Tensor") -> str:
    import hashlib

    import torch

    raw = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()
