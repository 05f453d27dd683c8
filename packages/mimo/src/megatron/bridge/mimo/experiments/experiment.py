"""One experiment: a model at a placement, for so many steps. Torch-free, until its run is configured."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

# The schedules by the names that experiments give them -> deployment mode.
SCHEDULES = {
    "homogeneous": "homogeneous",
    "colocated": "colocated",
    "1f1b": "heterogeneous",
    "heterogeneous": "heterogeneous",
}
# Micro-batches that fill a pipeline over modules well enough to compare it.
_TO_FILL = 4


@dataclass(kw_only=True)
class ModelSection:
    """Where the modules stand.

    Attributes:
        module_parallelisms: by module, fields of `ModuleParallelismConfig`. Modules of a heterogeneous placement that
            have no `rank_offset` follow one another as they are written.
        llm_module_name: which of them is the language model.
    """

    module_parallelisms: dict[str, dict[str, int]] = field(default_factory=dict)
    llm_module_name: str = "language_module"


@dataclass(kw_only=True)
class RuntimeSection:
    """How the model runs.

    Attributes:
        pipeline_schedule: `homogeneous`, `colocated` or `1f1b` (modules on ranks of their own).
        enable_performance_monitoring: after the steps that are timed, watch as many: modules, exchanges, bubbles.
        global_batch_size: samples of a step over all replicas; None for the recipe's.
        num_microbatches: of a step, on each replica; None for 1, and for 4 where there is a pipeline to fill.
        steps, warmup_steps: that are timed, and before them.
    """

    pipeline_schedule: str = ""
    enable_performance_monitoring: bool = True
    global_batch_size: int | None = None
    num_microbatches: int | None = None
    steps: int = 10
    warmup_steps: int = 3


@dataclass(kw_only=True)
class Experiment:
    """What a file says of one run.

    Attributes:
        name: of the file, and of the place in its grid.
        recipe: name of a recipe, or `module:name` of a function; what it returns has a `MimoProvider` as its model.
        overrides: of other fields of the recipe, by dotted name.
        model, runtime: see there.
    """

    name: str = ""
    recipe: str | None = None
    model: ModelSection = field(default_factory=ModelSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """The deployment mode."""
        return SCHEDULES[self.runtime.pipeline_schedule]

    @property
    def placement(self) -> MimoParallelismConfig:
        """Where the modules stand, not checked yet."""
        modules: dict[str, ModuleParallelismConfig] = {}
        end = 0
        for name, sizes in self.model.module_parallelisms.items():
            start = {"rank_offset": end} if self.mode == "heterogeneous" else {}
            modules[name] = ModuleParallelismConfig(**(start | sizes))
            end = max(end, modules[name].ranks.stop)
        return MimoParallelismConfig(
            llm_module_name=self.model.llm_module_name, deployment_mode=self.mode, module_parallelisms=modules
        )

    @cached_property
    def ranks(self) -> int:
        """How many ranks the placement takes."""
        return max(1, *(each.ranks.stop for each in self.placement.module_parallelisms.values()))

    @property
    def num_microbatches(self) -> int:
        """Of a step, on each replica."""
        language = self.placement.module_parallelisms[self.model.llm_module_name]
        filled = self.mode == "heterogeneous" or language.pipeline_parallel > 1
        return self.runtime.num_microbatches or (_TO_FILL if filled else 1)

    @property
    def watched_steps(self) -> int:
        """Steps after those that are timed."""
        return self.runtime.steps if self.runtime.enable_performance_monitoring else 0

    def configured(self) -> "ConfigContainer":
        """The run, not validated yet.

        Raises:
            BridgeError: the recipe is unknown or of another kind of model, or its batch cannot be divided so.
        """
        from megatron.bridge.mimo.mimo_recipe import mimo_config
        from megatron.bridge.training.overrides import apply_overrides

        cfg = mimo_config(str(self.recipe))
        cfg.model.placement = self.placement
        apply_overrides(cfg, [f"{key}={_written(value)}" for key, value in self.overrides.items()])
        cfg.train.global_batch_size = self.runtime.global_batch_size or cfg.train.global_batch_size
        cfg.train.micro_batch_size = self._micro_batch(cfg.train.global_batch_size)
        # The last step is reported by the loop, which costs time: it is none of those that are measured.
        cfg.train.train_iters = self.runtime.warmup_steps + self.runtime.steps + self.watched_steps + 1
        cfg.train.eval_interval, cfg.checkpoint.save, cfg.logger.folder = None, None, None
        cfg.logger.log_interval, cfg.logger.progress = cfg.train.train_iters, False
        return cfg

    def _micro_batch(self, samples: int) -> int:
        replicas = self.placement.module_parallelisms[self.model.llm_module_name].data_parallel
        each, rest = divmod(samples, replicas * self.num_microbatches)
        if rest:
            raise BridgeError(
                f"runtime.global_batch_size={samples} cannot be divided into num_microbatches={self.num_microbatches} "
                f"for each of data_parallel={replicas} replicas of {self.model.llm_module_name!r}; make it a multiple "
                f"of {replicas * self.num_microbatches}"
            )
        return each


def _written(value: Any) -> str:
    """As `apply_overrides` reads it: JSON is YAML."""
    import json

    return value if isinstance(value, str) else json.dumps(value)
