"""The first Mamba's mixer in plain PyTorch; Megatron-Core has only its successor's."""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu, softplus

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.mamba_mixer import mark_cut
from megatron.bridge.models.layer_specs.packed_documents import by_document
from megatron.bridge.models.layer_specs.state_space import causal_convolution, scan_channels

# The axis along which tensor-parallel ranks cut each parameter, which is the one of channels.
_CUT = {
    "conv1d_weight": 0,
    "conv1d_bias": 0,
    "x_proj_weight": 1,
    "dt_proj_weight": 0,
    "dt_proj_bias": 0,
    "A_log": 0,
    "D": 0,
}


class TorchMamba1Mixer(MegatronModule):
    """A layer of selective state spaces (arXiv:2312.00752). Tensor-parallel ranks have their own channels.

    Args:
        config: of the model; `mamba_num_heads` channels have `mamba_state_dim` values of state each.
        submodules: its first and last projection.
        d_model: channels of the model.
        d_conv: width of the convolution.
        step_rank: channels that step sizes are made from.
        norm_eps: of norms without weights on what steps, B and C are made from; None for no norms.
        layer_number: of this layer, from 1.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        *,
        d_conv: int,
        step_rank: int,
        norm_eps: float | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        del layer_number, pp_layer_offset, name  # part of Megatron-Core's contract, of no effect here
        self.tp_group = pg_collection.tp  # type: ignore[union-attr]
        self.step_rank, self.norm_eps = step_rank, norm_eps
        channels = config.mamba_num_heads
        projection: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            2 * channels,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **projection,
        )
        self._add_parameters(channels // self.tp_group.size(), d_conv)
        self.out_proj = build_module(
            submodules.out_proj,
            channels,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **projection,
        )

    def _add_parameters(self, channels: int, d_conv: int) -> None:
        """Start values as in the paper's code: steps of 0.001 to 0.1, decay rates of 1, 2, 3, ..."""
        place: dict[str, Any] = {"device": self.in_proj.weight.device, "dtype": self.config.params_dtype}
        state, rank = self.config.mamba_state_dim, self.step_rank
        with get_cuda_rng_tracker().fork():
            steps = torch.empty(channels, **place).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
            values = {
                "conv1d_weight": _uniform((channels, 1, d_conv), d_conv, place),
                "conv1d_bias": _uniform((channels,), d_conv, place),
                "x_proj_weight": self.config.init_method(torch.empty(rank + 2 * state, channels, **place)),
                "dt_proj_weight": _uniform((channels, rank), rank, place),
            }
        values["dt_proj_bias"] = steps + torch.log(-torch.expm1(-steps))  # softplus of it is the step
        values["A_log"] = torch.arange(1, state + 1, **place).log().repeat(channels, 1)
        values["D"] = torch.ones(channels, **place)
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value))
            mark_cut(getattr(self, name), _CUT[name])

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[length, batch, hidden]` in and out, with the last projection's bias.

        Args:
            hidden_states: the layer's input; under sequence parallelism this rank's part of it.
            inference_context: a state to decode from, which this module does not have.
            packed_seq_params: the documents' bounds of a packed batch (`thd`); no state goes from one to the next.
        """
        if inference_context is not None:
            raise BridgeError("the Mamba mixer of layer_spec='torch' has no state to decode from; run whole sequences")
        projected, _ = self.in_proj(hidden_states)
        output, bias = self.out_proj(by_document(self._mix, projected, packed_seq_params))
        return output, bias

    def _mix(self, projected: Tensor) -> Tensor:
        """`[length, batch, x z]` to `[length, batch, channels]`, of this rank's channels."""
        x, z = projected.transpose(0, 1).chunk(2, -1)
        x = silu(causal_convolution(x, self.conv1d_weight, self.conv1d_bias))
        steps, inputs, outputs = self._selected(x)
        y = scan_channels(x, steps, -self.A_log.float().exp(), inputs, outputs)
        y = (y + self.D.float() * x.float()) * silu(z.float())
        return y.to(projected.dtype).transpose(0, 1)

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes `[batch, length, channels]`, and the paper's B and C `[batch, length, state]`."""
        selected = linear(x, self.x_proj_weight)
        if self.tp_group.size() > 1:
            # A sum over all ranks' channels, which in turn acts on all ranks' channels.
            selected = reduce_from_tensor_model_parallel_region(selected)
            selected = copy_to_tensor_model_parallel_region(selected)
        state = self.config.mamba_state_dim
        parts = selected.split([self.step_rank, state, state], -1)
        if self.norm_eps is not None:
            parts = tuple(rms_norm(part.float(), part.shape[-1:], eps=self.norm_eps).to(x.dtype) for part in parts)
        steps = linear(parts[0], self.dt_proj_weight).float() + self.dt_proj_bias.float()
        return softplus(steps), parts[1], parts[2]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's description of the parameters; the first projection's two blocks are cut one by one."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, _CUT, sharded_offsets, **groups)
        for name, module in self.named_children():
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        first = f"{prefix}in_proj.weight"
        half = state[first].data.shape[0] // 2
        state[first] = _split_tensor_factory(state[first], [half, half], ["x", "z"], 0)
        return state


def _uniform(shape: tuple[int, ...], fan_in: int, place: dict[str, Any]) -> Tensor:
    return torch.empty(*shape, **place).uniform_(-(fan_in**-0.5), fan_in**-0.5)
