"""The part of a provider that every kind of model shares: parallel state, wrapping, hooks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

type PreWrapHook = "Callable[[list[torch.nn.Module]], list[torch.nn.Module] | None]"

_PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


class ModelProvider(ABC):
    """Builds the chunks of a model on this rank and wraps them for training.

    A subclass is a dataclass over Megatron-Core's `TransformerConfig`; it defines `transformer_config()` and
    `provide()`.
    """

    @abstractmethod
    def transformer_config(self) -> "TransformerConfig":
        """A fresh, checked Megatron-Core config of this model."""

    @abstractmethod
    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> "torch.nn.Module":
        """One chunk of the model, for this rank's pipeline stage."""

    def register_pre_wrap_hook(self, hook: PreWrapHook, *, loads_weights: bool = False) -> None:
        """Call `hook(chunks)` after the chunks are built and before they are wrapped, in order of registration.

        Args:
            hook: may change the chunks in place, or return new ones.
            loads_weights: the hook fills every weight, so that random initialisation can be left out.
        """
        self.__dict__.setdefault("_pre_wrap_hooks", []).append((hook, loads_weights))

    def _hooks(self) -> "list[tuple[PreWrapHook, bool]]":
        return list(self.__dict__.get("_pre_wrap_hooks", ()))

    @property
    def loads_weights(self) -> bool:
        """Whether a hook fills every weight when the model is built."""
        return any(loads_weights for _, loads_weights in self._hooks())

    def initialize_model_parallel(self, seed: int = 1234) -> None:
        """Build Megatron-Core's process groups for this layout and seed its random state. Collective.

        Groups that exist are kept when they have this layout.

        Raises:
            BridgeError: the layout does not fit the number of ranks, or other groups exist already.
        """
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        from megatron.bridge import platform

        platform.initialize_distributed()
        sizes = {name: getattr(self, name) for name in _PARALLEL_SIZES}
        if parallel_state.is_initialized():
            _refuse_other_layout(sizes)
        else:
            refuse_misfit(sizes, platform.world_size())
            parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(seed, te_rng_tracker=getattr(self, "use_te_rng_tracker", False))

    def provide_distributed_model(
        self,
        ddp_config: "DistributedDataParallelConfig | None" = None,
        wrap_with_ddp: bool = True,
        pre_wrap_hook: PreWrapHook | None = None,
        seed: int = 1234,
    ) -> "list[torch.nn.Module]":
        """This rank's model: one module, or one per virtual pipeline stage. Collective.

        Initialises torch.distributed and the process groups where that has not been done.

        Args:
            ddp_config: settings of Megatron-Core's DDP; its defaults when None.
            wrap_with_ddp: wrap for training. Without it the bare model comes back, for conversion and inference.
            pre_wrap_hook: called with the chunks after those that were registered (weights are loaded by then); this is
                where PEFT methods are applied.
            seed: of the weights' initialisation and dropout.

        Raises:
            BridgeError: the definition, the layout or a hook is refused.
        """
        from megatron.bridge.models.wrapping import prepared_chunks, with_ddp

        config = self.transformer_config()
        self.initialize_model_parallel(seed)
        self._tell_missing_proof()
        chunks = [self.provide(vp_stage=stage) for stage in self._virtual_stages()]
        for chunk in chunks:
            # What knows the Hugging Face names of its modules, for PEFT methods.
            chunk.bridge = getattr(self, "bridge", None)  # type: ignore[assignment]
        hooks = [hook for hook, _ in self._hooks()] + ([pre_wrap_hook] if pre_wrap_hook else [])
        for hook in hooks:
            chunks = hook(chunks) or chunks
        chunks = prepared_chunks(chunks, config)
        return with_ddp(chunks, config, ddp_config) if wrap_with_ddp else chunks

    def _tell_missing_proof(self) -> None:
        """Say, on one rank, when a Hugging Face model is built in a way that the capability record does not hold."""
        from megatron.bridge import platform
        from megatron.bridge.models.capabilities import tell_missing_proof
        from megatron.bridge.models.layer_specs import default_layer_spec

        bridge = getattr(self, "bridge", None)
        if bridge is not None and platform.is_rank_zero():
            layer_spec = getattr(self, "layer_spec", None) or default_layer_spec()
            tell_missing_proof(bridge.hf_config.architectures[0], vars(self), layer_spec)

    def _virtual_stages(self) -> list[int | None]:
        virtual: int | None = getattr(self, "virtual_pipeline_model_parallel_size", None)
        return [None] if virtual is None else list(range(virtual))


def refuse_misfit(sizes: dict[str, Any], world: int) -> None:
    """Refuse a layout that the number of ranks does not fit.

    Args:
        sizes: the parallel sizes, by the provider's names.
        world: number of ranks.

    Raises:
        BridgeError: says which numbers would do.
    """
    tensor, pipeline = sizes["tensor_model_parallel_size"], sizes["pipeline_model_parallel_size"]
    context = sizes["context_parallel_size"]
    ranks = tensor * pipeline * context
    if world % ranks:
        raise BridgeError(
            f"the layout needs a multiple of {ranks} ranks "
            f"(tensor {tensor} x pipeline {pipeline} x context {context}), and the world has {world}; "
            f"start {ranks} ranks (torchrun --nproc-per-node {ranks}), or make the layout smaller"
        )
    expert = sizes["expert_model_parallel_size"]
    expert_tensor = sizes["expert_tensor_parallel_size"] or tensor
    expert_ranks = expert * expert_tensor * pipeline
    if world % expert_ranks:
        raise BridgeError(
            f"the experts need a multiple of {expert_ranks} ranks (expert {expert} x expert tensor {expert_tensor} x "
            f"pipeline {pipeline}), and the world has {world}; start {math.lcm(ranks, expert_ranks)} ranks, or set "
            "expert_model_parallel_size and expert_tensor_parallel_size (None follows tensor parallelism) to fit"
        )


def _refuse_other_layout(sizes: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    expert_tensor = sizes["expert_tensor_parallel_size"] or sizes["tensor_model_parallel_size"]
    sizes = {**sizes, "expert_tensor_parallel_size": expert_tensor}
    built = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    wrong = [f"{name}={sizes[name]} (built: {size})" for name, size in built.items() if sizes[name] != size]
    if wrong:
        raise BridgeError(
            f"Megatron's process groups exist already with another layout: {', '.join(wrong)}; call "
            "megatron.bridge.platform.destroy_model_parallel() first, or use the layout that was built"
        )
