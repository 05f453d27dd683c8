"""The `torch` spec's core attention against the formula of attention, written out in float64."""

import math
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.causal_attention_cpu import blocked_causal_attention
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.variant_attention import VariantAttention
from megatron.bridge.testing import run_ranks

HEADS, SIZE = 4, 8


def attention(mask_type: AttnMaskType = AttnMaskType.causal, layer: int = 1, **changes: Any) -> SDPAttention:
    settings: dict[str, Any] = {"attention_dropout": 0.0} | changes
    config = TransformerConfig(
        num_layers=4, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, use_cpu_initialization=True, **settings
    )
    return SDPAttention(config, layer, mask_type, "self", softmax_scale=config.softmax_scale)


def inputs(queries: int, keys: int | None = None, groups: int = HEADS, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, HEADS), (keys or queries, groups), (keys or queries, groups)]
    return [
        torch.randn(length, batch, heads, SIZE, generator=generator, requires_grad=True) for length, heads in shapes
    ]


def formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float = 1 / math.sqrt(SIZE)
) -> torch.Tensor:
    """softmax(scale * q k) v with the keys that are not `seen` left out; `[s, b, h, d]` in, `[s, b, h * d]` out."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (tensor.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for tensor in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def agree(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Outputs and gradients within fp32 rounding."""
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    results = ((output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)) for output in (ours, theirs))
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).abs().max() < 2e-6 * reference.abs().max().clamp(min=1)


def lower(queries: int, keys: int) -> torch.Tensor:
    """Causal, the last query standing at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal(groups: int) -> None:
    leaves = inputs(13, groups=groups)
    agree(attention()(*leaves, None), formula(*leaves, lower(13, 13)), leaves)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_blocked_attention(length: int, groups: int) -> None:
    leaves = inputs(length, groups=groups)
    ours = blocked_causal_attention(*(leaf.permute(1, 2, 0, 3) for leaf in leaves), None).permute(2, 0, 1, 3)
    agree(ours.flatten(2), formula(*leaves, lower(length, length)), leaves)


def test_blocked_attention_to_values_of_another_size() -> None:
    query, key, value = inputs(100, groups=2)
    leaves = [query, key, value[..., :5].detach().requires_grad_()]
    ours = blocked_causal_attention(*(leaf.permute(1, 2, 0, 3) for leaf in leaves), None).permute(2, 0, 1, 3)
    agree(ours.flatten(2), formula(*leaves, lower(100, 100)), leaves)


def test_long_sequences_go_through_blocks() -> None:
    leaves = inputs(600)
    output = attention(softmax_scale=0.2)(*leaves, None)
    names, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            names.add(node.name())
            pending += [parent for parent, _ in node.next_functions]
    assert "_BlockedCausalAttentionBackward" in names
    agree(output, formula(*leaves, lower(600, 600), scale=0.2), leaves)


@pytest.mark.parametrize("queries", [1, 3, 12])
def test_cached_keys(queries: int) -> None:
    leaves = inputs(queries, keys=12)
    agree(attention()(*leaves, None, AttnMaskType.no_mask), formula(*leaves, lower(queries, 12)), leaves)


@pytest.mark.parametrize(("window", "left"), [((3, 0), 3), ((0, 0), 0), ((-1, 0), 12), ((3, -1), 3)], ids=str)
@pytest.mark.parametrize("queries", [1, 5, 12])
def test_window_counts_back_from_the_query(window: tuple[int, int], left: int, queries: int) -> None:
    leaves = inputs(queries, keys=12)
    seen = lower(queries, 12).triu(12 - queries - left)
    agree(attention(window_size=window)(*leaves, None), formula(*leaves, seen), leaves)


@pytest.mark.parametrize("queries", [10, 3, 1])
def test_a_query_sees_no_key_before_its_own_chunk(queries: int) -> None:
    config = TransformerConfig(num_layers=2, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)
    core = VariantAttention(config, 2, AttnMaskType.causal, "self", attention_dropout=0.0, chunks=[None, 4])
    query, key, value = leaves = inputs(queries, 10)
    chunk = torch.arange(10) // 4
    padding = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    padding[0, ..., 9] = True
    seen = lower(queries, 10) & (chunk[-queries:, None] == chunk)
    agree(core(query, key, value, None), formula(query, key, value, seen), leaves)
    agree(core(query, key, value, padding), formula(query, key, value, seen & ~padding), leaves)


def test_two_sided_window_without_causality() -> None:
    leaves = inputs(9)
    seen = torch.ones(9, 9, dtype=torch.bool).triu(-2).tril(1)
    agree(attention(AttnMaskType.no_mask, window_size=(2, 1))(*leaves, None), formula(*leaves, seen), leaves)


@pytest.mark.parametrize(("layer", "windowed"), [(1, True), (2, True), (3, False), (4, True)])
def test_window_skips_layers(layer: int, windowed: bool) -> None:
    leaves = inputs(9)
    seen = lower(9, 9).triu(-2) if windowed else lower(9, 9)
    module = attention(layer=layer, window_size=(2, 0), window_attn_skip_freq=3)
    agree(module(*leaves, None), formula(*leaves, seen), leaves)


def test_mask_hides_beside_causality() -> None:
    leaves = inputs(6)
    hidden = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    hidden[1, 0, 3:, :3] = True
    agree(attention()(*leaves, hidden), formula(*leaves, lower(6, 6) & ~hidden), leaves)


@pytest.mark.parametrize("mask_type", [AttnMaskType.padding, AttnMaskType.arbitrary, AttnMaskType.no_mask])
def test_mask_alone(mask_type: AttnMaskType) -> None:
    leaves = inputs(6)
    hidden = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    hidden[0, :, :, 4:] = True
    agree(attention(mask_type)(*leaves, hidden), formula(*leaves, ~hidden), leaves)
    agree(attention(mask_type)(*leaves, None), formula(*leaves, torch.ones(6, 6, dtype=torch.bool)), leaves)


def packed_bounds(bounds: list[int], starts: list[int] | None = None) -> PackedSeqParams:
    exact = torch.tensor(bounds, dtype=torch.int32)
    padded = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    return PackedSeqParams("thd", exact, exact, padded, padded)


def test_packed_documents_do_not_see_each_other() -> None:
    leaves = inputs(10, groups=2, batch=1)
    seen = torch.block_diag(lower(3, 3), lower(1, 1), lower(6, 6)).bool()
    rows = [leaf.squeeze(1) for leaf in leaves]
    ours = attention()(*rows, None, packed_seq_params=packed_bounds([0, 3, 3, 4, 10]))
    agree(ours.unsqueeze(1), formula(*leaves, seen), leaves)


def test_padding_in_a_packed_batch_comes_out_as_zeros() -> None:
    rows = [leaf.squeeze(1) for leaf in inputs(12, batch=1)]
    output = attention()(*rows, None, packed_seq_params=packed_bounds([0, 3, 7], starts=[0, 4, 10]))
    compact = [torch.cat([row[:3], row[4:8]]) for row in rows]
    expected = attention()(*compact, None, packed_seq_params=packed_bounds([0, 3, 7]))
    assert torch.equal(torch.cat([output[:3], output[4:8]]), expected)
    assert output[3].abs().sum() == output[8:].abs().sum() == 0


@pytest.mark.parametrize(
    ("bounds", "starts", "culprit"),
    [([0, 5, 4], None, "do not ascend"), ([0, 5, 11], None, "10 tokens"), ([0, 4, 8], [0, 2, 8], "do not ascend")],
)
def test_broken_bounds_are_refused(bounds: list[int], starts: list[int] | None, culprit: str) -> None:
    rows = [leaf.squeeze(1) for leaf in inputs(10, batch=1)]
    with pytest.raises(BridgeError, match=culprit):
        attention()(*rows, None, packed_seq_params=packed_bounds(bounds, starts))


def test_packed_keys_need_the_bounds_of_the_queries() -> None:
    rows = [leaf.squeeze(1) for leaf in inputs(10, batch=1)]
    other = PackedSeqParams("thd", torch.tensor([0, 4, 10]), torch.tensor([0, 5, 10]))
    with pytest.raises(BridgeError, match="cu_seqlens_kv"):
        attention()(*rows, None, packed_seq_params=other)


def test_more_causal_queries_than_keys_are_refused() -> None:
    with pytest.raises(BridgeError, match="5 queries to only 3 keys"):
        attention()(*inputs(5, keys=3), None)


def test_attention_bias_is_refused() -> None:
    with pytest.raises(BridgeError, match="attention bias"):
        attention()(*inputs(3), None, attention_bias=torch.zeros(1, HEADS, 3, 3))


def dropped_by_megatron_generator() -> list[torch.Tensor]:
    """Attention over values of one: twice in training, again after seeding alike, and in evaluation."""
    parallel_state.initialize_model_parallel()
    module = attention(attention_dropout=0.5)
    query, key, _ = (leaf.detach() for leaf in inputs(160))
    ones = torch.ones_like(key)
    outputs = []
    for _ in range(2):
        model_parallel_cuda_manual_seed(5)
        surrounding = torch.get_rng_state()
        outputs += [module(query, key, ones, None), module(query, key, ones, None)]
        assert torch.equal(surrounding, torch.get_rng_state())
    return [*outputs, module.eval()(query, key, ones, None)]


def test_dropout_draws_from_megatron_generator() -> None:
    first, second, again, _, evaluated = run_ranks(1, dropped_by_megatron_generator, timeout=60)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    # Rows of probabilities sum to 1; half of them are kept and doubled.
    assert abs(first.mean().item() - 1) < 0.05
    assert first.std() > 0.01
    assert torch.allclose(evaluated, torch.ones_like(evaluated))
