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
from megatron.bridge.models.layer_specs.decoder_block import is_mixture_of_experts
from megatron.bridge.models.layer_specs.decoder_layer import VariantLayer
from megatron.bridge.models.layer_specs.moe_layer import VariantMoELayer
from megatron.bridge.models.layer_specs.norms import ProjectionNorm, RowParallelLinearWithNorm, torch_norm
from megatron.bridge.models.layer_specs.routers import VariantRouter
from megatron.bridge.models.layer_specs.sdpa_attention import SDPAttention
from megatron.bridge.models.layer_specs.variant_attention import VariantAttention
from megatron.bridge.models.layer_specs.xielu import mlp_with_xielu

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
        attention_softcap: scores s become cap * tanh(s / cap).
        embedding_multiplier: factor on the token embeddings, rounded to their dtype.
        trained_activation: the MLP's activation has parameters of its own (`xielu`); `activation_func` is then unused.
        embedding_norm: a norm on the embeddings.
        position_offset: rows of learned positions that are never looked up; position p has row p + offset.
        alibi_slopes: per head of the model, the penalty of a score per position between query and key.
        residual_multiplier: factor on what attention and the MLP add to the residual.
        logits_multiplier: factor on the logits.
        logits_softcap: logits l become cap * tanh(l / cap).
        rotary_reversed: queries and keys turn the other way round.
        output_bias: bias of the output layer.
        routing: how a mixture of experts chooses and weighs them, where Megatron-Core has no switch for it: a name in
            `ROUTING_RULES`.
        routing_eps: what that rule makes of it.
        moe_multiplier: factor on what a mixture of experts gives.
        latent_norm_epsilon: epsilon of the norms on multi-latent attention's latents (None: as other norms').
        group_ranking: groups of experts are ranked by this many of their best experts (None: Megatron-Core's way).
        layer_rope_parameters: where layers turn differently, `rope_parameters` of each layer (None: as the model's).
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
    attention_softcap: float | None = None
    embedding_multiplier: float = 1.0
    trained_activation: Literal["xielu"] | None = None
    embedding_norm: bool = False
    position_offset: int = 0
    alibi_slopes: list[float] | None = None
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    rotary_reversed: bool = False
    output_bias: bool = False
    routing: Literal["sparsemixer", "biased_softmax", "sigmoid"] | None = None
    routing_eps: float = 0.0
    moe_multiplier: float = 1.0
    latent_norm_epsilon: float | None = None
    group_ranking: int | None = None
    layer_rope_parameters: list[dict[str, Any]] | None = None


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
    layers = [
        dataclasses.replace(layer, module=VariantLayer, submodules=_layer(layer.submodules, config, variant))
        for layer in spec.layer_specs or ()
    ]
    return dataclasses.replace(spec, layer_specs=layers, layer_norm=_norm(spec.layer_norm, variant))


def is_plain(variant: BlockVariant) -> bool:
    """Whether the layers are Megatron-Core's own."""
    of_the_model = {"embedding_multiplier", "logits_multiplier", "logits_softcap", "output_bias"}
    of_the_model |= {"embedding_norm", "position_offset", "rotary_reversed", "group_ranking"}
    fields = [field for field in dataclasses.fields(BlockVariant) if field.name not in of_the_model]
    return all(getattr(variant, field.name) == field.default for field in fields)


def _layer(
    layer: TransformerLayerSubmodules, config: TransformerConfig, variant: BlockVariant
) -> TransformerLayerSubmodules:
    if layer.input_layernorm is IdentityOp and (variant.parallel_block or not variant.pre_norm):
        raise _needs_torch("a parallel block, or no norms before attention and MLP; norms are part of the projections")
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
    if variant.residual_multiplier != 1.0:
        bdas = [_scaled(bda, variant.residual_multiplier) for bda in bdas]
    return dataclasses.replace(
        layer,
        input_layernorm=norms[0],
        pre_mlp_layernorm=norms[1],
        self_attention=attention,
        mlp=mlp,
        self_attn_bda=bdas[0],
        mlp_bda=bdas[1],
    )


def _mixture(part: Any, variant: BlockVariant) -> Any:
    """The mixture of experts' `partial` with the variant's router and what stands behind the experts."""
    if variant.routing is not None:
        router = functools.partial(VariantRouter, rule=variant.routing, eps=variant.routing_eps)
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
        params["temperature"] = variant.query_temperature
    if variant.alibi_slopes is not None:
        params["slopes"] = tuple(variant.alibi_slopes)
    if variant.qk_norm_after_rope:
        params["norm"] = functools.partial(torch_norm, weight=variant.norm_weight, bias=variant.norm_bias)
        part = _changed(part, q_layernorm=lambda builder: IdentityOp, k_layernorm=lambda builder: IdentityOp)
    elif variant.latent_norm_epsilon is not None:
        names = [name for name in ("q_layernorm", "kv_layernorm") if getattr(part.submodules, name) is not IdentityOp]
        part = _changed(part, **{name: _with_epsilon(variant.latent_norm_epsilon) for name in names})
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


def _with_epsilon(epsilon: float) -> Builder:
    def change(norm: Any) -> Builder:
        if norm is not torch_norm:
            raise _needs_torch(f"norms on latents with an epsilon of their own ({epsilon})")
        return lambda *args, **kwargs: norm(*args, **{**kwargs, "eps": epsilon})

    return change


def _core_attention(builder: Any, params: dict[str, Any]) -> ModuleSpec:
    if builder is not SDPAttention:
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
