"""Ways in which decoders depart from Megatron-Core's own block: fields of a provider, and changes to a layer spec."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers
from megatron.bridge.models.layer_specs.decoder_block import is_mixture_of_experts
from megatron.bridge.models.layer_specs.decoder_layer import VariantLayer
from megatron.bridge.models.layer_specs.heterogeneous_layer import HeterogeneousLayer, with_heterogeneous_parts
from megatron.bridge.models.layer_specs.moe_layer import VariantMoELayer
from megatron.bridge.models.layer_specs.norms import ProjectionNorm, RowParallelLinearWithNorm, torch_norm
from megatron.bridge.models.layer_specs.routers import VariantRouter
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.sinusoids import Waves
from megatron.bridge.models.layer_specs.variant_attention import VariantAttention
from megatron.bridge.models.layer_specs.xielu import mlp_with_xielu
from megatron.bridge.models.mamba_beside_attention import MambaBesideAttention

type Builder = Callable[..., Any]


@dataclass(kw_only=True)
class BlockVariant:
    """What `TransformerConfig` cannot say about a decoder. The defaults are Megatron-Core's own block.

    Args:
        pre_norm: norms before attention and before the MLP.
        post_norm: norms on what attention and the MLP give, before the residual is added.
        norm_weight, norm_bias: whether norms have weights, and LayerNorms biases.
        parallel_block: attention and MLP read the same input, and both are added to it.
        shared_pre_norm: in a parallel block, the MLP reads attention's norm and has none of its own.
        qk_norm_over: what a norm of queries and keys spans: each head's `channels` with weights that all heads share;
            the same with weights per head (`heads`); or the whole `projection`.
        qk_norm_after_rope: the norm of queries and keys follows the rotation.
        query_temperature: (beta, positions): a query at position p is multiplied by 1 + beta * log(1 + p // positions).
        query_temperature_start: the first token's position p.
        query_temperature_layers: where that is not so in all layers: 1 for those where it is, 0 for the others.
        qk_l2_norm_layers: queries and keys get an RMS norm without weights, behind the rotation: 1 or 0 per layer.
        attention_chunks: per layer, how many tokens make a chunk, before which its queries see nothing; None: no chunk.
        attention_softcap: scores s become cap * tanh(s / cap).
        embedding_multiplier: factor on the token embeddings, rounded to their dtype.
        trained_activation: the MLP's activation has parameters of its own (`xielu`); `activation_func` is then unused.
        embedding_norm: a norm on the embeddings.
        sinusoidal_positions: fixed waves as absolute positions, of this kind; `position_embedding_type` is then `none`.
        position_offset: rows of learned positions that are never looked up; position p has row p + offset.
        alibi_slopes: per head of the model, the penalty of a score per position between query and key.
        residual_multiplier: factor on what attention and the MLP add to the residual.
        mlp_multiplier: a further factor on what the MLP gives.
        mamba_beside_attention: a Mamba-2 mixer reads what attention reads, and what both give is added up.
        logits_multiplier: factor on the logits.
        logits_softcap: logits l become cap * tanh(l / cap).
        rotary_reversed: queries and keys turn the other way round.
        output_bias: bias of the output layer.
        routing: how a mixture of experts chooses and weighs them, where Megatron-Core has no switch for it: a name in
            `ROUTING_RULES`.
        routing_eps: what that rule makes of it.
        routing_bias: that rule has a bias per expert, which takes part in the choice only and is not trained.
        router_fp32: the router's weight is in fp32, whatever the model's dtype.
        moe_multiplier: factor on what a mixture of experts gives.
        latent_norm_epsilon: epsilon of the norms on multi-latent attention's latents (None: as other norms').
        group_ranking: groups of experts are ranked by this many of their best experts (None: Megatron-Core's way).
        mrope_interleaved: time, height and width of `mrope` take turns along the channels.
        block_attention: tokens of a block see each other in both directions; the attention mask gives each token's
            block [batch, 1, 1, sequence], negative for those in none.
        layer_rope_parameters: where layers turn differently, `rope_parameters` of each layer (None: as the model's).
        heterogeneous_layers: layers differ in size, share keys and values, or read inputs of their own.
    """

    pre_norm: bool = True
    post_norm: bool = False
    norm_weight: bool = True
    norm_bias: bool = True
    parallel_block: bool = False
    shared_pre_norm: bool = False
    qk_norm_over: Literal["channels", "heads", "projection"] = "channels"
    qk_norm_after_rope: bool = False
    query_temperature: tuple[float, int] | None = None
    query_temperature_start: int = 0
    query_temperature_layers: list[int] | None = None
    qk_l2_norm_layers: list[int] | None = None
    attention_chunks: list[int | None] | None = None
    attention_softcap: float | None = None
    embedding_multiplier: float = 1.0
    trained_activation: Literal["xielu"] | None = None
    embedding_norm: bool = False
    sinusoidal_positions: Waves | None = None
    position_offset: int = 0
    alibi_slopes: list[float] | None = None
    residual_multiplier: float = 1.0
    mlp_multiplier: float = 1.0
    mamba_beside_attention: MambaBesideAttention | None = None
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    rotary_reversed: bool = False
    output_bias: bool = False
    routing: Literal["sparsemixer", "softmax", "sigmoid", "normalised_sigmoid"] | None = None
    routing_eps: float = 0.0
    routing_bias: bool = False
    router_fp32: bool = False
    moe_multiplier: float = 1.0
    latent_norm_epsilon: float | None = None
    group_ranking: int | None = None
    mrope_interleaved: bool = False
    block_attention: bool = False
    layer_rope_parameters: list[dict[str, Any]] | None = None
    heterogeneous_layers: HeterogeneousLayers | None = None


def with_variant(spec: Any, config: TransformerConfig, variant: BlockVariant) -> Any:
    """The decoder's spec with the variant's changes.

    Raises:
        BridgeError: the spec's modules cannot be changed so; only those of the layer spec `torch` can.
    """
    if is_plain(variant):
        return spec
    if not isinstance(spec, TransformerBlockSubmodules):
        raise BridgeError("the layer spec gives no block of layers to change; use layer_spec='torch'")
    if config.recompute_granularity == "selective" and variant.parallel_block:
        raise BridgeError(
            "a parallel block has no selective recomputation; set recompute_granularity to 'full' or None"
        )
    kind: dict[str, Any] = {"module": VariantLayer}
    if variant.heterogeneous_layers is not None:
        _refuse_misfit(variant.heterogeneous_layers, config)
        kind = {"module": HeterogeneousLayer, "params": {"layers": variant.heterogeneous_layers}}
    layers = [
        dataclasses.replace(layer, **kind, submodules=_layer(layer.submodules, config, variant))
        for layer in spec.layer_specs or ()
    ]
    return dataclasses.replace(spec, layer_specs=layers, layer_norm=_norm(spec.layer_norm, variant))


def is_plain(variant: BlockVariant) -> bool:
    """Whether the layers are Megatron-Core's own."""
    of_the_model = {"embedding_multiplier", "logits_multiplier", "logits_softcap", "output_bias"}
    of_the_model |= {"embedding_norm", "position_offset", "rotary_reversed", "group_ranking", "sinusoidal_positions"}
    of_the_model |= {"mrope_interleaved"}
    fields = [field for field in dataclasses.fields(BlockVariant) if field.name not in of_the_model]
    return all(getattr(variant, field.name) == field.default for field in fields)


def _layer(
    layer: TransformerLayerSubmodules, config: TransformerConfig, variant: BlockVariant
) -> TransformerLayerSubmodules:
    if layer.input_layernorm is IdentityOp and (variant.parallel_block or not variant.pre_norm):
        raise _needs_torch("a parallel block, or no norms before attention and MLP; norms are part of the projections")
    if layer.input_layernorm is IdentityOp and variant.mamba_beside_attention is not None:
        raise _needs_torch("a Mamba mixer that reads attention's norm; norms are part of the projections")
    norms = [_norm(norm, variant) for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)]
    if not variant.pre_norm:
        norms = [IdentityOp, IdentityOp]
    if variant.shared_pre_norm:
        norms[1] = IdentityOp
    attention, mlp = _attention(layer.self_attention, config, variant), layer.mlp
    bdas = [layer.self_attn_bda, layer.mlp_bda]
    if variant.post_norm:
        norm = functools.partial(torch_norm, weight=variant.norm_weight, bias=variant.norm_bias)
        attention = _changed(attention, linear_proj=lambda builder: _with_post_norm(builder, norm))
        if not is_mixture_of_experts(layer):
            mlp = _changed(mlp, linear_fc2=lambda builder: _with_post_norm(builder, norm))
    if is_mixture_of_experts(layer):
        mlp = _mixture(mlp, variant)
    if variant.trained_activation is not None:
        mlp = functools.partial(mlp_with_xielu, mlp.func, *mlp.args, **mlp.keywords)
    factors = variant.residual_multiplier, variant.residual_multiplier * variant.mlp_multiplier
    bdas = [bda if factor == 1.0 else _scaled(bda, factor) for bda, factor in zip(bdas, factors, strict=True)]
    changed = dataclasses.replace(
        layer,
        input_layernorm=norms[0],
        pre_mlp_layernorm=norms[1],
        self_attention=attention,
        mlp=mlp,
        self_attn_bda=bdas[0],
        mlp_bda=bdas[1],
    )
    if variant.heterogeneous_layers is not None:
        changed = with_heterogeneous_parts(changed, variant.heterogeneous_layers)
    beside = variant.mamba_beside_attention
    if beside is None:
        return changed
    # Megatron-Core's state-space modules, and with them Triton's, are imported for models that have such layers.
    from megatron.bridge.models.layer_specs.attention_beside_mamba import with_mamba

    return with_mamba(changed, beside)


def _refuse_misfit(layers: HeterogeneousLayers, config: TransformerConfig) -> None:
    if len(layers.sizes) != config.num_layers:
        raise BridgeError(
            f"num_layers={config.num_layers}, and heterogeneous_layers describes {len(layers.sizes)} of them; a model "
            "of other length needs a description of its own"
        )
    if layers.hands_on and config.recompute_granularity == "full":
        raise BridgeError(
            "layers that share keys and values or have inputs of their own cannot be recomputed whole; set "
            "recompute_granularity to 'selective' or None"
        )


def _mixture(part: Any, variant: BlockVariant) -> Any:
    """The mixture of experts' `partial` with the variant's router and what stands behind the experts."""
    if variant.routing is not None or variant.router_fp32:
        router = functools.partial(
            VariantRouter,
            rule=variant.routing,
            eps=variant.routing_eps,
            bias=variant.routing_bias,
            fp32=variant.router_fp32,
        )
        part = _changed(part, router=lambda builder: router)
    if not variant.post_norm and variant.moe_multiplier == 1.0:
        return part
    norm = functools.partial(torch_norm, weight=variant.norm_weight, bias=variant.norm_bias)
    behind: dict[str, Any] = {"norm": norm if variant.post_norm else None, "multiplier": variant.moe_multiplier}
    return functools.partial(VariantMoELayer, *part.args, **part.keywords, **behind)


def _norm(builder: Any, variant: BlockVariant) -> Any:
    if variant.norm_weight and variant.norm_bias:
        return builder
    if builder is not torch_norm:
        raise _needs_torch("norms without weights or biases")
    return functools.partial(torch_norm, weight=variant.norm_weight, bias=variant.norm_bias)


def _attention(part: Any, config: TransformerConfig, variant: BlockVariant) -> Any:
    params: dict[str, Any] = {}
    if variant.attention_softcap is not None:
        params["softcap"] = variant.attention_softcap
    if variant.query_temperature is not None:
        params |= {
            "temperature": variant.query_temperature,
            "temperature_start": variant.query_temperature_start,
            "temperature_layers": variant.query_temperature_layers,
        }
    if variant.qk_l2_norm_layers is not None:
        params["l2_norm_layers"] = variant.qk_l2_norm_layers
    if variant.attention_chunks is not None:
        params["chunks"] = variant.attention_chunks
    if variant.alibi_slopes is not None:
        params["slopes"] = tuple(variant.alibi_slopes)
    if variant.block_attention:
        params["blocks"] = True
    if variant.qk_norm_after_rope:
        params["norm"] = functools.partial(torch_norm, weight=variant.norm_weight, bias=variant.norm_bias)
        part = _changed(part, q_layernorm=lambda builder: IdentityOp, k_layernorm=lambda builder: IdentityOp)
    elif config.multi_latent_attention:
        part = _with_latent_epsilon(part, variant.latent_norm_epsilon)
    elif config.qk_layernorm and variant.qk_norm_over != "channels":
        heads = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        over = functools.partial(ProjectionNorm, whole=variant.qk_norm_over == "projection")
        q, k = (functools.partial(over, heads=number) for number in heads)
        part = _changed(part, q_layernorm=lambda builder: q, k_layernorm=lambda builder: k)
    elif config.qk_layernorm:
        part = _changed(
            part, q_layernorm=lambda norm: _norm(norm, variant), k_layernorm=lambda norm: _norm(norm, variant)
        )
    return _changed(part, core_attention=lambda core: _core_attention(core, params)) if params else part


def _with_latent_epsilon(part: Any, epsilon: float | None) -> Any:
    if epsilon is None:
        return part

    def change(norm: Any) -> Builder:
        if norm not in (torch_norm, IdentityOp):
            raise _needs_torch(f"norms on latents with an epsilon of their own ({epsilon})")
        return norm if norm is IdentityOp else lambda *args, **kwargs: norm(*args, **{**kwargs, "eps": epsilon})

    return _changed(part, q_layernorm=change, kv_layernorm=change)


def _core_attention(builder: Any, params: dict[str, Any]) -> ModuleSpec:
    if builder not in (SDPAttention, VariantAttention):
        raise _needs_torch(f"attention with {', '.join(params)}")
    return ModuleSpec(module=VariantAttention, params=params)


def _with_post_norm(builder: Any, norm: Builder) -> Any:
    if builder is not RowParallelLinear:
        raise _needs_torch("norms behind attention and MLP")
    return functools.partial(RowParallelLinearWithNorm, norm=norm)


def _scaled(get_bias_dropout_add: Any, factor: float) -> Any:
    """Megatron-Core's bias-dropout-add with a factor on what is added to the residual."""

    def get(training: bool, fused: bool) -> Any:
        add = get_bias_dropout_add(training, fused)

        def scale_and_add(output_with_bias: Any, residual: Any, probability: float) -> Any:
            output, bias = output_with_bias
            return add((output * factor, None if bias is None else bias * factor), residual, probability)

        return scale_and_add

    return get


def _changed(part: Any, **changes: Builder) -> Any:
    """A part's spec (attention's `ModuleSpec`, or the MLP's `partial`) with some submodules changed."""
    submodules = part.submodules if isinstance(part, ModuleSpec) else part.keywords["submodules"]
    values = {name: change(getattr(submodules, name)) for name, change in changes.items()}
    changed = dataclasses.replace(submodules, **values)
    if isinstance(part, ModuleSpec):
        return dataclasses.replace(part, submodules=changed)
    return functools.partial(part.func, *part.args, **{**part.keywords, "submodules": changed})


def _needs_torch(what: str) -> BridgeError:
    return BridgeError(f"the model has {what}, which this layer spec's modules cannot do; use layer_spec='torch'")
