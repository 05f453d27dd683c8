"""Attention over context-parallel ranks is attention on one rank: outputs and gradients, with any change of scores."""

import functools
import itertools

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.conversion.context_chunks import packed_rows_of_rank, part_of_rank
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.variant_attention import VariantAttention
from megatron.bridge.testing import run_ranks

LENGTH, BATCH, HEADS, GROUPS, SIZE = 16, 2, 4, 2, 8
KINDS = {
    "plain": (SDPAttention, {}, {}),
    "window": (SDPAttention, {"window_size": (5, 0)}, {}),
    "soft cap": (VariantAttention, {}, {"softcap": 5.0}),
    "ALiBi": (VariantAttention, {}, {"slopes": (0.5, 0.25, 0.1, 0.7)}),
    "temperature": (VariantAttention, {}, {"temperature": (0.3, 4)}),
}


def attention(kind, context, mask_type=AttnMaskType.causal):
    module, fields, params = KINDS[kind]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=context,
        attention_dropout=0.0,
        **fields,
    )
    return module(config, 1, mask_type, "self", **params)


def inputs():
    generator = torch.Generator().manual_seed(7)
    shapes = [(LENGTH, BATCH, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)] + [(LENGTH, BATCH, HEADS * SIZE)]
    query, key, value, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    hidden = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=generator) < 0.3
    hidden.diagonal(dim1=-2, dim2=-1).fill_(False)
    return query, key, value, gradient, hidden


def run(module, query, key, value, gradient, hidden):
    """(output, gradients of query, key and value)"""
    parts = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = module(*parts, hidden)
    output.backward(gradient)
    return output.detach(), *(part.grad for part in parts)


def rows_of(rank, size):
    return part_of_rank(torch.arange(LENGTH), rank, size, 0)


def compare(size):
    """In one rank: the largest difference from one rank's attention, by kind and mask."""
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    rank = parallel_state.get_context_parallel_rank()
    rows, (*tensors, hidden) = rows_of(rank, size), inputs()
    found = {}
    for kind in KINDS:
        for masked in (False, True):
            whole = run(attention(kind, 1), *tensors, hidden if masked else None)
            own = [tensor[rows] for tensor in tensors]
            part = run(attention(kind, size), *own, hidden[:, :, rows] if masked else None)
            found[kind, masked] = max(
                (mine - theirs[rows]).abs().max().item() for mine, theirs in zip(part, whole, strict=True)
            )
    return found


def packed(bounds):
    edges = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)


def compare_packed(size):
    """In one rank: the largest difference from the documents' attention one by one, on one rank, by kind."""
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    bounds = [0, 4, 16] if size == 2 else [0, 8, 16]
    rows = packed_rows_of_rank(bounds, parallel_state.get_context_parallel_rank(), size)
    *tensors, _ = inputs()
    found = {}
    for kind in KINDS:
        pieces = [
            run(attention(kind, 1), *(tensor[start:stop, :1] for tensor in tensors), None)
            for start, stop in itertools.pairwise(bounds)
        ]
        whole = [torch.cat(parts)[:, 0] for parts in zip(*pieces, strict=True)]
        own = [tensor[rows, 0] for tensor in tensors]
        module = functools.partial(attention(kind, size), packed_seq_params=packed(bounds))
        part = run(module, *own, None)
        found[kind] = max((mine - theirs[rows]).abs().max().item() for mine, theirs in zip(part, whole, strict=True))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_attend_to_packed_documents_as_to_single_ones(size):
    for found in run_ranks(size, compare_packed, size):
        assert len(found) == len(KINDS)
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_attend_as_one_rank_does(size):
    for found in run_ranks(size, compare, size):
        assert len(found) == 2 * len(KINDS)
        assert max(found.values()) < 1e-5, found


def refusals():
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    with pytest.raises(BridgeError, match="context_parallel_size=2 needs causal attention"):
        attention("plain", 2, AttnMaskType.no_mask)
    query, key, value, _, _ = (tensor[: LENGTH // 2] for tensor in inputs())
    for bounds, why in (
        ([0, 8, 14], "go from 0 to 14, and 2 context-parallel ranks hold 16"),
        ([0, 6, 16], "of 6 tokens"),
    ):
        with pytest.raises(BridgeError, match=why):
            attention("plain", 2)(query[:, 0], key[:, 0], value[:, 0], None, packed_seq_params=packed(bounds))


def test_what_context_parallelism_cannot_do_is_refused():
    run_ranks(2, refusals)
