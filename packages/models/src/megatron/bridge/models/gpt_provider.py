"""`GPTModelProvider`: everything that defines a GPT model, as one dataclass that can build it."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.block_variant import BlockVariant, with_variant
from megatron.bridge.models.layer_specs import LAYER_SPECS, default_layer_spec
from megatron.bridge.models.layout_checks import layout_problems
from megatron.bridge.models.model_provider import ModelProvider


@dataclass(kw_only=True)
class GPTModelProvider(ModelProvider, BlockVariant, TransformerConfig):
    """A GPT model: Megatron-Core's `TransformerConfig` fields, `BlockVariant`'s, and what `GPTModel` needs besides.

    The fields stay what the user set: Megatron-Core's checks and derived values are made on a fresh
    `transformer_config()` each time, so any field can be changed at any moment before the model is built.

    Args:
        vocab_size: tokens of the tokenizer, before padding.
        make_vocab_size_divisible_by: each tensor-parallel rank's share of the vocabulary is a multiple of this. Padded
            rows are never exported and take no part in the loss.
        seq_length: longest training sequence, in tokens.
        position_embedding_type: `rope`, `mrope` (positions in time, height and width), `learned_absolute` or `none`.
        rotary_base, rotary_percent: RoPE's base and the share of each head that it turns.
        rope_parameters: a Hugging Face `rope_parameters` dictionary when RoPE is scaled (llama3, yarn, linear, dynamic,
            longrope); None for plain RoPE.
        max_position_embeddings: positions the model was trained for; RoPE scalings refer to it.
        share_embeddings_and_output_weights: tie the output layer to the embedding.
        add_attention_output_bias, add_mlp_bias: bias of attention's output projection and of the MLP; None follows
            `add_bias_linear`.
        num_labels: a classification or reward head of so many outputs per token replaces the vocabulary's output layer.
        head_bias, head_dropout: of that head: whether it has a bias, and the dropout before it.
        pad_token_id: padding, which a headed model passes over when it looks for a sequence's last token.
        layer_spec: a name of the group `megatron.bridge.layer_specs`; None takes `transformer_engine` where it runs,
            else `torch`.
    """

    # The Megatron-Core config that the model is built from.
    config_class: ClassVar[type[TransformerConfig]] = TransformerConfig

    vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    seq_length: int = 2048
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int | None = None
    share_embeddings_and_output_weights: bool = False
    add_attention_output_bias: bool | None = None
    add_mlp_bias: bool | None = None
    fp16_lm_cross_entropy: bool = False
    parallel_output: bool = True
    scatter_embedding_sequence_parallel: bool = True
    num_labels: int | None = None
    head_bias: bool = False
    head_dropout: float = 0.0
    pad_token_id: int | None = None
    layer_spec: str | None = field(default=None)

    def __post_init__(self) -> None:
        """Nothing: Megatron-Core's own checks run in `transformer_config()`."""

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up so that every tensor-parallel rank holds an equal, well-aligned share."""
        if self.vocab_size is None:
            raise BridgeError("the model's vocab_size is not set; set it from the tokenizer")
        return self._padded(self.vocab_size)

    def _padded(self, rows: int) -> int:
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-rows // multiple) * multiple

    def finalize(self) -> None:
        """Check the whole definition, without building anything.

        Raises:
            BridgeError: every problem found, each with what would fix it.
        """
        self.transformer_config()

    def transformer_config(self) -> TransformerConfig:
        """A fresh, checked Megatron-Core config of this model.

        Raises:
            BridgeError: sizes that do not divide, or what Megatron-Core refuses.
        """
        if problems := layout_problems(self):
            raise BridgeError("the model cannot be built as configured:\n  " + "\n  ".join(problems))
        values = {f.name: getattr(self, f.name) for f in fields(self.config_class) if f.init}
        if values["pipeline_dtype"] is None:
            values["pipeline_dtype"] = torch.float32 if self.fp32_residual_connection else self.params_dtype
        if self.virtual_pipeline_model_parallel_size is not None:
            # As Megatron-LM sets them: batched messages between two stages mix up the micro-batches of virtual stages.
            values |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        if (layers := self.heterogeneous_layers) is not None:
            values |= {"hetereogenous_dist_checkpoint": not layers.alike, "variable_seq_lengths": layers.hands_on}
        if self.loads_weights:
            values["perform_initialization"] = False
        try:
            return self._checked(values)
        except (ValueError, AssertionError, TypeError) as error:
            raise BridgeError(f"Megatron-Core refuses the model's configuration: {error}") from error

    def _checked(self, values: dict[str, Any]) -> TransformerConfig:
        """Megatron-Core's config of these values.

        Megatron-Core refuses biases of experts that tensor parallelism divides: its own would be added once per rank.
        Those of the layer spec `torch` are added once.
        """
        size = values["expert_tensor_parallel_size"]
        torch_spec = (self.layer_spec or default_layer_spec()) == "torch"
        if not (torch_spec and self.num_moe_experts and self.add_bias_linear) or size == 1:
            return self.config_class(**values)
        config = self.config_class(**{**values, "expert_tensor_parallel_size": 1})
        config.expert_tensor_parallel_size = size or self.tensor_model_parallel_size
        return config

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """One chunk of the model, for this rank's pipeline stage, on this process's device.

        Args:
            pre_process, post_process: hold the embedding, the output layer; None asks the pipeline stage.
            vp_stage: virtual pipeline stage, or None without virtual stages.
            pg_collection: Megatron-Core's collection of process groups; None for those of its parallel state.
        """
        from megatron.bridge.models.biases import with_biases
        from megatron.bridge.models.layer_specs.prediction import prediction_block

        config, build = self.transformer_config(), self._model_class()
        layer_spec = self.layer_spec or default_layer_spec()
        spec = LAYER_SPECS[layer_spec](config, vp_stage=vp_stage)
        spec = with_variant(spec, config, self)
        spec = with_biases(spec, config, self.add_attention_output_bias, self.add_mlp_bias)
        engine = layer_spec == "transformer_engine"
        model = build(
            config=config,
            transformer_layer_spec=spec,
            mtp_block_spec=prediction_block(spec, config, engine=engine, vp_stage=vp_stage),
            pg_collection=pg_collection,
            **self._model_arguments(pre_process, post_process, vp_stage),
        )
        return self._finished(model, layer_spec)

    def _model_arguments(
        self, pre_process: bool | None, post_process: bool | None, vp_stage: int | None
    ) -> dict[str, Any]:
        """What Megatron-Core's language models are all made with."""
        from megatron.core import parallel_state

        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        return {
            "vocab_size": self.padded_vocab_size,
            "max_sequence_length": (self.max_position_embeddings or self.seq_length) + self.position_offset,
            "pre_process": pre_process,
            "post_process": post_process,
            "fp16_lm_cross_entropy": self.fp16_lm_cross_entropy,
            "parallel_output": self.parallel_output,
            "share_embeddings_and_output_weights": self.share_embeddings_and_output_weights,
            "position_embedding_type": self.position_embedding_type,
            "rotary_percent": self.rotary_percent,
            "rotary_base": self.rotary_base,
            "scatter_embedding_sequence_parallel": self.scatter_embedding_sequence_parallel,
            "vp_stage": vp_stage,
        }

    def _finished(self, model: Any, layer_spec: str) -> torch.nn.Module:
        """The model with what Megatron-Core's constructor does not know."""
        model.unpadded_vocab_size = self.vocab_size
        model.layer_spec = layer_spec
        model.apply_variant(self)
        self._turn_positions(model)
        finished: torch.nn.Module = model
        return finished

    def _model_class(self) -> Callable[..., Any]:
        from megatron.bridge.models.gpt_model import BridgeGPTModel
        from megatron.bridge.models.heterogeneous_model import HeterogeneousGPTModel

        if (layers := self.heterogeneous_layers) is not None:
            if self.num_labels is not None:
                raise BridgeError("num_labels: models of heterogeneous layers have no heads; set it to None")
            rows = self._padded(layers.input_vocab_size)
            return functools.partial(HeterogeneousGPTModel, layers=layers, input_rows=rows)
        if self.num_labels is None:
            return BridgeGPTModel
        from megatron.bridge.models.classification_head import HeadedGPTModel

        names = ("num_labels", "head_bias", "head_dropout", "pad_token_id")
        return functools.partial(HeadedGPTModel, **{name: getattr(self, name) for name in names})

    def _turn_positions(self, model: Any) -> None:
        """Replace the model's plain RoPE where it is scaled, or differs between layers."""
        from megatron.bridge.models.rotary import (
            apply_layer_rope_parameters,
            apply_multimodal_rope,
            apply_rope_parameters,
        )

        positions = self.max_position_embeddings or self.seq_length
        if self.rotary_reversed and (self.rope_parameters or self.layer_rope_parameters):
            raise BridgeError("rotary_reversed=True goes with plain RoPE only; set rope_parameters to None")
        if self.layer_rope_parameters is not None and self.mtp_num_layers:
            raise BridgeError("mtp_num_layers: layer_rope_parameters does not say how prediction layers turn")
        if self.position_embedding_type == "mrope":
            plain = {"rope_type": "default", "rope_theta": self.rotary_base}
            apply_multimodal_rope(model, self.rope_parameters or plain, positions, interleaved=self.mrope_interleaved)
        elif self.layer_rope_parameters is not None:
            apply_layer_rope_parameters(model, self.layer_rope_parameters, positions, self._head_sizes())
        elif self.rope_parameters is not None:
            apply_rope_parameters(model, self.rope_parameters, positions)
        elif self.rotary_reversed:
            model.rotary_pos_emb.inv_freq = -model.rotary_pos_emb.inv_freq

    def _head_sizes(self) -> list[int] | None:
        """Channels per head of every layer, where they differ."""
        layers = self.heterogeneous_layers
        if layers is None:
            return None
        return [layers.size(layer, "kv_channels", self) for layer in range(len(layers.sizes))]

    def replace(self, **changes: Any) -> "GPTModelProvider":
        """A copy with some fields changed; the hooks registered on this one are not carried over."""
        return dataclasses.replace(self, **changes)
