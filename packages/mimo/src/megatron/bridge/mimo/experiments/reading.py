"""From YAML files to experiments: grids expanded, every key known, every placement able to run; all faults at once."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.mimo.experiments.experiment import SCHEDULES, Experiment
from megatron.bridge.mimo.parallelism import ModuleParallelismConfig

# Dotted key -> values: one experiment for each combination.
GRID = "ablate"


def files_of(config: Path | None, folder: Path | None) -> list[Path]:
    """The files to read: one, or those of a folder by name.

    Raises:
        BridgeError: neither or both are named, or the folder has none.
    """
    if (config is None) == (folder is None):
        raise BridgeError("say what to run: --config FILE.yaml, or --experiments-dir FOLDER")
    files = [config] if config is not None else sorted(folder.glob("*.y*ml")) if folder is not None else []
    if not files:
        raise BridgeError(f"--experiments-dir {folder} holds no *.yaml")
    return files


def read_experiments(
    files: list[Path], *, recipe: str | None = None, ranks: int | None = None, steps: int | None = None
) -> list[Experiment]:
    """The experiments of all files, in order, each checked as far as can be without building anything.

    Args:
        files: YAML.
        recipe: for those that name none.
        ranks: that there are; None for as many as each placement takes.
        steps: to time, instead of what the files say.

    Raises:
        BridgeError: every fault of every file, with its remedy.
    """
    found, problems = _parsed(files, recipe)
    for each in found:
        each.runtime.steps = steps or each.runtime.steps
        problems += [f"{each.name}: {problem}" for problem in _problems(each, ranks)]
    refuse(problems)
    return found


def read_placements(files: list[Path]) -> list[Experiment]:
    """The experiments of all files, able to run or not, as long as their placements can be read.

    Raises:
        BridgeError: every fault that keeps one from being read.
    """
    found, problems = _parsed(files, None)
    refuse(problems)
    return found


def refuse(problems: list[str]) -> None:
    """Raise one error for all faults; do nothing without any."""
    from megatron.bridge.training.validation import report

    if problems:
        raise BridgeError(report("the experiments cannot run", problems))


def config_problems(experiments: list[Experiment]) -> list[str]:
    """What is wrong with the runs: recipes, models and batches at their placements. Imports Megatron-Core."""
    problems = []
    for each in experiments:
        try:
            each.configured().validate(each.ranks)
        except BridgeError as error:
            problems.append(f"{each.name}: {error}")
    return problems


def _parsed(files: list[Path], recipe: str | None) -> tuple[list[Experiment], list[str]]:
    """Those that can be read, and why others cannot."""
    found: list[Experiment] = []
    problems: list[str] = []
    for file in files:
        try:
            for name, content in _settings(file):
                experiment, own = _experiment(name, content, recipe)
                problems += [f"{name}: {each}" for each in own]
                found += [] if own else [experiment]
        except BridgeError as error:
            problems.append(f"{file.name}: {error}")
    return found, problems


def _settings(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each experiment of a file."""
    from megatron.bridge.training.overrides import read_sections

    content = read_sections(file)
    grid = content.pop(GRID, None) or {}
    if not isinstance(grid, dict) or not all(isinstance(each, list) and each for each in grid.values()):
        raise BridgeError(f"{GRID}: must name keys and lists of values, e.g. {GRID}: {{runtime.steps: [5, 10]}}")
    for values in itertools.product(*grid.values()):
        varied = copy.deepcopy(content)
        for key, value in zip(grid, values, strict=True):
            _put(varied, str(key), value)
        words = [f"{_short(key)}={_shown(value)}" for key, value in zip(grid, values, strict=True)]
        yield " ".join([file.stem, *words]), varied


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            raise BridgeError(f"{GRID}: {key!r} goes through {part!r}, which holds a value; name a key of a section")
    content[last] = copy.deepcopy(value)


def _short(key: Any) -> str:
    return str(key).removeprefix("model.module_parallelisms.").removeprefix("runtime.")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={held}" for name, held in value.items()) or "plain"
    return str(value)


def _experiment(name: str, content: dict[str, Any], recipe: str | None) -> tuple[Experiment, list[str]]:
    """What the settings say, and what of it cannot be read."""
    from megatron.bridge.training.overrides import apply_content

    made = Experiment(recipe=recipe)
    try:
        apply_content(made, content, "the settings cannot be used")
    except BridgeError as error:
        return made, [str(error)]
    made.name = name
    return made, list(_unreadable(made))


def _unreadable(experiment: Experiment) -> Iterator[str]:
    """Why it is not clear what the placement is."""
    schedule, modules = experiment.runtime.pipeline_schedule, experiment.model.module_parallelisms
    if schedule not in SCHEDULES:
        near = did_you_mean(schedule, SCHEDULES)
        yield f"runtime.pipeline_schedule={schedule!r} is none of {', '.join(SCHEDULES)}{near}"
    if not modules:
        yield "model.module_parallelisms names no module; give each one its sizes"
    known = [each.name for each in dataclasses.fields(ModuleParallelismConfig)]
    for name, sizes in modules.items():
        for key in sizes:
            if key not in known:
                yield f"unknown key 'model.module_parallelisms.{name}.{key}'{did_you_mean(key, known)}"


def _problems(experiment: Experiment, ranks: int | None) -> Iterator[str]:
    """Why it cannot run, as far as its file tells."""
    if experiment.recipe is None:
        yield "it names no model; write recipe: NAME (or module:function), or give --recipe"
    for key in ("global_batch_size", "num_microbatches", "steps", "warmup_steps"):
        value = getattr(experiment.runtime, key)
        if value is not None and value < 1:
            yield f"runtime.{key}={value} must be greater than 0"
    yield from placement_problems(experiment, ranks)


def placement_problems(experiment: Experiment, ranks: int | None = None) -> Iterator[str]:
    """Why the placement cannot work on `ranks` ranks, or on as many as it takes."""
    try:
        experiment.placement.finalize(ranks or experiment.ranks)
    except BridgeError as error:
        yield str(error)
