"""Pairs of a better and a worse answer, for preference training. Torch-free until built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.data.datasets.sft import SFTDatasetConfig
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.data.instruction.formats import DatasetFormat
    from megatron.bridge.data.provider import DatasetBuildContext


@dataclass(kw_only=True)
class PreferenceDatasetConfig(SFTDatasetConfig):
    """As `SFTDatasetConfig`, of rows with `prompt`, `chosen` and `rejected`; a sample holds one pair.

    Either answer, with its prompt, has half of `sequence_length`. A pair is used whole or not at all.

    Attributes:
        dataset_format: `preference`, or `module:function` of a format that gives two conversations.
        packing: is always on: the two are documents of one sample.
    """

    dataset_format: str = "preference"
    packing: bool = True

    def validate(self, context: DatasetBuildContext) -> None:
        """As for `SFTDatasetConfig`; refuse what would part the pairs, too."""
        if not self.packing:
            raise BridgeError("dataset.packing=false does not go with pairs, which are two documents of one sample")
        super().validate(context)

    @property
    def paired(self) -> bool:
        """Whether samples are pairs."""
        return True

    def conversation_length(self) -> int | None:
        """Half of a sample."""
        return None if self.sequence_length is None else self.sequence_length // 2

    def form(self) -> DatasetFormat:
        """What rows mean."""
        from megatron.bridge.data.instruction.formats import dataset_format
        from megatron.bridge.data.instruction.formats.preference import Preference

        return Preference() if self.dataset_format == "preference" else dataset_format(self.dataset_format)
