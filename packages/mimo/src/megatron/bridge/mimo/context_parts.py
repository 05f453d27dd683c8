"""Sequences with features in them, divided among context-parallel ranks."""

from typing import Any

from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.bridge.conversion.context_chunks import packed_rows_of_rank
from megatron.bridge.errors import BridgeError


class ContextParts(PartitionAdapter):
    """Megatron-Core's, for packed documents too: those it divides by Transformer Engine alone.

    Text and features stand in their places before the sequence is divided. So every rank has all features of a sample,
    and gradients for those in its part; their sum over the ranks, which Megatron-Core's DDP makes, is the whole one.
    """

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
        size = self.cfg.cp_group.size() if self.cfg.use_cp and self.cfg.cp_group is not None else 1
        length = embeddings.shape[0] if embeddings is not None else None if labels is None else labels.shape[1]
        if packed_seq_params is None and size > 1 and length is not None and length % (2 * size):
            raise BridgeError(
                f"samples of {length} tokens cannot be cut into 2 x context_parallel={size} chunks; make their length "
                f"a multiple of {2 * size}"
            )
        return super().shard(embeddings, labels, loss_mask, packed_seq_params)

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
