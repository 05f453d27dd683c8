"""What a projector is to a MIMO model, and the group under which packages offer their own."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.registry import Registry

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import Tensor


@dataclass(kw_only=True)
class Projector(ABC):
    """What stands between an encoder's features and the language model's embeddings. Subclass it as a dataclass."""

    @abstractmethod
    def build(
        self, config: "TransformerConfig", width: int, hidden_size: int, groups: "ProcessGroupCollection"
    ) -> "torch.nn.Module":
        """The module, on the CPU, in `config.params_dtype`.

        Args:
            config: the encoder module's.
            width: of the encoder's features.
            hidden_size: of the language model.
            groups: of the encoder module.
        """

    @abstractmethod
    def project(self, module: "torch.nn.Module", features: "Sequence[Tensor]", name: str) -> "Sequence[Tensor]":
        """What stands among the language model's embeddings, of each item [tokens, hidden].

        Args:
            module: from `build`.
            features: of each item, [tokens, width].
            name: of the modality, in messages.

        Raises:
            BridgeError: an item's features are not such that they can be projected.
        """

    def tokens(self, features: int) -> int:
        """How many tokens an item with so many features becomes."""
        return features

    def problems(self, features: int | None) -> Iterator[str]:
        """What is wrong with the settings, each with its remedy.

        Args:
            features: of each item; None where items differ.
        """
        yield from ()


PROJECTORS: Registry[type[Projector]] = Registry("megatron.bridge.projectors", Projector, "projector")


def projector_of(projector: Projector | str) -> Projector:
    """A projector, also by its name.

    Raises:
        BridgeError: no package offers the name.
    """
    return PROJECTORS[projector]() if isinstance(projector, str) else projector
