"""What the training loop asks about a MIMO model's layout: `megatron.bridge.training.engine.Engine` for placements."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.model_checks import adapter_problems, optimizer_problems
from megatron.bridge.mimo.module_settings import PROJECTOR
from megatron.bridge.training.engine import Engine, LoadingPlace
from megatron.bridge.training.hf_side import is_hf_folder

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.data.streamed import StreamedBatches
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
        yield from (f"model.{problem}" for problem in optimizer_problems(self._provider, cfg.optimizer))
        yield from adapter_problems(self._provider, adapted=cfg.peft is not None)
        yield from self._contradictions(cfg)
        yield from _unsupported(cfg)

    def _contradictions(self, cfg: "ConfigContainer") -> Iterator[str]:
        """Two learning rates for the same parameters."""
        rates, language = self._provider.optimizers, self._provider.placement.llm_module_name
        own = {name for name, each in rates.items() if each.lr is not None}
        if language in own and cfg.optimizer.decoupled_lr is not None:
            yield "optimizer.decoupled_lr and an lr of the language model's own (model.optimizers): keep one of them"
        for name, method in {language: cfg.peft, **self._provider.adapters}.items():
            if method is not None and own & {name, name + PROJECTOR} and method.optimizer_overrides(1.0, 0.0):
                where = "peft" if name == language else _setting(name)
                yield (
                    f"{where} gives some weights rates of their own, and so does model.optimizers to all: keep one of "
                    "them"
                )

    def replicas(self, cfg: "ConfigContainer", world_size: int) -> int:
        return self._provider.llm_layout.data_parallel

    def loading_place(self, cfg: "ConfigContainer") -> LoadingPlace:
        from megatron.bridge.mimo.slices import loading_place

        rank, size = loading_place(self.runtime.model.module_groups)
        samples = cfg.train.micro_batch_size * self._provider.llm_layout.data_parallel
        return LoadingPlace(rank, size, samples // size, needed=True)

    def stream_place(self, cfg: "ConfigContainer") -> LoadingPlace:
        from megatron.bridge.mimo.slices import common_place

        rank, size = common_place(self.runtime.model.module_groups)
        samples = cfg.train.micro_batch_size * self._provider.llm_layout.data_parallel
        return LoadingPlace(rank, size, samples // size, needed=True)

    def of_stream(self, cfg: "ConfigContainer", batches: "StreamedBatches") -> "StreamedBatches":
        from megatron.bridge.mimo.streamed_part import StreamedPart

        own, read = self.loading_place(cfg), self.stream_place(cfg)
        parts = own.size // read.size
        return batches if parts == 1 else StreamedPart(batches, self._provider.encoders, own.rank % parts, parts)

    def methods(self, cfg: "ConfigContainer") -> dict[str, Any]:
        return super().methods(cfg) | {_setting(name): each for name, each in self._provider.adapters.items()}

    def adapt(self, method: Any, chunks: list[Any]) -> list[Any]:
        if method is None:  # the provider adapts encoders itself
            return chunks
        from megatron.bridge.conversion.rank_agreement import on_every_rank
        from megatron.bridge.mimo.adapters import adapt_language

        trained = self._provider.trained_beside_adapters
        on_every_rank(lambda: adapt_language(method, chunks[0], trained), "peft")
        return chunks

    def build_optimizer(self, settings: Any, model: list[Any], overrides: Any) -> Any:
        from megatron.bridge.mimo.module_groups import LANGUAGE
        from megatron.bridge.mimo.optimizer import build_optimizer
        from megatron.bridge.training.peft_section import method_overrides

        language = self._provider.placement.llm_module_name
        by_module = {LANGUAGE if name == language else name: each for name, each in self._provider.optimizers.items()}
        of_methods = {name: method_overrides(each, settings) for name, each in self._provider.adapters.items()}
        return build_optimizer(model[0], settings, {LANGUAGE: overrides, **of_methods}, by_module)

    def schedule(self) -> Callable[..., list[dict[str, "Tensor"]]]:
        return self.runtime.run_schedule

    def finish_gradients(self, *arguments: Any, **settings: Any) -> None:
        self.runtime.finish_gradients(*arguments, **settings)

    def gradient_buffers(self, model: list[Any]) -> list[Any]:
        found: list[Any] = model[0].buffers_of_gradients
        return found

    def total(self, values: "Tensor") -> "Tensor":
        return self.runtime.total(values)

    def over_stages(self, read: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        from megatron.bridge.conversion.rank_agreement import gather
        from megatron.bridge.mimo.module_groups import LANGUAGE

        own = self.runtime.modules[LANGUAGE].groups
        return {name: value for each in gather({} if own is None else read(own)) for name, value in each.items()}

    def layout(self, cfg: "ConfigContainer") -> Any:
        placement = self._provider.placement
        modules = {name: vars(each) for name, each in placement.module_parallelisms.items()}
        return {"mode": placement.mode, "modules": modules}

    def random_place(self, cfg: "ConfigContainer") -> tuple[tuple[int, ...], tuple[int, ...], int]:
        return (platform.world_size(),), (platform.rank(),), 0

    def optimizer_state(
        self, optimizer: Any, state: dict[str, Any], sharding: Mapping[str, Any], *, is_loading: bool = False
    ) -> Any:
        from megatron.bridge.mimo.optimizer import module_state, stepping

        found = {
            name: module_state(name, info, state, sharding, is_loading=is_loading)
            for name, info in stepping(optimizer).items()
        }
        self._present = {name: present for name, (_, present) in found.items()}
        return {name: kept for name, (kept, _) in found.items()}

    def load_optimizer_state(self, optimizer: Any, loaded: dict[Any, Any], saved: dict[Any, Any]) -> None:
        from megatron.bridge.mimo.optimizer import load_module_state, stepping

        for name, info in stepping(optimizer).items():
            load_module_state(info.optimizer, loaded[name], self._present[name])

    def save_hf(self, bridge: Any, model: list[Any], folder: Path, *, overwrite: bool = False) -> None:
        from megatron.bridge.mimo.conversion import save_hf_pretrained

        save_hf_pretrained(bridge, model[0], folder, overwrite=overwrite)

    def refuse_adapter_export(self, model: list[Any]) -> None:
        from megatron.bridge.mimo.hf_adapter import refuse_adapter_export

        refuse_adapter_export(self._provider.bridge, model[0])

    def save_hf_adapter(self, bridge: Any, model: list[Any], folder: Path) -> None:
        from megatron.bridge.mimo.hf_adapter import save_hf_adapter

        save_hf_adapter(bridge, model[0], folder)

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


def _setting(encoder: str) -> str:
    """What holds the PEFT method of an encoder."""
    return f"model.adapters[{encoder!r}]"


def _unsupported(cfg: "ConfigContainer") -> Iterator[str]:
    """Settings of a run that a model of several modules cannot follow."""
    if getattr(cfg.dataset, "packing", False):
        yield (
            "dataset.packing=true packs text alone; set it to false, and wrap a dataset of samples with items in "
            "megatron.bridge.mimo.PackedSamples"
        )
    if cfg.rng.data_parallel_random_init:
        yield "rng.data_parallel_random_init=True: replicas of several modules do not coincide; leave it out"
    start = cfg.checkpoint.pretrained_checkpoint
    if start is not None and is_hf_folder(start):
        yield (
            f"checkpoint.pretrained_checkpoint={start!r} is a Hugging Face folder; make the provider of it "
            "(MimoProvider.from_hf_pretrained)"
        )
