"""Where the documents of a packed batch begin and end."""

import itertools

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.bridge.errors import BridgeError


def document_spans(packed: PackedSeqParams, *, tokens: int) -> list[tuple[int, int]]:
    """The `(start, stop)` token rows of each document that is not empty, in order.

    With padded bounds a document starts at its padded bound and is as long as its true bounds say.

    Args:
        packed: the bounds that travel beside the batch (`qkv_format="thd"`).
        tokens: how many rows the packed batch has, padding included.

    Raises:
        BridgeError: there are no bounds, they do not ascend within the rows, or queries and keys have different ones.
    """
    if packed.cu_seqlens_q is None:
        raise BridgeError("packed_seq_params of a packed batch lack cu_seqlens_q, the documents' bounds")
    bounds = packed.cu_seqlens_q.tolist()
    for name in ("cu_seqlens_kv", "cu_seqlens_kv_padded"):
        _refuse_other(name, getattr(packed, name), getattr(packed, name.replace("kv", "q")))
    starts = bounds if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    edges = [0, *(edge for span in spans for edge in span), tokens]
    if edges != sorted(edges) or len(starts) != len(bounds):
        raise BridgeError(
            f"the documents' bounds in packed_seq_params do not ascend from 0 to the batch's {tokens} tokens: "
            f"cu_seqlens_q={bounds}, starting at {starts}"
        )
    return [(start, stop) for start, stop in spans if stop > start]


def _refuse_other(name: str, keys: Tensor | None, queries: Tensor | None) -> None:
    if keys is not None and (queries is None or keys.tolist() != queries.tolist()):
        raise BridgeError(
            f"packed_seq_params.{name} differs from the queries' bounds; packed documents attend to themselves only"
        )
