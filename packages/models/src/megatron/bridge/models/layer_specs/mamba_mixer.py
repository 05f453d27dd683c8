"""Megatron-Core's Mamba-2 mixer in plain PyTorch, for machines without the CUDA kernels of `mamba_ssm`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.packed_documents import by_document
from megatron.bridge.models.layer_specs.state_space import causal_convolution, scan_heads


class TorchMambaMixer(MambaMixer):
    """A Mamba-2 layer (arXiv:2405.21060) with the parameters, shards and checkpoint keys of Megatron-Core's own.

    Args:
        config: of the model.
        submodules: its two projections.
        d_model: channels of the model.
        d_conv: width of the convolution.
        rmsnorm: a norm over each group's channels before the last projection, which the gate has gone into.
        norm_before_gate: the gate acts on what that norm gives instead.
        step_limit: the smallest and the largest step size.
        multipliers: factors on the first projection's blocks z, x, B, C and dt.
        layer_number: of this layer, from 1.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        d_conv: int = 4,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        step_limit: tuple[float, float] = (0.0, math.inf),
        multipliers: Sequence[float] | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        # Not MambaMixer's: it refuses to be made without its kernels.
        MegatronModule.__init__(self, config)
        del pp_layer_offset, name  # part of Megatron-Core's contract, of no effect here
        self.layer_number, self.pg_collection = layer_number, pg_collection
        self.tp_group = pg_collection.tp  # type: ignore[union-attr]
        self.rmsnorm, self.norm_before_gate, self.step_limit = rmsnorm, norm_before_gate, step_limit
        self._set_sizes(config, ranks=self.tp_group.size())
        projection: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            sum(self.in_proj_blocks) * self.tp_group.size(),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **projection,
        )
        self._add_parameters(d_conv)
        if multipliers is not None:
            factors = torch.tensor(multipliers).repeat_interleave(torch.tensor(self.in_proj_blocks))
            self.multipliers = nn.Buffer(factors.to(self.in_proj.weight), persistent=False)
        self.out_proj = build_module(
            submodules.out_proj,
            self.d_inner,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **projection,
        )

    def _set_sizes(self, config: TransformerConfig, ranks: int) -> None:
        """Sizes by the names that `MambaMixer.sharded_state_dict` knows; `local` ones are this rank's."""
        if config.mamba_num_heads is None:
            raise BridgeError("mamba_num_heads of the model config is not set; set it to the number of Mamba heads")
        if config.mamba_num_groups % ranks or config.mamba_num_heads % ranks:
            raise BridgeError(
                f"tensor_model_parallel_size={ranks} divides not both mamba_num_heads={config.mamba_num_heads} and "
                f"mamba_num_groups={config.mamba_num_groups}: every rank needs whole groups; make it smaller"
            )
        self.d_state, self.headdim = config.mamba_state_dim, config.mamba_head_dim
        self.d_inner = config.mamba_num_heads * self.headdim
        self.nheads_local_tp = config.mamba_num_heads // ranks
        self.ngroups_local_tp = config.mamba_num_groups // ranks
        self.d_inner_local_tp = self.d_inner // ranks
        shared = self.ngroups_local_tp * self.d_state
        # z, x, B, C and dt, as they follow one another on this rank.
        self.in_proj_blocks = (self.d_inner_local_tp, self.d_inner_local_tp, shared, shared, self.nheads_local_tp)

    def _add_parameters(self, d_conv: int) -> None:
        """Start values as in the papers' code: steps of 0.001 to 0.1, decay rates of 1 to 16."""
        place = {"device": self.in_proj.weight.device, "dtype": self.config.params_dtype}
        channels, heads = sum(self.in_proj_blocks[1:4]), self.nheads_local_tp
        with get_cuda_rng_tracker().fork():
            weight = torch.empty(channels, 1, d_conv, **place)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bias = torch.empty(channels, **place).uniform_(-1 / math.sqrt(d_conv), 1 / math.sqrt(d_conv))
            steps = torch.empty(heads, **place).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
            rates = torch.empty(heads, **place).uniform_(1, 16)
        values = {
            "conv1d_weight": weight,
            "conv1d_bias": bias,
            "dt_bias": steps + torch.log(-torch.expm1(-steps)),  # softplus of it is the step
            "A_log": rates.log(),
            "D": torch.ones(heads, **place),
        }
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value))
        if self.rmsnorm:
            group = self.d_inner_local_tp // self.ngroups_local_tp
            norm = GroupedRMSNorm(self.d_inner_local_tp, group, self.config.layernorm_epsilon, self.tp_group)
            self.norm = norm.to(**place)
        for parameter in (*(getattr(self, name) for name in values), *(self.norm.parameters() if self.rmsnorm else ())):
            mark_cut(parameter)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[length, batch, hidden]` in and out, with the last projection's bias.

        Args:
            hidden_states: the layer's input; under sequence parallelism this rank's part of it.
            inference_context, inference_params: a state to decode from, which this module does not have.
            packed_seq_params: the documents' bounds of a packed batch (`thd`); no state goes from one to the next.
        """
        if inference_context is not None or inference_params is not None:
            raise BridgeError("the Mamba mixer of layer_spec='torch' has no state to decode from; run whole sequences")
        projected, _ = self.in_proj(hidden_states)
        output, bias = self.out_proj(by_document(self._mix, projected, packed_seq_params))
        return output, bias

    def _mix(self, projected: Tensor) -> Tensor:
        """`[length, batch, z x B C dt]` to `[length, batch, channels]`, of this rank's heads."""
        if hasattr(self, "multipliers"):
            projected = projected * self.multipliers
        z, mixed, steps = projected.transpose(0, 1).split(
            [self.in_proj_blocks[0], sum(self.in_proj_blocks[1:4]), self.in_proj_blocks[4]], -1
        )
        mixed = silu(causal_convolution(mixed, self.conv1d_weight, self.conv1d_bias))
        x, inputs, outputs = mixed.split(self.in_proj_blocks[1:4], -1)
        x = x.unflatten(-1, (-1, self.headdim))
        inputs, outputs = (each.unflatten(-1, (-1, self.d_state)) for each in (inputs, outputs))
        steps = softplus(steps.float() + self.dt_bias.float()).clamp(*self.step_limit)
        y = scan_heads(x, steps, -self.A_log.float().exp(), inputs, outputs)
        y = self._gated((y + self.D.float()[:, None] * x.float()).flatten(-2), silu(z.float()))
        return y.to(projected.dtype).transpose(0, 1)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        if not self.rmsnorm:
            return y * gate
        normed: Tensor = self.norm(y) * gate if self.norm_before_gate else self.norm(y * gate)
        return normed


# How a layer's keys for checkpoints differ from the names of its mixer's parameters, as Megatron-Core writes them.
CONVOLUTION_KEYS = {"mixer.conv1d_": "mixer.conv1d."}


class GroupedRMSNorm(nn.Module):
    """RMSNorm over groups of channels; tensor-parallel ranks hold whole groups."""

    def __init__(self, channels: int, group_size: int, eps: float, tp_group: Any) -> None:
        super().__init__()
        self.group_size, self.eps, self.tp_group = group_size, eps, tp_group
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., channels]` in fp32 in and out."""
        normed = nn.functional.rms_norm(x.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps)
        return normed.flatten(-2) * self.weight.float()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's description of the weight, cut along its one axis."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


def mark_cut(parameter: Tensor, axis: int = 0) -> None:
    """Tell Megatron-Core that every tensor-parallel rank holds a part of its own along `axis`."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = axis  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
