"""Every transform is undone by its inverse, and gives any region of its result from the bytes of that region alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.bridge.conversion.shards import COLUMN, GATED_COLUMN, REPLICATED, ROW, Blocks, Expert, cut_axis
from megatron.bridge.conversion.transforms import (
    Alternating,
    Concatenate,
    GatherRows,
    Identity,
    InMemory,
    InterleaveGroups,
    PadRows,
    PermuteBlocks,
    Stacked,
    Transposed,
    whole,
)

SIZES = st.integers(1, 5)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@st.composite
def cases(draw):
    """(transform, Hugging Face tensors, Megatron shape)"""
    columns = draw(st.sampled_from([(), (draw(SIZES),)]))
    kinds = [
        "identity",
        "concatenate",
        "interleave",
        "pad",
        "stacked",
        "transposed",
        "permute",
        "alternating",
        "gather",
    ]
    kind = draw(st.sampled_from(kinds))
    if kind == "identity":
        shape = (draw(SIZES) * 4, *columns)
        return Identity(), tensors(shape), shape
    if kind == "concatenate":
        count, rows = draw(st.integers(2, 3)), draw(SIZES) * 2
        return Concatenate(count), tensors(*[(rows, *columns)] * count), (rows * count, *columns)
    if kind == "interleave":
        groups, rows = draw(SIZES), tuple(draw(st.lists(SIZES, min_size=2, max_size=3)))
        shapes = [(groups * row, *columns) for row in rows]
        return InterleaveGroups(rows), tensors(*shapes), (groups * sum(rows), *columns)
    if kind == "stacked":
        groups, rows = draw(SIZES), tuple(draw(st.lists(SIZES, min_size=2, max_size=3)))
        shape = (groups * sum(rows), *columns)
        return Stacked(InterleaveGroups(rows)), tensors(shape), shape
    if kind == "transposed":
        groups, rows, width = draw(SIZES), tuple(draw(st.lists(SIZES, min_size=2, max_size=3))), draw(SIZES)
        total = groups * sum(rows)
        return Transposed(Stacked(InterleaveGroups(rows))), tensors((width, total)), (total, width)
    if kind == "permute":
        order = tuple(draw(st.permutations(range(draw(SIZES)))))
        shape = (draw(SIZES) * len(order), *columns)
        return PermuteBlocks(order), tensors(shape), shape
    if kind == "alternating":
        count = draw(st.integers(2, 3))
        shape = (draw(SIZES) * count, *columns)
        return Alternating(count), tensors(shape), shape
    if kind == "gather":
        runs = draw(st.permutations([(0, 0, 2), (0, 2, 3), (1, 0, 1), (1, 1, 4), (2, 0, 2)]))
        return GatherRows(tuple(runs)), tensors(*((rows, *columns) for rows in (5, 5, 2))), (12, *columns)
    rows, padding = draw(SIZES), draw(st.integers(0, 5))
    return PadRows(rows), tensors((rows, *columns)), (rows + padding, *columns)


@given(cases())
@settings(deadline=None)
def test_inverse_undoes_forward(case):
    transform, hf, shape = case
    megatron = transform.forward([InMemory(tensor) for tensor in hf], whole(shape))
    assert tuple(megatron.shape) == shape
    assert transform.megatron_shape([tuple(tensor.shape) for tensor in hf], shape) == shape
    assert transform.hf_shapes(shape) == [tuple(tensor.shape) for tensor in hf]
    for back, tensor in zip(transform.inverse(megatron), hf, strict=True):
        assert torch.equal(back, tensor)


@given(cases())
@settings(deadline=None)
def test_a_weight_that_stands_in_the_result_as_it_is_stands_where_it_says(case):
    transform, hf, shape = case
    megatron = transform.forward([InMemory(tensor) for tensor in hf], whole(shape))
    regions = transform.regions(shape)
    assert (regions is None) == (not isinstance(transform, Identity | Concatenate | PadRows))
    for region, tensor in zip(regions or [], hf, strict=regions is not None):
        assert torch.equal(megatron[tuple(slice(*bounds) for bounds in region)], tensor)


@given(cases(), st.data())
@settings(deadline=None)
def test_any_region_alone_is_that_region_of_the_whole(case, data):
    transform, hf, shape = case
    inputs = [InMemory(tensor) for tensor in hf]
    region = tuple(
        (start := data.draw(st.integers(0, size - 1)), data.draw(st.integers(start + 1, size))) for size in shape
    )
    part = transform.forward(inputs, region)
    full = transform.forward(inputs, whole(shape))
    assert torch.equal(part, full[tuple(slice(*bounds) for bounds in region)])


def test_interleaving_lays_out_groups_as_megatron_reads_them():
    q, k, v = torch.arange(0, 4), torch.arange(10, 12), torch.arange(20, 22)
    fused = InterleaveGroups((2, 1, 1)).forward([InMemory(t) for t in (q, k, v)], ((0, 8),))
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_alternating_rows_are_sorted_by_block():
    gate_up = torch.tensor([0, 10, 1, 11, 2, 12])
    assert Alternating(2).forward([InMemory(gate_up)], ((0, 6),)).tolist() == [0, 1, 2, 10, 11, 12]
    assert Alternating(2).forward([InMemory(gate_up)], ((2, 5),)).tolist() == [2, 10, 11]


def test_a_stacked_projection_is_read_part_by_part():
    fused = torch.tensor([0, 1, 2, 3, 10, 11, 20, 21])
    transform = Stacked(InterleaveGroups((2, 1, 1)))
    assert transform.forward([InMemory(fused)], ((0, 8),)).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert transform.forward([InMemory(fused)], ((4, 8),)).tolist() == [2, 3, 11, 21]


RULES = [
    REPLICATED,
    COLUMN,
    ROW,
    GATED_COLUMN,
    Blocks(0, (1, 2, 1)),
    Blocks(0, (4, 12)),
    Expert(ROW),
    Expert(GATED_COLUMN),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_join_to_the_whole(rule, size):
    (tensor,) = tensors((16, 8))
    parts = rule.split(tensor, size)
    assert torch.equal(rule.join(parts), tensor)
    for rank, part in enumerate(parts):
        assert tuple(part.shape) == rule.local_shape((16, 8), size)
        assert rule.global_shape(tuple(part.shape), size) == (16, 8)
        pieces = [tensor[tuple(slice(*b) for b in region)] for region in rule.regions((16, 8), rank, size)]
        assert torch.equal(torch.cat(pieces, cut_axis(rule)), part)


def test_a_gated_projection_keeps_gate_and_up_apart_on_every_rank():
    gate, up = torch.arange(0, 4), torch.arange(10, 14)
    first, second = GATED_COLUMN.split(torch.cat([gate, up]), 2)
    assert first.tolist() == [0, 1, 10, 11]
    assert second.tolist() == [2, 3, 12, 13]


def test_what_does_not_divide_is_known():
    assert GATED_COLUMN.divides((12,), 3)
    assert not GATED_COLUMN.divides((12,), 4)
    assert not COLUMN.divides((6, 2), 4)
    assert REPLICATED.divides((7,), 4)


def test_blocks_of_several_sizes_are_cut_one_by_one():
    rule = Blocks(0, (4, 2))
    first, second = rule.split(torch.tensor([0, 1, 2, 3, 10, 11]), 2)
    assert (first.tolist(), second.tolist()) == ([0, 1, 10], [2, 3, 11])
    assert rule.divides((6,), 2)
    assert not rule.divides((6,), 4)  # the second block has but two rows
    assert not rule.divides((7,), 1)
