"""`Adapter`: the trainable part that a method adds to one layer."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.bridge.conversion.adapters import AdapterWeight
from megatron.bridge.conversion.shards import Blocks, Replicated
from megatron.bridge.conversion.transforms import Transform
from megatron.bridge.peft.divided_layer import Division

type Forward = Callable[[Tensor], Any]
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Place:
    """Where an adapter is.

    Args:
        name: of the layer in the whole model.
        division: of the layer.
        hf: the Hugging Face modules that the layer holds; empty where the model has no table.
        rows: the transform between their outputs and the layer's.
        shared: all experts of the layer hold the same parameters.
    """

    name: str
    division: Division
    hf: tuple[str, ...] = ()
    rows: Transform | None = None
    shared: bool = False

    @property
    def origin(self) -> str:
        """The name that random numbers belong to: the same for all experts that share them."""
        return _EXPERT.sub(".", self.name) if self.shared else self.name


class Adapter(torch.nn.Module):
    """What a method adds to a layer.

    Args:
        place: of the layer.
        method: the settings that it was made with.

    Attributes:
        dropout: share of what `dropped_inputs` and `dropped_outputs` are given that they drop in training.
        borrows: the parameters are those of another adapter.
    """

    dropout: float = 0.0
    borrows: bool = False

    def __init__(self, place: Place, method: Any) -> None:
        super().__init__()
        self.place = place
        self.method = method

    @property
    def division(self) -> Division:
        """How the layer is divided."""
        return self.place.division

    @abstractmethod
    def forward(self, layer: Any, forward: Forward, values: Tensor) -> Any:
        """The layer's output with the adapter.

        Args:
            layer: that the adapter is on.
            forward: the layer's own forward pass, of one input.
            values: the input.

        Returns:
            What the layer returns: an output, or an output and a bias.
        """

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """This rank's part of the layer's weight with the adapter in it; `weight` stays. May be collective."""

    def merged_bias(self, bias: Tensor) -> Tensor:
        """This rank's part of the layer's bias with the adapter in it; `bias` stays."""
        return bias

    @abstractmethod
    def shards(self) -> Mapping[str, Blocks | Replicated]:
        """Parameter name -> how tensor-parallel ranks divide it."""

    def exported(self) -> dict[str, Tensor]:
        """This rank's parts of what peft holds of the adapter, by the names in `hf_weights`."""
        return dict(self.named_parameters())

    @abstractmethod
    def hf_weights(self, modules: tuple[str, ...], rows: Any) -> Iterator[AdapterWeight]:
        """The weights as Hugging Face peft holds them.

        Args:
            modules: the Hugging Face modules that the layer holds.
            rows: the transform between their outputs and the layer's.
        """

    def hf_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the layer's Hugging Face modules, given by patterns of their names, peft has an adapter on."""
        return targets

    def hf_settings(self, target: str) -> dict[str, Any]:
        """What is particular to this adapter in peft's configuration.

        Args:
            target: one of `hf_targets`.
        """
        return {}

    def dropped_inputs(self, values: Tensor) -> Tensor:
        """Dropout of what the layer is given."""
        return self._dropped(values, differs=self.division.kind == "row" or self.division.sequence_parallel)

    def dropped_outputs(self, values: Tensor) -> Tensor:
        """Dropout of what is added to the layer's output."""
        return self._dropped(values, differs=self.division.kind == "column" or self.division.sequence_parallel)

    def _dropped(self, values: Tensor, *, differs: bool) -> Tensor:
        """Where ranks hold different values (`differs`), each draws its own mask, otherwise all draw one."""
        if self.dropout == 0.0 or not self.training:
            return values
        if not differs or self.division.size == 1:
            return torch.nn.functional.dropout(values, self.dropout)
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(values, self.dropout)

    def borrow(self, other: "Adapter") -> None:
        """Take the parameters of `other`, which is on the same layer of another expert, and saves them."""
        self.borrows = True
        for name, parameter in other.named_parameters():
            self.register_parameter(name, parameter)

    def add(self, name: str, tensor: Tensor, layer: Any) -> None:
        """Make a parameter of this rank's part, which Megatron-Core counts, clips and reduces like the layer's own."""
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        weight = reference_weight(layer)
        parameter = torch.nn.Parameter(tensor.to(weight.device, weight.dtype).contiguous())
        shard = self.shards()[name]
        if isinstance(shard, Blocks):
            set_tensor_model_parallel_attributes(parameter, True, shard.axis, 1)
        elif self.division.sums_gradients:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        # What experts share learns from the tokens of all of them, on whichever rank: reduced as dense weights are.
        parameter.allreduce = self.place.shared or getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)


def reference_weight(layer: Any) -> Tensor:
    """The weight whose device and dtype a layer's adapter takes; a tied output layer has none of its own."""
    weight: Tensor | None = layer.weight
    if weight is not None:
        return weight
    from megatron.bridge.platform import device

    return torch.empty(0, dtype=layer.config.params_dtype, device=device())


def with_output(result: Any, change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]) -> Any:
    """A layer's result, which may be a pair of output and bias, with both changed."""
    if isinstance(result, tuple):
        output, bias = change(*result)
        return output, bias
    return change(result, None)[0]
