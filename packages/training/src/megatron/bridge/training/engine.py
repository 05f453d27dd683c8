"""What the loop asks about the layout: of Megatron-Core's parallel state, or of an engine of the model provider's own.

A model whose modules have layouts of their own has no single parallel state. Its provider has an attribute `engine`,
and the same loop runs it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.data.streamed import StreamedBatches
    from megatron.bridge.training.config import ConfigContainer


@dataclass(frozen=True)
class LoadingPlace:
    """What a rank loads of a global batch.

    Attributes:
        rank, size: its part, and the number of parts.
        micro_batch_size: samples of a forward pass in this part.
        needed: whether the rank needs data at all.
    """

    rank: int
    size: int
    micro_batch_size: int
    needed: bool


class Engine:
    """One model, one layout: Megatron-Core's parallel state."""

    def layout_problems(self, cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
        """Why the layout does not fit the ranks; nothing where it does."""
        from megatron.bridge.training.problems.layout import model_parallel_size

        model = cfg.model
        replica = model_parallel_size(model)
        if replica <= 0 or world_size % replica:
            yield (
                f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} x "
                f"pipeline_model_parallel_size={model.pipeline_model_parallel_size} x "
                f"context_parallel_size={getattr(model, 'context_parallel_size', 1)} needs a multiple of {replica} "
                f"ranks, and there are {world_size}; change the layout or start with another number of ranks"
            )

    def replicas(self, cfg: "ConfigContainer", world_size: int) -> int:
        """Data-parallel replicas that micro-batches are counted by, once `layout_problems` has found none."""
        from megatron.bridge.training.problems.layout import model_parallel_size

        return world_size // model_parallel_size(cfg.model)

    def loading_place(self, cfg: "ConfigContainer") -> LoadingPlace:
        """What this rank loads."""
        from megatron.core import parallel_state

        ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        return LoadingPlace(
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            micro_batch_size=cfg.train.micro_batch_size,
            # Every stage asks where the documents of a packed sample begin, or where images stand among tokens.
            needed=ends or getattr(cfg.dataset, "packing", False) or getattr(cfg.model, "vision", None) is not None,
        )

    def stream_place(self, cfg: "ConfigContainer") -> LoadingPlace:
        """What this rank reads of a stream, whose samples are divided among all that read it."""
        return self.loading_place(cfg)

    def of_stream(self, cfg: "ConfigContainer", batches: "StreamedBatches") -> "StreamedBatches":
        """What `loading_place` says of the micro-batches that are read for `stream_place`."""
        return batches

    def methods(self, cfg: "ConfigContainer") -> dict[str, Any]:
        """The PEFT methods of the run, by the settings that hold them; none where all is trained that is not frozen."""
        return {} if cfg.peft is None else {"peft": cfg.peft}

    def adapt(self, method: Any, chunks: list[Any]) -> list[Any]:
        """Apply `cfg.peft` to bare chunks, for training. Collective over the ranks that share the model."""
        adapted: list[Any] = method(chunks, training=True)
        return adapted

    def build_optimizer(self, settings: Any, model: list[Any], overrides: Any) -> Any:
        """Megatron-Core's optimizer. Collective."""
        from megatron.core.optimizer import get_megatron_optimizer

        from megatron.bridge.training.fused_update import fuse_updates

        optimizer = get_megatron_optimizer(settings, model, config_overrides=overrides)
        fuse_updates(optimizer)
        return optimizer

    def schedule(self) -> Callable[..., list[dict[str, "Tensor"]]]:
        """Megatron-Core's schedule of forward and backward passes."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        schedule: Callable[..., list[dict[str, Tensor]]] = get_forward_backward_func()
        return schedule

    def finish_gradients(self, *arguments: Any, **settings: Any) -> None:
        """Reduce the gradients of all micro-batches; the arguments are Megatron-Core's. Collective."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(*arguments, **settings)

    def gradient_buffers(self, model: list[Any]) -> list[Any]:
        """Megatron-Core's buffers of this rank's gradients."""
        return [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def total(self, values: "Tensor") -> "Tensor":
        """The sum over all replicas of what the last stages hold, on every rank. Collective."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        summed = values.clone()
        dist.all_reduce(summed, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(summed, last_stage, group=parallel_state.get_pipeline_model_parallel_group())
        return summed

    def over_stages(self, read: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """What the pipeline stages of the model with the loss tell, together and on every rank. Collective.

        Args:
            read: gives a stage's own from Megatron-Core's process groups of the model (None: its parallel state).
        """
        import torch.distributed as dist
        from megatron.core import parallel_state

        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[dict[str, float]] = [{}] * group.size()
        dist.all_gather_object(stages, read(None), group=group)
        return {name: value for stage in stages for name, value in stage.items()}

    # --- checkpoints

    def layout(self, cfg: "ConfigContainer") -> Any:
        """By what the random states are divided, to be compared."""
        from megatron.core import parallel_state

        layout = {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        }
        if cfg.rng.data_parallel_random_init:
            layout["data"] = parallel_state.get_data_parallel_world_size()
        return layout

    def random_place(self, cfg: "ConfigContainer") -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """How many random states there are along each axis, which one this rank has, and which copy of it.

        Each (pipeline, tensor) position has its own; data-parallel replicas share it, or have their own, too
        (`rng.data_parallel_random_init`).
        """
        from megatron.core import parallel_state

        pipeline = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        tensor = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
        replica = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        by_replica = cfg.rng.data_parallel_random_init
        ranks, sizes = zip(pipeline, tensor, *([replica] if by_replica else []), strict=True)
        if by_replica:
            return sizes, ranks, parallel_state.get_context_parallel_rank()
        return sizes, ranks, parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def optimizer_state(
        self, optimizer: Any, state: dict[str, Any], sharding: Mapping[str, Any], *, is_loading: bool = False
    ) -> Any:
        """The optimizer's part of a checkpoint, to be saved or to be loaded into.

        Args:
            state: the model's part.
            sharding: how Megatron-Core names and splits it.
        """
        from megatron.bridge.training.optimizer_state import prepare_optimizer_state

        prepare_optimizer_state(optimizer)
        return optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(sharding))

    def load_optimizer_state(self, optimizer: Any, loaded: dict[Any, Any], saved: dict[Any, Any]) -> None:
        """Load what was loaded for `optimizer_state`; `saved` are the values in it that are not sharded."""
        from megatron.bridge.training.optimizer_state import load_optimizer_state

        load_optimizer_state(optimizer, loaded, saved)

    def save_hf(self, bridge: Any, model: list[Any], folder: Path, *, overwrite: bool = False) -> None:
        """Write the model as a complete Hugging Face folder. Collective."""
        bridge.save_hf_pretrained(model, folder, overwrite=overwrite)

    def refuse_adapter_export(self, model: list[Any]) -> None:
        """Refuse at the start of a run what `save_hf_adapter` would at its end. Collective."""

    def save_hf_adapter(self, bridge: Any, model: list[Any], folder: Path) -> None:
        """Write the adapter alone, as Hugging Face peft's folder. Collective."""
        bridge.save_hf_adapter(model, folder)

    def stop(self) -> None:
        """Take down what the engine made; the parallel state is the caller's."""


def engine_of(cfg: "ConfigContainer") -> Engine:
    """The engine of the run's model."""
    own: Engine | None = getattr(cfg.model, "engine", None)
    return own or Engine()
