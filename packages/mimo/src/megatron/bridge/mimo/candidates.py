"""Changes worth trying on a placement that does not work.

A candidate is a dictionary from (module, field) to the new value; module None means the placement itself.
"""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.bridge.mimo.parallelism import DEPLOYMENT_MODES, SIZES

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig

    type Changes = dict[tuple[str | None, str], int | str]


def candidates(config: "MimoParallelismConfig", world_size: int) -> "Iterator[Changes]":
    """Changes that alter something; the last resort among them always works, so that there is an answer."""
    starts = [{}, *_names(config), *_single_sizes(config, world_size), *_like_another(config)]
    seen = set()
    for start in starts:
        for changes in _completed(start, config, world_size):
            real = {where: value for where, value in changes.items() if value != _present(config, world_size, *where)}
            identity = tuple(real.items())
            if real and identity not in seen:
                seen.add(identity)
                yield real
    yield _last_resort(config, world_size)


def _present(config: "MimoParallelismConfig", world_size: int, module: str | None, field: str) -> object:
    if module is not None:
        return getattr(config.module_parallelisms[module], field)
    return world_size if field == "world_size" else getattr(config, field)


def _names(config: "MimoParallelismConfig") -> "Iterator[Changes]":
    for mode in DEPLOYMENT_MODES:
        yield {(None, "deployment_mode"): mode}
    if config.llm_module_name not in config.module_parallelisms:
        for name in reversed(config.module_parallelisms):  # the language model comes last, as a rule
            yield {(None, "llm_module_name"): name}


def _single_sizes(config: "MimoParallelismConfig", world_size: int) -> "Iterator[Changes]":
    """One size or offset of one module, alone and with the data parallelism that keeps or fills the ranks."""
    for name, layout in config.module_parallelisms.items():
        yield {(name, "rank_offset"): _end_of_those_before(config, name)}
        for size in SIZES:
            for value in _values(config, world_size) if size == "data_parallel" else _customary(config, world_size):
                start: Changes = {(name, size): value}
                yield start
                if size not in ("data_parallel", "expert_parallel"):
                    unit = _changed(layout, {size: value}).ranks_per_replica if _sound(layout) else 0
                    for ranks in {layout.total_ranks, world_size} if unit > 0 else ():
                        if ranks % unit == 0:
                            yield start | {(name, "data_parallel"): ranks // unit}


def _like_another(config: "MimoParallelismConfig") -> "Iterator[Changes]":
    """The layout of one module for another, or for all."""
    modules = config.module_parallelisms
    for model, layout in modules.items():
        if _sound(layout):
            copies: list[Changes] = [
                {(name, size): getattr(layout, size) for size in SIZES} for name in modules if name != model
            ]
            yield from copies
            yield {where: value for each in copies for where, value in each.items()}


def _sound(layout: "ModuleParallelismConfig") -> bool:
    return set(layout.malformed_fields) <= {"rank_offset"}


def _values(config: "MimoParallelismConfig", world_size: int) -> list[int]:
    """Numbers of replicas worth trying: small ones, the world's divisors, and what the placement has or
    leaves over.
    """
    sound = [each for each in config.module_parallelisms.values() if _sound(each)]
    values = {value for each in sound for value in (*each.sizes, each.total_ranks)}
    values |= set(range(1, min(world_size, 16) + 1))
    values |= {value for value in range(1, int(world_size**0.5) + 1) if world_size % value == 0}
    values |= {world_size // value for value in list(values) if world_size % value == 0}
    left = world_size - sum(each.total_ranks for each in sound)
    values |= {(left + each.total_ranks) // each.ranks_per_replica for each in sound}
    return sorted(value for value in values if 1 <= value <= world_size)


def _customary(config: "MimoParallelismConfig", world_size: int) -> list[int]:
    """Sizes that models can be split by: powers of two, and what the placement has already."""
    sizes = {size for each in config.module_parallelisms.values() if _sound(each) for size in each.sizes}
    return sorted(size for size in sizes | {1, 2, 4, 8, 16} if size <= world_size)


def _end_of_those_before(config: "MimoParallelismConfig", name: str) -> int:
    """The first rank after the modules that stand before this one."""
    order = sorted(config.module_parallelisms.items(), key=lambda item: _offset(item[1]))
    before = order[: [each for each, _ in order].index(name)]
    return max((layout.ranks.stop for _, layout in before if not layout.malformed_fields), default=0)


def _offset(layout: "ModuleParallelismConfig") -> int:
    return layout.rank_offset if isinstance(layout.rank_offset, int) else -1


def _changed(layout: "ModuleParallelismConfig", values: dict[str, int]) -> "ModuleParallelismConfig":
    changed = copy.copy(layout)
    for field, value in values.items():
        setattr(changed, field, value)
    return changed


def _completed(start: "Changes", config: "MimoParallelismConfig", world_size: int) -> "Iterator[Changes]":
    """`start` alone, and with what it may entail for the other modules and the number of ranks."""
    yield start
    mode = str(start.get((None, "deployment_mode"), config.mode))
    layouts = {
        name: _changed(layout, {field: int(value) for (owner, field), value in start.items() if owner == name})
        for name, layout in config.module_parallelisms.items()
    }
    if not all(_sound(each) for each in layouts.values()):
        return
    if mode == "heterogeneous":
        yield from _side_by_side(start, layouts, world_size)
        return
    together: Changes = {**start, **{(name, "rank_offset"): 0 for name in layouts}}
    yield together
    if mode == "homogeneous":
        for model in layouts.values():
            shared = {(name, size): getattr(model, size) for name in layouts for size in SIZES}
            yield start | shared
            yield together | shared | {(None, "world_size"): model.total_ranks}
    for total in {each.total_ranks for each in layouts.values()}:
        yield start | {(None, "world_size"): total}


def _side_by_side(
    start: "Changes", layouts: "dict[str, ModuleParallelismConfig]", world_size: int
) -> "Iterator[Changes]":
    """The modules one after the other, in their present order; one of them may take up what is left."""
    total = sum(each.total_ranks for each in layouts.values())
    stacked = _stacked(layouts)
    yield start | stacked
    yield start | stacked | {(None, "world_size"): total}
    if not any(each.malformed_fields for each in layouts.values()):
        yield start | {(None, "world_size"): max(each.ranks.stop for each in layouts.values())}
    for name, each in layouts.items():
        left = world_size - total + each.total_ranks
        if left > 0 and left % each.ranks_per_replica == 0:
            filling = {"data_parallel": left // each.ranks_per_replica}
            filled = layouts | {name: _changed(each, filling)}
            yield start | {(name, "data_parallel"): filling["data_parallel"]} | _stacked(filled)


def _stacked(layouts: "dict[str, ModuleParallelismConfig]") -> "Changes":
    offsets: Changes = {}
    end = 0
    for name, each in sorted(layouts.items(), key=lambda item: _offset(item[1])):
        offsets[name, "rank_offset"] = end
        end += each.total_ranks
    return offsets


def _last_resort(config: "MimoParallelismConfig", world_size: int) -> "Changes":
    """A plain placement in the same mode that works in any world that has a rank for each module."""
    modules, mode = config.module_parallelisms, config.mode
    llm = config.llm_module_name if config.llm_module_name in modules else next(reversed(modules))
    changes: Changes = {(None, "deployment_mode"): mode, (None, "llm_module_name"): llm}
    changes |= {(name, size): 1 for name in modules for size in SIZES}
    if mode != "heterogeneous":
        return (
            changes
            | {(name, "data_parallel"): world_size for name in modules}
            | {(name, "rank_offset"): 0 for name in modules}
        )
    world_size = max(world_size, len(modules))
    changes[None, "world_size"] = world_size
    changes[llm, "data_parallel"] = world_size - len(modules) + 1
    end = 0
    for name in modules:
        changes[name, "rank_offset"] = end
        end += int(changes[name, "data_parallel"])
    return changes
