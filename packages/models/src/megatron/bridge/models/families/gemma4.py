"""Gemma 4 of Google, its text model (2026)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.shards import COLUMN
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import InterleaveGroups, PadRows
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import fragments
from megatron.bridge.models import moe_fragments as moe
from megatron.bridge.models.families.dense import DenseBridge, shared_fields
from megatron.bridge.models.families.layer_ropes import rope_fields_by_layer_type
from megatron.bridge.models.fragments import HFNames
from megatron.bridge.models.routing import balancing, softmax_routing

if TYPE_CHECKING:
    from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers

_HF, _OWN = "model.layers.{l}", "decoder.layers.{l}"
_MLP_WEIGHT = re.compile(r"\.mlp\.(shared_experts\.)?linear_fc[12]\.weight")
_KEYS_AND_VALUES = ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "k_norm.weight", "v_norm.weight")


class Gemma4Bridge(DenseBridge):
    """`Gemma4ForCausalLM`: layers without a window have larger heads, and may take their values from their keys.

    The last layers may attend to the keys and values of earlier ones. Layers may read an input of their own, made from
    the tokens, and a mixture of experts may stand beside each MLP.
    """

    shared_fields = shared_fields(without=["num_query_groups"])
    names = HFNames(mlp_norm="pre_feedforward_layernorm")
    activation_field = "hidden_activation"

    def qkv_bias(self) -> bool:
        return bool(self.hf_config.attention_bias)

    output_bias = qkv_bias

    def qk_norm(self) -> bool:
        return True

    def head_dim(self) -> int:
        return self.heads()[0][0]

    def rope_fields(self) -> dict[str, Any]:
        return rope_fields_by_layer_type(self.hf_config)

    def heads(self) -> list[tuple[int, int]]:
        """Per layer, channels per head, and key/value heads."""
        config = self.hf_config
        if hasattr(config, "per_layer_config"):
            return [(layer.head_dim, layer.num_key_value_heads) for layer in config.per_layer_config]
        # As transformers before 5.20 has it.
        few = config.attention_k_eq_v and config.num_global_key_value_heads
        sliding = config.head_dim, config.num_key_value_heads
        full = config.global_head_dim or config.head_dim, few or config.num_key_value_heads
        return [full if kind == "full_attention" else sliding for kind in config.layer_types]

    def key_value_sources(self) -> list[int | None]:
        """Per layer, the earlier layer whose keys and values it attends to; None: its own."""
        kinds: Sequence[str] = self.hf_config.layer_types
        first = len(kinds) - self.hf_config.num_kv_shared_layers
        last = {kind: layer for layer, kind in enumerate(kinds[:first])}
        if absent := sorted(set(kinds[first:]) - last.keys()):
            raise BridgeError(
                f"config.json: num_kv_shared_layers={self.hf_config.num_kv_shared_layers} leaves no layer of the kind "
                f"{', '.join(absent)} with keys and values to share"
            )
        return [None if layer < first else last[kind] for layer, kind in enumerate(kinds)]

    def layers(self) -> "HeterogeneousLayers":
        """How the layers differ."""
        from megatron.bridge.models.heterogeneous_layers import HeterogeneousLayers

        config, sources = self.hf_config, self.key_value_sources()
        mlp = "moe_shared_expert_intermediate_size" if config.enable_moe_block else "ffn_hidden_size"
        doubled = [1 + bool(config.use_double_wide_mlp and source is not None) for source in sources]
        sizes = [
            {"kv_channels": size, "num_query_groups": groups, mlp: wide * config.intermediate_size}
            for (size, groups), wide in zip(self.heads(), doubled, strict=True)
        ]
        return HeterogeneousLayers(
            sizes=sizes,
            key_value_sources=sources,
            value_is_key=[config.attention_k_eq_v and kind == "full_attention" for kind in config.layer_types],
            input_size=config.hidden_size_per_layer_input or 0,
            input_vocab_size=config.vocab_size_per_layer_input,
            experts_beside_mlp=config.enable_moe_block,
        )

    def differences(self) -> Mapping[str, Any]:
        config = self.hf_config
        if config.use_bidirectional_attention == "all":
            raise BridgeError("config.json: use_bidirectional_attention='all' makes this an encoder, no causal model")
        return {
            "post_norm": True,
            "softmax_scale": 1.0,
            "num_query_groups": self.heads()[0][1],
            "embedding_multiplier": config.hidden_size**0.5,
            "logits_softcap": config.final_logit_softcapping,
            "heterogeneous_layers": self.layers(),
            # Megatron-Core's default does not go with shapes that pipeline stages tell each other.
            "moe_token_dispatcher_type": "alltoall",
            **(self.expert_fields() if config.enable_moe_block else {}),
        }

    def moe_layers(self) -> Sequence[bool] | None:
        return [True] * self.hf_config.num_hidden_layers if self.hf_config.enable_moe_block else None

    def expert_fields(self) -> dict[str, Any]:
        """Provider fields of the experts beside the MLPs."""
        config = self.hf_config
        return {
            **softmax_routing(config.top_k_experts, normalised=True),
            **balancing(None),
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": config.intermediate_size,
            "moe_layer_freq": 1,
            "moe_expert_capacity_factor": None,
        }

    def mapping_registry(self) -> WeightTable:
        table, config = super().mapping_registry(), self.hf_config
        experts = config.enable_moe_block
        others = [rule for rule in table.rules if not (experts and rule.megatron.startswith(f"{_OWN}.mlp."))]
        return WeightTable.of(
            self.by_width([*others, *(_expert_rules() if experts else [])]),
            WeightRule(f"{_OWN}.layer_scalar", f"{_HF}.layer_scalar"),
            _input_rules(config.vocab_size_per_layer_input) if config.hidden_size_per_layer_input else [],
            tied=table.tied,
            ignored=table.ignored,
        )

    def by_width(self, rules: Sequence[WeightRule]) -> list[WeightRule]:
        """The rules, with those of the MLPs' weights apart for every width."""
        if not (self.hf_config.use_double_wide_mlp and self.hf_config.num_kv_shared_layers):
            return list(rules)
        wide = [source is not None for source in self.key_value_sources()]
        mlp = [rule for rule in rules if _MLP_WEIGHT.search(rule.megatron)]
        parts = [fragments.at_layers(mlp, _where(wide, doubled)) for doubled in (False, True)]
        return [*(rule for rule in rules if rule not in mlp), *parts[0], *parts[1]]

    def attention_rules(self, differences: Mapping[str, Any]) -> list[WeightRule]:
        """Attention's weights: a set of rules for every kind of layer."""
        layers = self.layers()
        given = zip(layers.key_value_sources, layers.value_is_key, strict=True)
        own = [0 if source is not None else 2 - is_key for source, is_key in given]
        kinds = list(zip(own, self.heads(), strict=True))
        if layers.alike:
            return self._attention(*kinds[0])
        return [
            rule
            for kind in dict.fromkeys(kinds)
            for rule in fragments.at_layers(self._attention(*kind), _where(kinds, kind))
        ]

    def _attention(self, own: int, heads: tuple[int, int]) -> list[WeightRule]:
        """Of layers whose first projection gives queries and so many of keys and values."""
        (size, groups), queries = heads, self.hf_config.num_attention_heads
        rules = fragments.attention(
            heads=queries,
            groups=groups,
            head_dim=size,
            qkv_bias=self.qkv_bias(),
            output_bias=self.output_bias(),
            qk_norm=True,
            fused=InterleaveGroups((queries // groups * size, size, size)[: 1 + own]),
            names=replace(self.names, qkv=self.names.qkv[: 1 + own]),
        )
        return [rule for rule in rules if own or ".k_layernorm." not in rule.megatron]

    def ignored(self) -> tuple[str, ...]:
        """Published files hold keys and values of layers that have none."""
        sharing = [str(layer) for layer, source in enumerate(self.key_value_sources()) if source is not None]
        if not sharing:
            return super().ignored()
        layer = f"model.layers.{{l={','.join(sharing)}}}.self_attn"
        return (*super().ignored(), *(f"{layer}.{name}" for name in _KEYS_AND_VALUES))


def _where[T](values: Sequence[T], wanted: T) -> list[int]:
    return [index for index, value in enumerate(values) if value == wanted]


def _input_rules(vocab_size: int) -> list[WeightRule]:
    """What makes every layer's input, and what each layer makes of it."""
    hf_layer, own_layer = f"{_HF}.per_layer", f"{_OWN}.layer_input"
    table = "layer_inputs.word_embeddings.weight", "model.embed_tokens_per_layer.weight"
    return [
        WeightRule(*table, PadRows(vocab_size), COLUMN),
        WeightRule("layer_inputs.projection.weight", "model.per_layer_model_projection.weight"),
        WeightRule("layer_inputs.norm.weight", "model.per_layer_projection_norm.weight"),
        WeightRule(f"{own_layer}.gate.weight", f"{hf_layer}_input_gate.weight"),
        WeightRule(f"{own_layer}.projection.weight", f"{hf_layer}_projection.weight"),
        WeightRule(f"{own_layer}.norm.weight", f"{_HF}.post_per_layer_input_norm.weight"),
    ]


def _expert_rules() -> list[WeightRule]:
    """A mixture of experts beside an MLP, which is its shared expert."""
    own = f"{_OWN}.mlp"
    norms = {
        "mlp_layernorm": "pre_feedforward_layernorm",
        "mlp_post_layernorm": "post_feedforward_layernorm_1",
        "experts_layernorm": "pre_feedforward_layernorm_2",
        "experts_post_layernorm": "post_feedforward_layernorm_2",
    }
    return [
        *(WeightRule(f"{own}.{name}.weight", f"{_HF}.{hf}.weight") for name, hf in norms.items()),
        *moe.moe_post_norm(),
        *moe.router(f"{_HF}.router.proj"),
        WeightRule(f"{own}.router.input_scale", f"{_HF}.router.scale"),
        WeightRule(f"{own}.router.expert_scale", f"{_HF}.router.per_expert_scale"),
        *moe.shared_experts(f"{_HF}.mlp"),
        *moe.stacked_experts(f"{_HF}.experts.gate_up_proj", f"{_HF}.experts.down_proj"),
    ]
