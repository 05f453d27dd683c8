"""Where the documents of a packed batch begin and end, and layers that see one document at a time."""

import itertools
from collections.abc import Callable

import torch
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
    starts = document_bounds(packed)
    assert packed.cu_seqlens_q is not None
    bounds = packed.cu_seqlens_q.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    edges = [0, *(edge for span in spans for edge in span), tokens]
    if edges != sorted(edges) or len(starts) != len(bounds):
        raise BridgeError(
            f"the documents' bounds in packed_seq_params do not ascend from 0 to the batch's {tokens} tokens: "
            f"cu_seqlens_q={bounds}, starting at {starts}"
        )
    return [(start, stop) for start, stop in spans if stop > start]


def document_bounds(packed: PackedSeqParams) -> list[int]:
    """Where each document's room begins, and where the last one's ends, padding within a room included.

    Raises:
        BridgeError: there are no bounds, or queries and keys have different ones.
    """
    if packed.cu_seqlens_q is None:
        raise BridgeError("packed_seq_params of a packed batch lack cu_seqlens_q, the documents' bounds")
    for name in ("cu_seqlens_kv", "cu_seqlens_kv_padded"):
        _refuse_other(name, getattr(packed, name), getattr(packed, name.replace("kv", "q")))
    rooms = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    bounds: list[int] = rooms.tolist()
    return bounds


def _refuse_other(name: str, keys: Tensor | None, queries: Tensor | None) -> None:
    if keys is not None and (queries is None or keys.tolist() != queries.tolist()):
        raise BridgeError(
            f"packed_seq_params.{name} differs from the queries' bounds; packed documents attend to themselves only"
        )


def by_document(mix: Callable[[Tensor], Tensor], rows: Tensor, packed: PackedSeqParams | None) -> Tensor:
    """`mix` on each document of a batch by itself; padding between and behind documents comes out as zeros.

    Args:
        mix: from `[length, batch, ...]` to `[length, batch, channels]`.
        rows: `[length, batch, ...]`, the documents one after another where the batch is packed (`thd`).
        packed: their bounds; None for one document per row of the batch.
    """
    if packed is None or packed.qkv_format != "thd":
        return mix(rows)
    spans = document_spans(packed, tokens=rows.shape[0])
    if not spans:
        raise BridgeError("packed_seq_params describe no document at all; leave the batch out")
    pieces: list[Tensor] = []
    end = 0
    for start, stop in spans:
        piece = mix(rows[start:stop])
        pieces += [piece.new_zeros(start - end, *piece.shape[1:]), piece]
        end = stop
    pieces.append(pieces[-1].new_zeros(rows.shape[0] - end, *pieces[-1].shape[1:]))
    return torch.cat(pieces)
