"""What a YAML file of an experiment says. Torch-free."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig

# The schedules by the names that experiments give them -> deployment mode.
SCHEDULES = {"homogeneous": "homogeneous", "colocated": "colocated", "1f1b": "heterogeneous"}


@dataclass(kw_only=True)
class ModelSection:
    """The model and where it stands.

    Attributes:
        hf: folder or hub id of a Hugging Face vision-language model; its weights are not read.
        module_parallelisms: sizes of each module.
        llm_module_name: which of them is the language model.
    """

    hf: str
    module_parallelisms: dict[str, dict[str, int]]
    llm_module_name: str = "language_module"


@dataclass(kw_only=True)
class RuntimeSection:
    """How it runs.

    Attributes:
        pipeline_schedule: `homogeneous`, `colocated` or `1f1b` (modules on ranks of their own).
        base_batch_size: samples of a micro-batch on one replica of the language model.
        num_microbatches: micro-batches of a step.
        seq_length: tokens of a sample.
        image_tokens: how many of them are features of its one image.
        steps, warmup_steps: that are measured, and before them.
        enable_performance_monitoring: measure communication and modules too; a run without it tells what they cost.
    """

    pipeline_schedule: str
    base_batch_size: int = 1
    num_microbatches: int = 4
    seq_length: int
    image_tokens: int
    steps: int = 5
    warmup_steps: int = 2
    enable_performance_monitoring: bool = True


@dataclass(frozen=True)
class Experiment:
    """One file."""

    name: str
    model: ModelSection
    runtime: RuntimeSection

    def placement(self) -> MimoParallelismConfig:
        """Where the modules stand; heterogeneous ones without an offset follow one another as in the file."""
        modules = {}
        end, apart = 0, SCHEDULES[self.runtime.pipeline_schedule] == "heterogeneous"
        for name, sizes in self.model.module_parallelisms.items():
            modules[name] = ModuleParallelismConfig(**({"rank_offset": end} if apart else {}) | sizes)
            end = max(end, modules[name].ranks.stop)
        return MimoParallelismConfig(
            llm_module_name=self.model.llm_module_name,
            deployment_mode=SCHEDULES[self.runtime.pipeline_schedule],
            module_parallelisms=modules,
        )

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        return max(each.ranks.stop for each in self.placement().module_parallelisms.values())


def read_experiment(path: Path) -> Experiment:
    """One experiment, checked: every key is known, and the placement can work.

    Raises:
        BridgeError: names the file, the key and the remedy.
    """
    try:
        held = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BridgeError(f"{path} cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise BridgeError(f"{path} holds no sections; it needs model: and runtime:")
    _known(path, "", held, {"model", "runtime"})
    sections = {name: _section(path, name, kind, held.get(name)) for name, kind in _SECTIONS.items()}
    found = Experiment(path.stem, **sections)
    schedule = found.runtime.pipeline_schedule
    if schedule not in SCHEDULES:
        raise BridgeError(f"{path}: runtime.pipeline_schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
    sizes = {each.name for each in dataclasses.fields(ModuleParallelismConfig)}
    for name, layout in found.model.module_parallelisms.items():
        _known(path, f"model.module_parallelisms.{name}.", layout, sizes)
    try:
        found.placement().finalize(found.ranks)
    except BridgeError as error:
        raise BridgeError(f"{path}: {error}") from error
    return found


def read_experiments(config: Path | None, folder: Path | None) -> list[Experiment]:
    """The experiment of a file, or those of a folder by name.

    Raises:
        BridgeError: neither or both are given, the folder has none, or one of them is refused.
    """
    if (config is None) == (folder is None):
        raise BridgeError("say what to run: --config FILE.yaml, or --experiments-dir FOLDER")
    files = [config] if config is not None else sorted(folder.glob("*.yaml")) if folder is not None else []
    if not files:
        raise BridgeError(f"{folder} holds no *.yaml")
    return [read_experiment(file) for file in files]


_SECTIONS: dict[str, Any] = {"model": ModelSection, "runtime": RuntimeSection}


def _section(path: Path, name: str, kind: Any, held: Any) -> Any:
    if not isinstance(held, dict):
        raise BridgeError(f"{path}: the section {name}: is missing")
    known = {each.name: each for each in dataclasses.fields(kind)}
    _known(path, f"{name}.", held, set(known))
    absent = [key for key, each in known.items() if key not in held and each.default is dataclasses.MISSING]
    if absent:
        raise BridgeError(f"{path}: {name} lacks {', '.join(absent)}")
    for key, value in held.items():
        if not isinstance(value, _kind(known[key].type)):
            raise BridgeError(f"{path}: {name}.{key}={value!r} is not {known[key].type}")
    return kind(**held)


def _kind(annotation: Any) -> type:
    return {int: int, str: str, bool: bool}.get(annotation, dict)


def _known(path: Path, where: str, held: dict[str, Any], known: set[str]) -> None:
    for key in held:
        if key not in known:
            raise BridgeError(f"{path}: unknown key '{where}{key}'{did_you_mean(str(key), sorted(known))}")
