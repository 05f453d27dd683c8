"""Megatron-Core's gated delta net in plain PyTorch, for machines without the CUDA kernels of `fla`."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import softplus

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.mamba_mixer import mark_cut
from megatron.bridge.models.layer_specs.packed_documents import by_document
from megatron.bridge.models.layer_specs.state_space import causal_convolution, gated_delta_rule


class TorchGatedDeltaNet(GatedDeltaNet):
    """A gated delta net (arXiv:2412.06464) with the parameters, shards and checkpoint keys of Megatron-Core's own.

    Args:
        config: of the model.
        submodules: its two projections, and the norm of each value head before the last one.
        layer_number: of this layer, from 1.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        name: str | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        # Not GatedDeltaNet's: it refuses to be made without its kernels.
        MegatronModule.__init__(self, config)
        del name, cp_comm_type  # part of Megatron-Core's contract, of no effect here
        self.layer_number, self.pg_collection = layer_number, pg_collection
        self.tp_group = pg_collection.tp  # type: ignore[union-attr]
        self._set_sizes(config)
        projection: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            self.in_proj_dim,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **projection,
        )
        self._add_parameters()
        self.out_norm = build_module(
            submodules.out_norm, config=config, hidden_size=self.value_head_dim, eps=config.layernorm_epsilon
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.v_dim_local_tp * self.tp_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **projection,
        )

    def _set_sizes(self, config: TransformerConfig) -> None:
        """Sizes by the names that `GatedDeltaNet.sharded_state_dict` knows; `local` ones are this rank's."""
        self.tp_size, self.conv_bias = self.tp_group.size(), False
        self.key_head_dim, self.value_head_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.shared_by = config.linear_num_value_heads // config.linear_num_key_heads
        heads = config.linear_num_value_heads // self.tp_size
        self.qk_dim_local_tp = self.key_head_dim * config.linear_num_key_heads // self.tp_size
        self.v_dim_local_tp = self.value_head_dim * heads
        self.conv_dim_local_tp = 2 * self.qk_dim_local_tp + self.v_dim_local_tp
        self.in_proj_split_names = ["query", "key", "value", "z", "beta", "alpha"]
        qk, v = self.qk_dim_local_tp, self.v_dim_local_tp
        self.in_proj_split_sections = (qk, qk, v, v, heads, heads)
        self.in_proj_dim = sum(self.in_proj_split_sections) * self.tp_size

    def _add_parameters(self) -> None:
        place: dict[str, Any] = {"device": self.in_proj.weight.device, "dtype": self.config.params_dtype}
        channels, heads, width = (
            self.conv_dim_local_tp,
            self.in_proj_split_sections[-1],
            self.config.linear_conv_kernel_dim,
        )
        with get_cuda_rng_tracker().fork():
            self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, bias=False, padding=width - 1, **place)
            self.A_log = nn.Parameter(torch.empty(heads, **place).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.ones(heads, **place))
        for parameter in (self.conv1d.weight, self.A_log, self.dt_bias):
            mark_cut(parameter)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[length, batch, hidden]` in and out, with the last projection's bias.

        Args:
            hidden_states: the layer's input; under sequence parallelism this rank's part of it.
            attention_mask: accepted for Megatron-Core; a recurrence sees all that came before.
            inference_context: a state to decode from, which this module does not have.
            packed_seq_params: the documents' bounds of a packed batch (`thd`); no state goes from one to the next.
            kwargs: what attention is given besides (rotary embeddings), of no effect here.
        """
        if inference_context is not None:
            raise BridgeError(
                "the gated delta net of layer_spec='torch' has no state to decode from; run whole sequences"
            )
        projected, _ = self.in_proj(hidden_states)
        output, bias = self.out_proj(by_document(self._mix, projected, packed_seq_params))
        return output, bias

    def _mix(self, projected: Tensor) -> Tensor:
        """`[length, batch, query key value z beta alpha]` to `[length, batch, channels]`, of this rank's heads."""
        mixed, z, beta, alpha = projected.transpose(0, 1).split(
            [self.conv_dim_local_tp, *self.in_proj_split_sections[3:]], -1
        )
        activation = self.config.activation_func
        mixed = activation(causal_convolution(mixed, self.conv1d.weight, None))
        query, key, value = mixed.split(self.in_proj_split_sections[:3], -1)
        query, key = (self._unit_heads(each) for each in (query, key))
        value = value.unflatten(-1, (-1, self.value_head_dim))
        decay = -self.A_log.float().exp() * softplus(alpha.float() + self.dt_bias.float())
        read = gated_delta_rule(query, key, value, decay, beta.float().sigmoid()).to(projected.dtype)
        gate = activation(z.unflatten(-1, (-1, self.value_head_dim)).float())
        return (self.out_norm(read) * gate).flatten(2).to(projected.dtype).transpose(0, 1)

    def _unit_heads(self, x: Tensor) -> Tensor:
        """Queries or keys by head and of length one, repeated for the value heads that share them."""
        heads = x.float().unflatten(-1, (-1, self.key_head_dim))
        units = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)
        return units.repeat_interleave(self.shared_by, 2)
