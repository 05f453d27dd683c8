"""`HybridModelProvider`: a model of state-space, attention, MLP and expert layers, as one dataclass."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.block_variant import is_plain
from megatron.bridge.models.gpt_provider import GPTModelProvider


@dataclass(kw_only=True)
class HybridModelProvider(GPTModelProvider):
    """A hybrid model: `GPTModelProvider`'s fields, Megatron-Core's `mamba_*` fields, and which layer stands where.

    Args:
        hybrid_layer_pattern: one character per layer, as in Megatron-Core: `M` for Mamba, `*` for attention, `-` for an
            MLP, `E` for a mixture of experts.
        mamba_conv_width: positions that the convolution of Mamba layers sees.
        mamba_step_limit: the smallest and the largest step size of Mamba layers (the papers' dt).
        mamba_step_rank: channels that step sizes are made from, which makes all `M` layers those of the first Mamba:
            every channel is a head of its own (`mamba_num_heads`, with `mamba_head_dim` 1), in a single group.
        mamba_step_norm_eps: the first Mamba's norms, without weights, of what steps, B and C are made from.
    """

    hybrid_layer_pattern: str = ""
    mamba_conv_width: int = 4
    mamba_step_limit: tuple[float, float] = (0.0, math.inf)
    mamba_step_rank: int | None = None
    mamba_step_norm_eps: float | None = None
    is_hybrid_model: bool = True
    position_embedding_type: str = "none"

    def transformer_config(self) -> TransformerConfig:
        """A fresh, checked Megatron-Core config of this model.

        Raises:
            BridgeError: as `GPTModelProvider`'s; or the pattern does not fit the layers or the Mamba sizes the layout.
        """
        if problems := self._problems():
            raise BridgeError("the model cannot be built as configured:\n  " + "\n  ".join(problems))
        return super().transformer_config()

    def _problems(self) -> list[str]:
        pattern, size, problems = self.hybrid_layer_pattern, self.tensor_model_parallel_size, []
        if unknown := sorted(set(pattern) - set("M*-E")):
            problems.append(f"hybrid_layer_pattern={pattern!r}: {unknown} are none of M, *, - and E")
        if len(pattern) != self.num_layers:
            problems.append(f"hybrid_layer_pattern has {len(pattern)} layers, num_layers is {self.num_layers}")
        if self.virtual_pipeline_model_parallel_size is not None:
            problems.append(
                "virtual_pipeline_model_parallel_size: hybrid models have no virtual stages; set it to None"
            )
        if "M" in pattern:
            # The first Mamba's B and C are no matter of groups.
            for field in ("mamba_num_heads", "mamba_num_groups")[: 1 if self.mamba_step_rank else 2]:
                value = getattr(self, field)
                if value is None or value % size:
                    problems.append(f"tensor_model_parallel_size={size} does not divide {field}={value}")
        if self.layer_spec not in (None, "torch"):
            problems.append(f"layer_spec={self.layer_spec!r}: hybrid models are built of 'torch' modules; use that")
        if self.num_labels is not None:
            problems.append(f"num_labels={self.num_labels}: hybrid models have no classification heads; set it to None")
        if not is_plain(self):
            problems.append("hybrid models have Megatron-Core's own blocks; leave the fields of BlockVariant alone")
        return problems

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """One chunk of the model, for this rank's pipeline stage, on this process's device; see `GPTModelProvider`."""
        from megatron.bridge.models.hybrid_model import BridgeHybridModel
        from megatron.bridge.models.layer_specs.torch_hybrid_spec import build_hybrid

        config = self.transformer_config()
        model = BridgeHybridModel(
            config=config,
            hybrid_stack_spec=build_hybrid(config, self._mixer()),
            hybrid_layer_pattern=self.hybrid_layer_pattern,
            pg_collection=pg_collection,
            **self._model_arguments(pre_process, post_process, vp_stage),
        )
        return self._finished(model, "torch")

    def _mixer(self) -> ModuleSpec:
        """The mixer of `M` layers."""
        from megatron.bridge.models.layer_specs.mamba1_mixer import TorchMamba1Mixer
        from megatron.bridge.models.layer_specs.mamba_mixer import TorchMambaMixer

        if self.mamba_step_rank is None:
            params = {"d_conv": self.mamba_conv_width, "step_limit": self.mamba_step_limit}
            return ModuleSpec(module=TorchMambaMixer, params=params)
        params = {
            "d_conv": self.mamba_conv_width,
            "step_rank": self.mamba_step_rank,
            "norm_eps": self.mamba_step_norm_eps,
        }
        return ModuleSpec(module=TorchMamba1Mixer, params=params)
