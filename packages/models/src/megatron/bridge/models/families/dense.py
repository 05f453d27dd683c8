"""Decoders with one MLP per layer: what their configurations mean to Megatron, and the table they share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.conversion import hf_config
from megatron.bridge.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Transform
from megatron.bridge.errors import BridgeError
from megatron.bridge.models import fragments
from megatron.bridge.models.families.activations import activation

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

# Megatron field <- Hugging Face field, the same value on both sides; read in both directions.
SHARED_FIELDS: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "init_method_std": "initializer_range",
    "attention_dropout": "attention_dropout",
}


def shared_fields(without: Sequence[str] = (), **changes: str) -> dict[str, str]:
    """`SHARED_FIELDS` with other Hugging Face names for some, and without those that the configuration lacks."""
    return {field: name for field, name in {**SHARED_FIELDS, **changes}.items() if field not in without}


class DenseBridge(MegatronModelBridge):
    """The Llama layout: RMSNorm before attention and a gated MLP; subclasses say where their family differs.

    Attributes:
        shared_fields: Megatron's field -> the field of `config.json` that has the same value.
        names: the modules' names in the Hugging Face files.
        normalization: `RMSNorm` or `LayerNorm`.
        norm_kinds: what a norm has: a weight, perhaps a bias.
        gated: whether the MLP has a gate beside its up projection.
        activation_field: the field of `config.json` that names the activation.
    """

    shared_fields: ClassVar[Mapping[str, str]] = SHARED_FIELDS
    names: ClassVar[fragments.HFNames] = fragments.LLAMA_NAMES
    normalization: ClassVar[str] = "RMSNorm"
    norm_kinds: ClassVar[tuple[str, ...]] = fragments.WEIGHT
    gated: ClassVar[bool] = True
    activation_field: ClassVar[str] = "hidden_act"

    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases; no."""
        return False

    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias; no."""
        return False

    def mlp_bias(self) -> bool:
        """Whether the MLP's projections have biases; no."""
        return False

    def qk_norm(self) -> bool:
        """Whether the queries and keys of each head are normed; no."""
        return False

    def windows(self) -> Sequence[int | None]:
        """Per layer, how many positions attention sees (its own included), or None for all."""
        return windows_by_layer_type(self.hf_config)

    def differences(self) -> Mapping[str, Any]:
        """Provider fields, `BlockVariant`'s among them, in which the family departs from the Llama layout."""
        return {}

    def head_dim(self) -> int:
        """Channels per attention head."""
        return hf_config.head_dim(self.hf_config)

    def sequence_length(self) -> int:
        """Longest sequence, in tokens."""
        return int(getattr(self.hf_config, self.shared_fields["max_position_embeddings"]))

    def activation_function(self) -> Any:
        """The MLP's activation."""
        return activation(getattr(self.hf_config, self.activation_field))

    def rope_fields(self) -> dict[str, Any]:
        """Provider fields about positions."""
        rope = hf_config.rope(self.hf_config)
        return {
            "rotary_base": rope.theta,
            "rotary_percent": rope.percent,
            "rope_parameters": dict(rope.scaling) if rope.scaling else None,
        }

    def provider_class(self) -> "type[GPTModelProvider]":
        """The kind of provider."""
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        return GPTModelProvider

    def provider_bridge(self) -> "GPTModelProvider":
        """The provider that the configuration asks for."""
        return self.provider_class()(**self.provider_fields())

    def provider_fields(self) -> dict[str, Any]:
        """All that the provider is made with."""
        fields: dict[str, Any] = {
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **self.shared_values(),
            **window_fields(self.windows()),
            **self.rope_fields(),
            "kv_channels": self.head_dim(),
            "seq_length": self.sequence_length(),
            "normalization": self.normalization,
            "norm_weight": "weight" in self.norm_kinds,
            "norm_bias": self.normalization == "RMSNorm" or "bias" in self.norm_kinds,
            "activation_func": self.activation_function(),
            "gated_linear_unit": self.gated,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias(),
            "add_attention_output_bias": self.output_bias(),
            "add_mlp_bias": self.mlp_bias(),
            "qk_layernorm": self.qk_norm(),
        }
        return {**fields, **self.differences()}

    def mapping_registry(self) -> WeightTable:
        """The family's weight table."""
        config, names, differences = self.hf_config, self.names, self.differences()
        tied = bool(config.tie_word_embeddings)
        mlp = fragments.gated_mlp if self.gated else fragments.plain_mlp
        return WeightTable.of(
            fragments.embedding(config.vocab_size, names, self.norm_kinds),
            self.pre_norm_rules(differences),
            self.attention_rules(differences),
            fragments.sinks(names) if differences.get("softmax_type") == "learnable" else [],
            fragments.post_norms(self.norm_kinds, names=names) if differences.get("post_norm") else [],
            mlp(bias=self.mlp_bias(), names=names),
            fragments.head(
                config.vocab_size,
                tied=tied,
                norm=self.norm_kinds,
                bias=bool(differences.get("output_bias")),
                names=names,
            ),
            tied=fragments.tied_head(tied=tied, names=names),
            ignored=self.ignored(),
        )

    def pre_norm_rules(self, differences: Mapping[str, Any]) -> list[WeightRule]:
        """The norms before attention and MLP."""
        if not differences.get("pre_norm", True):
            return []
        shared = bool(differences.get("shared_pre_norm"))
        return fragments.pre_norms(self.norm_kinds, shared=shared, names=self.names)

    def attention_rules(self, differences: Mapping[str, Any]) -> list[WeightRule]:
        """Attention's weights."""
        return fragments.attention(
            heads=self.hf_config.num_attention_heads,
            groups=self._groups(differences),
            head_dim=self.head_dim(),
            qkv_bias=self.qkv_bias(),
            output_bias=self.output_bias(),
            qk_norm=self.qk_norm(),
            qk_norm_kinds=self.norm_kinds if differences.get("qk_norm_over") is None else fragments.WEIGHT,
            qk_norm_after_rope=bool(differences.get("qk_norm_after_rope")),
            fused=self.fused_qkv(),
            names=self.names,
        )

    def _groups(self, differences: Mapping[str, Any]) -> int:
        """Key/value heads."""
        stated = self.shared_fields.get("num_query_groups")
        groups = differences.get("num_query_groups") or (stated and getattr(self.hf_config, stated))
        return int(groups or self.hf_config.num_attention_heads)

    def fused_qkv(self) -> Transform | None:
        """How one weight holds q, k and v, where neither one after another nor group by group says it."""
        return None

    def ignored(self) -> tuple[str, ...]:
        """Hugging Face weights that carry nothing: frequencies that transformers stored before 4.32."""
        return (f"{self.names.layer}.self_attn.rotary_emb.inv_freq",)


def refuse_other_values(config: Any, only: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for what its family cannot express here.

    Args:
        config: the model's configuration.
        only: field -> the one value that is supported; fields that the configuration lacks are left alone.

    Raises:
        BridgeError: names each field with another value.
    """
    held = {name: getattr(config, name, value) for name, value in only.items()}
    # What was a tuple comes back from JSON as a list.
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
    other = [f"{name}={held[name]!r}" for name, value in values.items() if value != only[name]]
    if other:
        raise BridgeError(f"config.json: {', '.join(other)}: not supported in {type(config).__name__}")


class BiasedBridge(DenseBridge):
    """The GPT-2 manner: LayerNorms with biases, an MLP without a gate, and biases on every projection."""

    normalization = "LayerNorm"
    norm_kinds = fragments.WEIGHT_AND_BIAS
    gated = False

    def has_biases(self) -> bool:
        """Whether projections have biases, where nothing else is said of one."""
        return True

    def qkv_bias(self) -> bool:
        return self.has_biases()

    def output_bias(self) -> bool:
        return self.has_biases()

    def mlp_bias(self) -> bool:
        return self.has_biases()


def windows_by_layer_type(config: Any) -> Sequence[int | None]:
    """Attention windows of a configuration whose `layer_types` say which layers have one."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise BridgeError(f"config.json: layer_types {unknown} are not supported in this family")
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def window_fields(windows: Sequence[int | None]) -> dict[str, Any]:
    """Megatron's fields for sliding-window attention.

    Megatron counts the positions to the left of the current one; Hugging Face counts the current one too.

    Raises:
        BridgeError: two layers have windows of different sizes.
    """
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {}
    if len(sizes) > 1:
        raise BridgeError(f"layers have attention windows of different sizes ({sorted(sizes)}); Megatron-Core has one")
    fields: dict[str, Any] = {"window_size": (sizes.pop() - 1, 0)}
    if None in windows:
        fields["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return fields
