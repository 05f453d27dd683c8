"""An encoder and its projector as a module of Megatron-Core's MIMO model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge import platform
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.encoders import Encoder, Inputs
from megatron.bridge.mimo.places import ITEMS, PLACES, refuse_misplaced
from megatron.bridge.mimo.projector import projector_of
from megatron.bridge.mimo.sharded_parts import sharded_state
from megatron.bridge.models.vision_half import nothing_of

TOWER = "tower"
# Where Megatron-Core's base class keeps the encoder's module, and the projector.
_TOWER_PREFIX, _PROJECTOR_PREFIX = f"encoders.{TOWER}.", "input_projections."


class EncoderModule(ModalitySubmodules):
    """Encoder -> projector; its output are the features of all items, [tokens, hidden] of the language model.

    A rank whose samples have no item runs an item of the encoder's own and keeps none of its features: so every rank
    has a graph, and the hooks of overlapped gradient reduction fire everywhere.

    Args:
        name: of the modality, in messages.
        encoder: what it is made of.
        config: what Megatron-Core asks of a module's configuration.
        tower: from `encoder.build_on`.
        projector: to the language model's width; None where the encoder has one.
        groups: of the module's layout.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        config: TransformerConfig,
        tower: torch.nn.Module,
        projector: torch.nn.Module | None,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(
            encoders={TOWER: tower},
            input_projections=[] if projector is None else [projector],
            pg_collection=groups,
        )
        self.name, self.encoder, self.config = name, encoder, config
        self._projector = projector_of(encoder.projector)

    @property
    def tower(self) -> torch.nn.Module:
        """The encoder's own module."""
        return self.encoders[TOWER]

    def forward(self, encoder_inputs: Mapping[str, Any] | None = None, hidden_states: Any = None) -> Tensor:
        """Features of the items in `encoder_inputs`, [tokens, hidden].

        Args:
            encoder_inputs: the encoder's by name; `places`, the tokens of this modality of each sample, and `items`,
                how many items each sample has, are checked against what comes out.
            hidden_states: nothing: an encoder has one pipeline stage.

        Raises:
            BridgeError: features and places in the tokens do not correspond; the sample is named.
        """
        inputs = dict(encoder_inputs or {})
        places, items = inputs.pop(PLACES, None), inputs.pop(ITEMS, None)
        number = self.encoder.count(inputs)
        place = next(self.tower.parameters())
        given = {name: _moved(value, place) for name, value in (inputs if number else self.encoder.ghost()).items()}
        features = self._projected(given)
        if places is not None:
            sizes = [len(each) for each in features] if number else []
            refuse_misplaced(self.name, self.encoder.token_id, places, items, sizes)
        rows = torch.cat(tuple(features))
        if self.training and torch.is_grad_enabled():
            rows = rows + nothing_of(self).to(rows)
            # Where nothing is trained, the way back between ranks is walked all the same.
            rows = rows if rows.requires_grad else rows.detach().requires_grad_()
        return rows if number else rows[:0]

    def _projected(self, inputs: Inputs) -> "Sequence[Tensor]":
        """What the tower and the projector make of each item, [tokens, hidden]."""
        with self._own_draws():
            features = self.encoder.encode(self.tower, inputs)
            for width in {each.shape[-1] for each in features} - {self.encoder.width}:
                raise BridgeError(
                    f"{self.name!r}: the encoder's features have width {width}, and it says {self.encoder.width}, "
                    "for which its projector was made; correct the width of its encoder"
                )
            for module in self.input_projections:
                features = self._projector.project(module, features, self.name)
        return features

    @contextlib.contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Within the block, random numbers are drawn apart.

        How many an encoder's dropout takes depends on its items, and ranks that divide the language model between them
        must go on alike.
        """
        if not self.training:
            yield
            return
        seed = int(torch.randint(2**62, ())) + int(self.pg_collection.dp.rank())
        place = platform.device()
        with torch.random.fork_rng([] if place.type == "cpu" else [place]):
            torch.manual_seed(seed)
            yield

    def is_projector(self, name: str) -> bool:
        """Whether one of this module's parameters belongs to the projector, its own or the encoder's."""
        if name.startswith(_PROJECTOR_PREFIX):
            return True
        return self.encoder.is_projector(name.removeprefix(_TOWER_PREFIX))

    def freeze(self) -> None:
        """Take out of training what the encoder says is frozen."""
        for name, each in self.named_parameters():
            if self.encoder.frozen_projector if self.is_projector(name) else self.encoder.frozen:
                each.requires_grad_(False)

    def decode(self, embeddings: Tensor, data_batch: Any) -> Tensor:
        """Nothing decodes: Megatron-Core's base class asks for the method."""
        raise NotImplementedError("encoders do not decode")

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As Megatron-Core's, with this module's own groups for what transformers wrote."""
        own = {**(metadata or {}), "dp_cp_group": self.pg_collection.dp_cp}
        state: dict[str, Any] = {}
        for kind, container in self.named_children():
            for name, module in container.named_children():
                where = f"{prefix}{kind}.{name}."
                tensor = self.pg_collection.tp
                state |= sharded_state(module, where, sharded_offsets, own, tensor)
        return state


def _moved(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
