"""What the training loop asks about a MIMO model's layout: `megatron.bridge.training.engine.Engine` for placements."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.engine import Engine, LoadingPlace
from megatron.bridge.training.hf_side import is_hf_folder

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.provider import MimoProvider
    from megatron.bridge.mimo.runtime import MimoRuntime
    from megatron.bridge.training.config import ConfigContainer


class MimoEngine(Engine):
    """Runs the model of one provider.

    Args:
        provider: whose model it is.
    """

    def __init__(self, provider: "MimoProvider") -> None:
        self._provider = provider
        self._runtime: MimoRuntime | None = None
        self._present: dict[str, Any] = {}

    def attach(self, model: "BridgeMimoModel") -> None:
        """Take on this rank's modules. Collective over the world."""
        from megatron.bridge.mimo.runtime import MimoRuntime

        self._runtime = MimoRuntime(model, self._provider.placement)

    @property
    def runtime(self) -> "MimoRuntime":
        """How the model runs on this rank.

        Raises:
            BridgeError: it was not built yet.
        """
        if self._runtime is None:
            raise BridgeError("the MIMO model is not built yet; call provide_distributed_model() first")
        return self._runtime

    def layout_problems(self, cfg: "ConfigContainer", world_size: int) -> Iterator[str]:
        try:
            self._provider.finalize(world_size)
        except BridgeError as error:
            yield f"model: {error}"
            return
        yield from self._provider.batch_problems(cfg.train.micro_batch_size)
        yield from _unsupported(cfg)

    def replicas(self, cfg: "ConfigContainer", world_size: int) -> int:
        return self._provider.llm_layout.data_parallel

    def loading_place(self, cfg: "ConfigContainer") -> LoadingPlace:
        from megatron.bridge.mimo.slices import loading_place

        rank, size = loading_place(self.runtime.model.module_groups)
        samples = cfg.train.micro_batch_size * self._provider.llm_layout.data_parallel
        return LoadingPlace(rank, size, samples // size, needed=True)

    def build_optimizer(self, settings: Any, model: list[Any], overrides: Any) -> Any:
        from megatron.bridge.mimo.optimizer import build_optimizer

        return build_optimizer(model[0], settings, overrides)

    def schedule(self) -> Callable[..., list[dict[str, "Tensor"]]]:
        return self.runtime.run_schedule

    def finish_gradients(self, *arguments: Any, **settings: Any) -> None:
        self.runtime.finish_gradients(*arguments, **settings)

    def gradient_buffers(self, model: list[Any]) -> list[Any]:
        found: list[Any] = model[0].buffers_of_gradients
        return found

    def total(self, values: "Tensor") -> "Tensor":
        return self.runtime.total(values)

    def layout(self, cfg: "ConfigContainer") -> Any:
        placement = self._provider.placement
        modules = {name: vars(each) for name, each in placement.module_parallelisms.items()}
        return {"mode": placement.mode, "modules": modules}

    def random_place(self, cfg: "ConfigContainer") -> tuple[tuple[int, ...], tuple[int, ...], int]:
        return (platform.world_size(),), (platform.rank(),), 0

    def optimizer_state(
        self, optimizer: Any, state: dict[str, Any], sharding: Mapping[str, Any], *, is_loading: bool = False
    ) -> Any:
        from megatron.bridge.mimo.optimizer import module_state

        found = {
            name: module_state(name, info, state, sharding, is_loading=is_loading)
            for name, info in optimizer.module_infos.items()
            if info.optimizer is not None
        }
        self._present = {name: present for name, (_, present) in found.items()}
        return {name: kept for name, (kept, _) in found.items()}

    def load_optimizer_state(self, optimizer: Any, loaded: dict[Any, Any], saved: dict[Any, Any]) -> None:
        from megatron.bridge.mimo.optimizer import load_module_state

        for name, info in optimizer.module_infos.items():
            if info.optimizer is not None:
                load_module_state(info.optimizer, loaded[name], self._present[name])

    def save_hf(self, bridge: Any, model: list[Any], folder: Path, *, overwrite: bool = False) -> None:
        from megatron.bridge.mimo.conversion import save_hf_pretrained

        save_hf_pretrained(bridge, model[0], folder, overwrite=overwrite)

    def stop(self) -> None:
        from megatron.core import parallel_state

        from megatron.bridge.mimo.module_groups import destroy_module_groups

        if self._runtime is None:
            return
        self.runtime.model.destroy()
        destroy_module_groups(self.runtime.modules)
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_tensor_model_parallel_rank(None)
        self._runtime = None


def _unsupported(cfg: "ConfigContainer") -> Iterator[str]:
    """Settings of a run that a model of several modules cannot follow."""
    if cfg.rng.data_parallel_random_init:
        yield "rng.data_parallel_random_init=True: replicas of several modules do not coincide; leave it out"
    if cfg.peft is not None:
        yield "peft: adapters are not applied to models of several modules; freeze modules instead (Encoder.frozen)"
    start = cfg.checkpoint.pretrained_checkpoint
    if start is not None and is_hf_folder(start):
        yield (
            f"checkpoint.pretrained_checkpoint={start!r} is a Hugging Face folder; make the provider of it "
            "(MimoProvider.from_hf_pretrained)"
        )
