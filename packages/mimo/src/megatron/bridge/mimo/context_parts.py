"""Sequences with features in them, divided among context-parallel ranks."""

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron.bridge.conversion.context_chunks import packed_rows_of_rank, part_of_rank
from megatron.bridge.errors import BridgeError

# Megatron-Core's name for what is no modality.
_TEXT = "text"


def with_whole_gradients(embeddings: Mapping[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Embeddings [tokens, hidden] by modality; those of modules with other ranks get the same gradients on all ranks.

    Each context-parallel rank has gradients for the features in its part. Megatron-Core's communicators take those of
    one rank back to the module that made the features, so their sum over the ranks must be there before.

    Args:
        embeddings: of the modalities, and of the text.
        group: the context-parallel ranks.
    """
    return {
        name: each if name == _TEXT else copy_to_tensor_model_parallel_region(each, group=group)
        for name, each in embeddings.items()
    }


class ContextParts(PartitionAdapter):
    """Megatron-Core's, for packed documents too: those it divides by Transformer Engine alone.

    Text and features stand in their places before the sequence is divided. So every rank has all features of a sample,
    and gradients for those in its part; their sum over the ranks is the whole one. Where the encoder shares the ranks'
    groups, Megatron-Core's DDP makes it; otherwise see `with_whole_gradients`.
    """

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return self.cfg.cp_group.size() if self.cfg.use_cp and self.cfg.cp_group is not None else 1

    def positions(self, position_ids: Tensor) -> Tensor:
        """This rank's part of positions in several axes, [axes, samples, sequence].

        Positions of packed samples stay whole: Megatron-Core takes from their angles the part of each document.

        Raises:
            BridgeError: the sequence cannot be cut into 2 x CP chunks.
        """
        self._refuse_uneven(position_ids.shape[-1])
        if self.size == 1:
            return position_ids
        assert self.cfg.cp_group is not None
        return part_of_rank(position_ids, self.cfg.cp_group.rank(), self.size, -1)

    def shard(
        self,
        embeddings: Tensor | None,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Any:
        """See Megatron-Core's.

        Raises:
            BridgeError: the sequence, or a document of a packed one, cannot be cut into 2 x CP chunks.
        """
        length = embeddings.shape[0] if embeddings is not None else None if labels is None else labels.shape[1]
        if packed_seq_params is None and length is not None:
            self._refuse_uneven(length)
        return super().shard(embeddings, labels, loss_mask, packed_seq_params)

    def _refuse_uneven(self, length: int) -> None:
        if self.size > 1 and length % (2 * self.size):
            raise BridgeError(
                f"samples of {length} tokens cannot be cut into 2 x context_parallel={self.size} chunks; make their "
                f"length a multiple of {2 * self.size}"
            )

    def _apply_context_parallel(
        self,
        embeddings: Tensor | None,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Any:
        if packed_seq_params is None:
            return super()._apply_context_parallel(embeddings, labels, loss_mask, packed_seq_params)
        group, bounds = self.cfg.cp_group, packed_seq_params.cu_seqlens_q
        assert group is not None
        assert bounds is not None
        rows = packed_rows_of_rank(bounds.tolist(), group.rank(), group.size()).to(bounds.device)
        parts = (None if each is None else each.index_select(1, rows) for each in (embeddings, labels, loss_mask))
        return *parts, packed_seq_params
