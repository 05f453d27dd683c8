"""T5 (arXiv:1910.10683), T5 1.1, FLAN-T5 (arXiv:2210.11416) and mT5 (arXiv:2010.11934) of Google."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from megatron.bridge.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.conversion.shards import COLUMN, ROW
from megatron.bridge.conversion.table import Tied, WeightRule, WeightTable
from megatron.bridge.conversion.transforms import InterleaveGroups
from megatron.bridge.models import fragments
from megatron.bridge.models.families.activations import activation

if TYPE_CHECKING:
    from megatron.bridge.models.t5_provider import T5ModelProvider

_TIED = Tied("encoder.embed_tokens.weight", "shared.weight"), Tied("decoder.embed_tokens.weight", "shared.weight")


class T5Bridge(MegatronModelBridge):
    """`T5ForConditionalGeneration`: an encoder and a decoder with relative positions, without biases."""

    shared_fields: ClassVar[Mapping[str, str]] = {
        "num_layers": "num_decoder_layers",
        "encoder_num_layers": "num_layers",
        "hidden_size": "d_model",
        "kv_channels": "d_kv",
        "ffn_hidden_size": "d_ff",
        "num_attention_heads": "num_heads",
        "layernorm_epsilon": "layer_norm_epsilon",
        "hidden_dropout": "dropout_rate",
        "attention_dropout": "dropout_rate",
        "vocab_size": "vocab_size",
    }

    def tied(self) -> bool:
        """Whether the output layer is the embedding; since T5 1.1 it is not, and its input is not scaled either."""
        return bool(self.hf_config.scale_decoder_outputs)

    def provider_bridge(self) -> "T5ModelProvider":
        from megatron.bridge.models.t5_provider import T5ModelProvider

        config = self.hf_config
        return T5ModelProvider(
            **self.shared_values(),
            normalization="RMSNorm",
            activation_func=activation(config.dense_act_fn),
            gated_linear_unit=config.is_gated_act,
            add_bias_linear=False,
            softmax_scale=1.0,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            share_embeddings_and_output_weights=self.tied(),
            scale_output=self.tied(),
        )

    def mapping_registry(self) -> WeightTable:
        config, tied = self.hf_config, self.tied()
        return WeightTable.of(
            fragments.embedding(config.vocab_size, _names("decoder", 2)),
            _in_encoder([*self._stack("encoder", 1), *fragments.head(0, tied=True, names=_names("encoder", 1))]),
            self._stack("decoder", 2),
            self._cross_attention(),
            fragments.head(config.vocab_size, tied=tied, names=_names("decoder", 2)),
            [_positions(stack) for stack in ("encoder", "decoder")],
            tied=(*_TIED, Tied("lm_head.weight", "shared.weight")) if tied else _TIED,
            # A table that no layer ever read.
            ignored=("decoder.block.{l}.layer.1.EncDecAttention.relative_attention_bias.weight",),
        )

    def _stack(self, stack: str, mlp: int) -> Iterable[WeightRule]:
        """A stack's self-attention and MLP, the latter its layers' part number `mlp`, with the norms before both."""
        config, names = self.hf_config, _names(stack, mlp)
        if not config.is_gated_act:
            names = dataclasses.replace(names, fc1=(f"{mlp}.DenseReluDense.wi",))
        feed_forward = fragments.gated_mlp if config.is_gated_act else fragments.plain_mlp
        heads, size = config.num_heads, config.d_kv
        return [
            *fragments.pre_norms(names=names),
            *fragments.attention(heads=heads, groups=heads, head_dim=size, names=names),
            *feed_forward(names=names),
        ]

    def _cross_attention(self) -> Iterable[WeightRule]:
        """The decoder's attention to the encoder, with its norm; key and value lie side by side, head by head."""
        own, hf = "decoder.layers.{l}.cross_attention", "decoder.block.{l}.layer.1"
        source, size = f"{hf}.EncDecAttention", self.hf_config.d_kv
        return [
            WeightRule("decoder.layers.{l}.pre_cross_attn_layernorm.weight", f"{hf}.layer_norm.weight"),
            WeightRule(f"{own}.linear_q.weight", f"{source}.q.weight", shard=COLUMN),
            WeightRule(
                f"{own}.linear_kv.weight",
                (f"{source}.k.weight", f"{source}.v.weight"),
                InterleaveGroups((size, size)),
                COLUMN,
            ),
            WeightRule(f"{own}.linear_proj.weight", f"{source}.o.weight", shard=ROW),
        ]


class MT5Bridge(T5Bridge):
    """`MT5ForConditionalGeneration`: T5 1.1, whose output layer is a weight of its own in every published model."""

    def tied(self) -> bool:
        return False


def _names(stack: str, mlp: int) -> fragments.HFNames:
    return fragments.HFNames(
        embedding="shared",
        layer=f"{stack}.block.{{l}}.layer",
        final_norm=f"{stack}.final_layer_norm",
        input_norm="0.layer_norm",
        mlp_norm=f"{mlp}.layer_norm",
        qkv=("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
        attention_output="0.SelfAttention.o",
        fc1=(f"{mlp}.DenseReluDense.wi_0", f"{mlp}.DenseReluDense.wi_1"),
        fc2=f"{mlp}.DenseReluDense.wo",
    )


def _positions(stack: str) -> WeightRule:
    """A stack's biases of relative positions; transformers keeps them in its first layer."""
    hf = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return WeightRule(f"{stack}_relative_pos_emb.relative_attention_bias.weight", hf)


def _in_encoder(rules: Iterable[WeightRule]) -> list[WeightRule]:
    """Rules of a decoder's stack as rules of the encoder's."""
    return [dataclasses.replace(rule, megatron=f"encoder.{rule.megatron.removeprefix('decoder.')}") for rule in rules]
