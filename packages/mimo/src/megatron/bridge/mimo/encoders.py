"""What an encoder is to a MIMO model, and the group under which packages offer their own."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.mimo.projector import Projector
from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import Tensor

# Of items, by name; what they are is the encoder's business.
type Inputs = Mapping[str, Tensor]


@dataclass(kw_only=True)
class Encoder(ABC):
    """One modality's encoder: how it is built and what goes through it. Subclass it as a dataclass.

    Its module is alike on every tensor-parallel rank of its layout, unless `build_on` divides it. What goes in are
    items (images, clips), one after another along the first axis of every input unless `take` says otherwise.

    Attributes:
        token_id: the token that stands for one feature.
        frozen: its weights are not trained; its projector's are.
        frozen_projector: its projector's weights are not trained.
        projector: from the features to the language model's width, or its name among `PROJECTORS`.
    """

    token_id: int
    frozen: bool = False
    frozen_projector: bool = False
    projector: Projector | str = "mlp"

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs; the first is the one that tells how many items there are."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Hidden size of the features."""

    @property
    def projects(self) -> bool:
        """Whether the features have the language model's hidden size already, by a projector of the encoder's own."""
        return False

    @abstractmethod
    def build(self, config: "TransformerConfig", *, initialized: bool) -> "torch.nn.Module":
        """The module, on the CPU, in `config.params_dtype`; with random weights where `initialized`."""

    def build_on(
        self, config: "TransformerConfig", groups: "ProcessGroupCollection", *, initialized: bool
    ) -> "torch.nn.Module":
        """The module at its place: `build`'s, or one that is divided over the tensor-parallel group of `groups`."""
        return self.build(config, initialized=initialized)

    def problems(self, tensor_parallel: int) -> Iterator[str]:
        """What is wrong with the settings where so many ranks divide the module, each with its remedy."""
        yield from ()

    @abstractmethod
    def encode(self, module: "torch.nn.Module", inputs: Inputs) -> "Sequence[Tensor]":
        """Features of each item, [tokens of the item, width]."""

    def is_projector(self, name: str) -> bool:
        """Whether a parameter of a module from `build` belongs to a projector in it (see `projects`)."""
        return False

    @property
    def decides_positions(self) -> bool:
        """Whether the positions of the language model's tokens depend on the items (see `positions`)."""
        return False

    def positions(self, tokens: "Tensor", inputs: Inputs) -> "Tensor":
        """Positions of tokens [samples, sequence] in several axes, [axes, samples, sequence].

        Args:
            tokens: of the language model.
            inputs: of the items of these samples; none where they have no item.
        """
        raise NotImplementedError(f"write {type(self).__name__}.positions, or let its decides_positions be False")

    def sizes(self, inputs: Inputs) -> "Sequence[int] | None":
        """Features of each item, where they are known before it is encoded; None where they are not."""
        return None

    @property
    def features_per_item(self) -> int | None:
        """Features of one item before the projector; None where items differ."""
        return None

    @abstractmethod
    def ghost(self) -> Inputs:
        """The inputs of one item, as small as can be: what a rank without an item computes on, and throws away."""

    def count(self, inputs: Inputs) -> int:
        """How many items there are."""
        first = inputs.get(self.input_names[0])
        return 0 if first is None else len(first)

    def take(self, inputs: Inputs, start: int, stop: int) -> Inputs:
        """The inputs of the items from `start` up to `stop`."""
        return {name: value[start:stop] for name, value in inputs.items()}


ENCODERS: Registry[type[Encoder]] = Registry("megatron.bridge.encoders", Encoder, "encoder")
