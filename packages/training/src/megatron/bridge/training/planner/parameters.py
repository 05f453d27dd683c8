"""How many parameters each part of a model has on a rank, exactly."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.bridge.training.planner.shape import ModelShape


@dataclass(frozen=True)
class Part:
    """The weights of one kind on a rank.

    Attributes:
        kind: `embedding`, `attention`, `mlp`, `experts`, `router`, `norms`, `output` or `prediction`.
        count: parameters on this rank.
        is_expert: divided among experts' ranks; its gradients are averaged over those that hold the same experts.
    """

    kind: str
    count: int
    is_expert: bool = False

    def times(self, number: int) -> "Part":
        """The same weights in so many layers."""
        return Part(self.kind, self.count * number, self.is_expert)


def stage_parts(shape: ModelShape, stage: int) -> list[Part]:
    """The weights of a pipeline stage on any one of its ranks."""
    first, last = stage == 0, stage == shape.pipeline_model_parallel_size - 1
    layers = Counter(stage_layers(shape, stage))
    parts = [each.times(number) for kind, number in layers.items() for each in layer_parts(shape, experts=kind)]
    embedding = shape.padded_vocab_size // shape.tensor_model_parallel_size * shape.hidden_size
    if first:
        parts += [Part("embedding", embedding), *_positions(shape)]
        parts += [Part("norms", _norm(shape, shape.hidden_size))] * shape.embedding_norm
    if last:
        parts += [Part("norms", _norm(shape, shape.hidden_size)), *_output(shape, embedding, also_first=first)]
        parts += _prediction(shape, embedding, also_first=first)
    return parts


def stage_layers(shape: ModelShape, stage: int) -> list[bool]:
    """Of each layer of a pipeline stage, whether it has experts. Virtual stages take turns along the model."""
    stages, virtual = shape.pipeline_model_parallel_size, shape.virtual_pipeline_model_parallel_size or 1
    depth = shape.num_layers // (stages * virtual)
    kinds = shape.has_experts
    starts = [(chunk * stages + stage) * depth for chunk in range(virtual)]
    return [kind for start in starts for kind in kinds[start : start + depth]]


def totals(parts: list[Part]) -> dict[str, int]:
    """Parameters by kind."""
    counted: Counter[str] = Counter()
    for part in parts:
        counted[part.kind] += part.count
    return dict(counted)


def model_parameters(shape: ModelShape) -> int:
    """Of the whole model, without padding and prediction layers, each weight once: what is published."""
    alone = shape.replace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        make_vocab_size_divisible_by=1,
        mtp_num_layers=None,
    )
    return sum(part.count for part in stage_parts(alone, 0))


def layer_parts(shape: ModelShape, *, experts: bool) -> Iterator[Part]:
    """The weights of one layer on a rank."""
    attention = _latent_attention if shape.multi_latent_attention else _attention
    yield from attention(shape)
    norms = 0
    if shape.pre_norm:
        norms += 1 if shape.shared_pre_norm else 2
    norms += 2 if shape.post_norm else 0
    yield Part("norms", norms * _norm(shape, shape.hidden_size))
    if experts:
        yield from _experts(shape)
    else:
        yield Part("mlp", _mlp(shape, shape.ffn_hidden_size or 0, shape.tensor_model_parallel_size))


def _norm(shape: ModelShape, width: int) -> int:
    with_bias = shape.normalization == "LayerNorm" and shape.norm_bias
    return width * (int(shape.norm_weight) + int(with_bias))


def _bias(shape: ModelShape, own: bool | None) -> bool:
    return shape.add_bias_linear if own is None else own


def _attention(shape: ModelShape) -> Iterator[Part]:
    tensor, hidden, channels = shape.tensor_model_parallel_size, shape.hidden_size, shape.kv_channels or 0
    query = shape.num_attention_heads * channels // tensor
    # Fewer groups than ranks: ranks hold copies of a group.
    groups = max(shape.num_query_groups or 0, tensor)
    fused = query * (2 if shape.attention_output_gate else 1) + 2 * groups * channels // tensor
    count = fused * (hidden + int(shape.add_qkv_bias or shape.add_bias_linear)) + query * hidden
    count += hidden if _bias(shape, shape.add_attention_output_bias) else 0
    count += shape.num_attention_heads // tensor if shape.softmax_type == "learnable" else 0
    yield Part("attention", count)
    if shape.qk_layernorm:
        widths = {
            "channels": 2 * channels,
            "heads": query + groups * channels // tensor,
            # Of all heads, on every rank.
            "projection": query * tensor + (shape.num_query_groups or 0) * channels,
        }
        yield Part("norms", _norm(shape, widths[shape.qk_norm_over]))


def _latent_attention(shape: ModelShape) -> Iterator[Part]:
    tensor, hidden, heads = shape.tensor_model_parallel_size, shape.hidden_size, shape.num_attention_heads
    query_width = heads * (shape.qk_head_dim + shape.qk_pos_emb_head_dim) // tensor
    rank, kv_rank = shape.q_lora_rank, shape.kv_lora_rank
    query = hidden * query_width if rank is None else rank // tensor * hidden + rank * query_width
    down = hidden * ((kv_rank + shape.qk_pos_emb_head_dim) // tensor)
    up = kv_rank * heads * (shape.qk_head_dim + shape.v_head_dim) // tensor
    yield Part("attention", query + down + up + heads * shape.v_head_dim // tensor * hidden)
    yield Part("norms", _norm(shape, (rank or 0) + kv_rank))


def _mlp(shape: ModelShape, width: int, divided: int) -> int:
    own, gates = width // divided, 2 if shape.gated_linear_unit else 1
    biases = own * gates + shape.hidden_size if _bias(shape, shape.add_mlp_bias) else 0
    return (gates + 1) * shape.hidden_size * own + biases


def _experts(shape: ModelShape) -> Iterator[Part]:
    experts, hidden = shape.num_moe_experts or 0, shape.hidden_size
    held = experts // shape.expert_model_parallel_size
    yield Part("experts", held * _mlp(shape, shape.moe_ffn_hidden_size or 0, shape.expert_tensor), is_expert=True)
    # Biases of experts come with one of the router.
    yield Part("router", experts * (hidden + int(shape.add_bias_linear)))
    shared = shape.moe_shared_expert_intermediate_size
    if shared:
        yield Part("mlp", _mlp(shape, shared, shape.tensor_model_parallel_size))
        yield Part("router", hidden if shape.moe_shared_expert_gate else 0)


def _positions(shape: ModelShape) -> list[Part]:
    if shape.position_embedding_type != "learned_absolute":
        return []
    rows = (shape.max_position_embeddings or shape.seq_length) + shape.position_offset
    return [Part("embedding", rows * shape.hidden_size)]


def _output(shape: ModelShape, embedding: int, *, also_first: bool) -> list[Part]:
    held = also_first and shape.share_embeddings_and_output_weights
    bias = shape.padded_vocab_size // shape.tensor_model_parallel_size if shape.output_bias else 0
    return [Part("output", (0 if held else embedding) + bias)]


def _prediction(shape: ModelShape, embedding: int, *, also_first: bool) -> Iterator[Part]:
    """Each layer joins the hidden state with the next token's embedding, which the last stage then holds too."""
    count = shape.mtp_num_layers or 0
    if not count:
        return
    if not also_first and not shape.share_embeddings_and_output_weights:
        yield Part("prediction", embedding)
    joined = 2 * shape.hidden_size * shape.hidden_size // shape.tensor_model_parallel_size
    for _ in range(count):
        yield Part("prediction", joined + 3 * _norm(shape, shape.hidden_size))
        for part in layer_parts(shape, experts=shape.has_experts[-1]):
            yield Part("prediction", part.count, part.is_expert)
