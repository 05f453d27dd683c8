"""`HybridModelProvider`: a model of state-space, attention, MLP and expert layers, as one dataclass."""

import math
from dataclasses import dataclass

import torch
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
        mamba_step_limit: the smallest and the largest step size of Mamba layers (the papers' dt).
    """

    hybrid_layer_pattern: str = ""
    mamba_step_limit: tuple[float, float] = (0.0, math.inf)
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
            for field in ("mamba_num_heads", "mamba_num_groups"):
                value = getattr(self, field)
                if value is None or value % size:
                    problems.append(f"tensor_model_parallel_size={size} does not divide {field}={value}")
        if self.layer_spec not in (None, "torch"):
            problems.append(f"layer_spec={self.layer_spec!r}: hybrid models are built of 'torch' modules; use that")
        if not is_plain(self):
            problems.append("hybrid models have Megatron-Core's own blocks; leave the fields of BlockVariant alone")
        return problems

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> torch.nn.Module:
        """One chunk of the model, for this rank's pipeline stage, on this process's device; see `GPTModelProvider`."""
        from megatron.bridge.models.hybrid_model import BridgeHybridModel
        from megatron.bridge.models.layer_specs.torch_hybrid_spec import build_hybrid

        config = self.transformer_config()
        model = BridgeHybridModel(
            config=config,
            hybrid_stack_spec=build_hybrid(config, {"step_limit": self.mamba_step_limit}),
            hybrid_layer_pattern=self.hybrid_layer_pattern,
            **self._model_arguments(pre_process, post_process, vp_stage),
        )
        return self._finished(model, "torch")
