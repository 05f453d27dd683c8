"""How Megatron-Core divides a layer over tensor-parallel ranks, and low-rank products that follow the same division.

A column-parallel layer holds some of its outputs on each rank, a row-parallel one some of its inputs, an embedding some
of the vocabulary. With sequence parallelism the other side of the layer holds a part of each sequence. The layers of
experts leave gathering their inputs and adding up their outputs to the token dispatcher. Layers of torch, in towers
that transformers wrote, are whole on every rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.router import Router
from torch import Tensor
from torch.nn import functional

from megatron.bridge.conversion.shards import REPLICATED, Blocks, Replicated
from megatron.bridge.errors import BridgeError

type Kind = Literal["column", "row", "whole", "vocabulary", "plain"]


@dataclass(frozen=True)
class Division:
    """How a layer is divided.

    Args:
        kind: what each rank holds: outputs, inputs, entries of the vocabulary, or everything: of a router (`whole`), of
            a linear layer of torch (`plain`).
        inputs, outputs: of the whole layer.
        group: the ranks that divide it; None for a layer that is whole everywhere.
        sequence_parallel: the side that is not divided by `kind` holds a part of each sequence.
        dispatched: an expert's layer, whose inputs are gathered and whose outputs are added up elsewhere.
        blocks: blocks of outputs of which each rank holds its cut: 2 for gate and up projection side by side.
        expert: a layer of a single expert.
    """

    kind: Kind
    inputs: int
    outputs: int
    group: Any
    sequence_parallel: bool
    dispatched: bool = False
    blocks: int = 1
    expert: bool = False

    @classmethod
    def of(cls, layer: Any) -> "Division | None":
        """The division of a layer, None for a module that multiplies by no matrix."""
        if isinstance(layer, VocabParallelEmbedding):
            sequence = layer.reduce_scatter_embeddings
            return cls("vocabulary", layer.num_embeddings, layer.embedding_dim, layer.tp_group, sequence)
        if isinstance(layer, Router):
            experts, hidden = layer.weight.shape
            return cls("whole", hidden, experts, None, bool(getattr(layer.weight, "sequence_parallel", False)))
        if type(layer) is torch.nn.Linear:  # what inherits from it may be read past any adapter
            return cls("plain", layer.in_features, layer.out_features, None, False)
        kind = _kind(layer)
        if kind is None:
            return None
        if kind == "column":
            # A tied output layer has no weight of its own.
            inputs, outputs = layer_inputs(layer), layer_outputs(layer)
            stride = getattr(layer.weight, "partition_stride", 1) if layer.weight is not None else 1
        else:
            inputs, outputs, stride = layer_inputs(layer), layer_outputs(layer), 1
        size = layer.tp_group.size() if layer.tp_group is not None else 1
        expert = bool(getattr(layer, "is_expert", False))
        dispatched = expert and bool(getattr(layer, "explicit_expert_comm", True))
        sequence = bool(layer.sequence_parallel) and not dispatched and size > 1
        return cls(kind, inputs, outputs, layer.tp_group, sequence, dispatched, stride, expert)

    @property
    def size(self) -> int:
        """Ranks that divide the layer."""
        return 1 if self.group is None else int(self.group.size())

    @property
    def rank(self) -> int:
        """This rank among them."""
        return 0 if self.group is None else int(self.group.rank())

    # --- which part of a matrix [rank, inputs] or [outputs, rank] this rank holds

    @property
    def input_shard(self) -> Blocks | Replicated:
        """How a matrix `[r, inputs]` is divided (an embedding's: `[vocabulary, r]`)."""
        return {"row": Blocks(1), "vocabulary": Blocks(0)}.get(self.kind, REPLICATED)

    @property
    def output_shard(self) -> Blocks | Replicated:
        """How a matrix `[outputs, r]` or a vector `[outputs]` is divided."""
        return Blocks(0, self.blocks) if self.kind == "column" else REPLICATED

    @property
    def sums_gradients(self) -> bool:
        """Whether this rank's gradient of a matrix that every rank holds is only a part of it."""
        return self.sequence_parallel

    # --- products

    def reduce(self, values: Tensor, matrix: Tensor) -> Tensor:
        """`[..., inputs] -> [..., r]`, whole on every rank (of an expert's row-parallel layer: its part of the sum).

        Args:
            values: the layer's input as this rank has it; token ids for an embedding.
            matrix: this rank's part of `[r, inputs]`.
        """
        if self.kind == "vocabulary":
            return self._look_up(values, matrix)
        if self.dispatched and self.kind == "column":
            matrix = self.shared(matrix)
        narrow = functional.linear(values, matrix)
        if self.size == 1 or self.dispatched or self.kind == "whole":
            return narrow
        if self.kind == "row":
            return self._summed(narrow)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(narrow, group=self.group)
        return copy_to_tensor_model_parallel_region(narrow, group=self.group)

    def expand(self, narrow: Tensor, matrix: Tensor) -> Tensor:
        """`[..., r] -> [..., outputs]` as the layer's own output is divided.

        Args:
            narrow: what `reduce` gave.
            matrix: this rank's part of `[outputs, r]`.
        """
        if self.dispatched and self.kind == "row":
            matrix = self.shared(matrix)
        return functional.linear(narrow, matrix)

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank holds whole, and of whose gradient each rank computes a part, in an expert."""
        return copy_to_tensor_model_parallel_region(parameter, group=self.group) if self.size > 1 else parameter

    def matched(self, values: Tensor, output: Tensor) -> Tensor:
        """`values` gathered where the layer gathers its output."""
        if self.kind == "column" and self.size > 1 and values.shape[-1] < output.shape[-1]:
            return gather_from_tensor_model_parallel_region(values, group=self.group)
        return values

    def delta(self, narrowing: Tensor, expanding: Tensor) -> Tensor:
        """This rank's part of the product of both matrices, in the shape of the layer's weight."""
        if self.kind == "vocabulary":
            return narrowing @ expanding.t()
        return expanding @ narrowing

    def row_norms(self, weight: Tensor) -> Tensor:
        """The norm of every row of the whole weight that this rank has a part of. Collective where that is divided."""
        squares = weight.float().square().sum(1)
        if self.kind == "row" and self.size > 1:
            torch.distributed.all_reduce(squares, group=self.group)
        return squares.sqrt().to(weight.dtype)

    def _look_up(self, tokens: Tensor, table: Tensor) -> Tensor:
        first = table.shape[0] * self.rank
        elsewhere = (tokens < first) | (tokens >= first + table.shape[0])
        found = functional.embedding((tokens - first).masked_fill(elsewhere, 0), table)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            found = found.transpose(0, 1).contiguous()
        return self._summed(found) if self.size > 1 else found

    def _summed(self, partial: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.group)
        return reduce_from_tensor_model_parallel_region(partial, group=self.group)


def _kind(layer: Any) -> Kind | None:
    if isinstance(layer, ColumnParallelLinear):
        return "column"
    if isinstance(layer, RowParallelLinear):
        if not layer.input_is_parallel:
            raise BridgeError(
                f"a row-parallel layer that divides its own input ({layer}) takes no adapter; leave it out"
            )
        return "row"
    # Transformer Engine's layers tell by `parallel_mode`; those of grouped experts hold several weights.
    mode = getattr(layer, "parallel_mode", None)
    if isinstance(getattr(layer, "weight", None), Tensor) and mode in ("column", "row"):
        return "column" if mode == "column" else "row"
    return None


def refuse_apart(division: Division, name: str) -> None:
    """Refuse to share parameters between experts that are divided in another way than the rest of the model.

    Raises:
        BridgeError: the ranks that hold experts are not those over which Megatron-Core sums gradients of dense weights.
    """
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if division.size != ranks:
        raise BridgeError(
            f"share_experts: {name} is divided over {division.size} ranks and the rest of the model over {ranks}; set "
            f"model.expert_tensor_parallel_size={ranks}, or let each expert have an adapter of its own"
        )


def layer_inputs(layer: Any) -> int:
    """Inputs of a whole linear layer."""
    if hasattr(layer, "input_size"):
        return int(layer.input_size)
    size = layer.tp_group.size() if layer.parallel_mode == "row" and layer.tp_group is not None else 1
    return int(layer.weight.shape[1] * size)


def layer_outputs(layer: Any) -> int:
    """Outputs of a whole linear layer."""
    if hasattr(layer, "output_size"):
        return int(layer.output_size)
    size = layer.tp_group.size() if layer.parallel_mode == "column" and layer.tp_group is not None else 1
    return int(layer.weight.shape[0] * size)


def layer_input(layer: Any, values: Tensor) -> Tensor:
    """What the layer's matrix multiplies: its input, behind the norm that some of Transformer Engine's begin with."""
    gain = getattr(layer, "layer_norm_weight", None)
    if not isinstance(gain, Tensor):
        return values
    gain = gain + 1 if getattr(layer, "zero_centered_gamma", False) else gain
    if getattr(layer, "normalization", "LayerNorm") == "RMSNorm":
        return functional.rms_norm(values, gain.shape, gain, layer.eps)
    return functional.layer_norm(values, gain.shape, gain, getattr(layer, "layer_norm_bias", None), layer.eps)
