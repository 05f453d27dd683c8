"""What is wrong with a placement: every violation, found from the sizes alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.mimo.parallelism import DEPLOYMENT_MODES, SIZES, ModuleParallelismConfig, PlacementError, is_count

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig

    type Layouts = Mapping[str, ModuleParallelismConfig]


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong.

    Attributes:
        kind: which check found it; unique for one module.
        module: the module at fault, or None when the placement as a whole is.
        problem: the module, what is wrong and why, in words.
    """

    kind: str
    module: str | None
    problem: str

    @property
    def key(self) -> tuple[str, str | None]:
        """Stays the same while other parts of the placement change."""
        return self.kind, self.module


def refuse_malformed(config: "MimoParallelismConfig", world_size: object) -> None:
    """Refuse what is no placement at all.

    Raises:
        PlacementError: no modules, a layout that is none, or a world that is no positive number.
    """
    problems = []
    modules = config.module_parallelisms
    if not isinstance(modules, dict) or not modules:
        problems.append(
            f"module_parallelisms={modules!r} names no module; give a dictionary with a ModuleParallelismConfig for "
            f"{config.llm_module_name!r} and one for each encoder"
        )
    else:
        problems += [
            f"module {name!r} has {layout!r} where a ModuleParallelismConfig is expected; write "
            f"{name!r}: ModuleParallelismConfig(tensor_parallel=..., data_parallel=...)"
            for name, layout in modules.items()
            if not isinstance(layout, ModuleParallelismConfig)
        ]
    if not is_count(world_size, 1):
        problems.append(f"world_size={world_size!r} is not a positive number of ranks; pass dist.get_world_size()")
    if problems:
        raise PlacementError("the placement cannot be read:\n" + "\n".join(f"  - {each}" for each in problems))


def find_violations(config: "MimoParallelismConfig", world_size: int) -> list[Violation]:
    """Everything that is wrong, in the order of the modules; empty for a placement that works.

    A module whose sizes are not numbers takes part in no further check, and a misspelt mode or language module is taken
    for the nearest known one, so that the rest is found too.
    """
    layouts = {name: each for name, each in config.module_parallelisms.items() if not each.malformed_fields}
    found = [*_names(config), *_sizes(config.module_parallelisms), *_experts(layouts)]
    if config.mode == "homogeneous":
        found += _homogeneous(layouts, config.llm_module_name, world_size)
    elif config.mode == "colocated":
        found += _colocated(layouts, world_size)
    else:
        found += _heterogeneous(layouts, world_size, complete=len(layouts) == len(config.module_parallelisms))
    if config.mode != "homogeneous":
        found += _communicators(layouts, config.llm_module_name, config.mode)
    return found


def _names(config: "MimoParallelismConfig") -> Iterator[Violation]:
    mode, llm, modules = config.deployment_mode, config.llm_module_name, config.module_parallelisms
    if mode is not None and mode not in DEPLOYMENT_MODES:
        known = ", ".join(map(repr, DEPLOYMENT_MODES))
        yield Violation("mode", None, f"deployment_mode={mode!r} is not one of {known}")
    if llm not in modules:
        known = ", ".join(map(repr, modules))
        yield Violation("llm", None, f"llm_module_name={llm!r} is not one of the modules, which are {known}")


def _sizes(modules: "Layouts") -> Iterator[Violation]:
    for name, layout in modules.items():
        for field in layout.malformed_fields:
            least = "0 or more" if field == "rank_offset" else "1 or more"
            value = getattr(layout, field)
            yield Violation(f"size of {field}", name, f"{name!r}: {field}={value!r} must be a whole number, {least}")


def _experts(layouts: "Layouts") -> Iterator[Violation]:
    for name, each in layouts.items():
        over = each.context_parallel * each.data_parallel
        if over % each.expert_parallel:
            yield Violation(
                "experts",
                name,
                f"{name!r}: expert_parallel={each.expert_parallel} does not divide the {over} ranks (context_parallel="
                f"{each.context_parallel} x data_parallel={each.data_parallel}) that the experts are spread over",
            )


def _homogeneous(layouts: "Layouts", llm: str, world_size: int) -> Iterator[Violation]:
    # Without a known language model the first module sets the example.
    leader = llm if llm in layouts else next(iter(layouts), None)
    if leader is None:
        return
    for name, each in layouts.items():
        unlike = [
            f"{size}={getattr(each, size)} (there: {getattr(layouts[leader], size)})"
            for size in SIZES
            if getattr(each, size) != getattr(layouts[leader], size)
        ]
        if unlike:
            problem = f"{name!r} shares process groups with {leader!r} and must have its sizes, not {', '.join(unlike)}"
            yield Violation("unlike", name, problem)
    yield from _from_rank_0(layouts, "homogeneous")
    yield from _whole_world({leader: layouts[leader]}, world_size)


def _colocated(layouts: "Layouts", world_size: int) -> Iterator[Violation]:
    for name, each in layouts.items():
        if each.pipeline_parallel != 1:
            problem = (
                f"{name!r}: pipeline_parallel={each.pipeline_parallel}, and colocated modules run without pipeline"
            )
            yield Violation("pipeline", name, problem)
    yield from _from_rank_0(layouts, "colocated")
    yield from _whole_world(layouts, world_size)


def _from_rank_0(layouts: "Layouts", mode: str) -> Iterator[Violation]:
    for name, each in layouts.items():
        if each.rank_offset:
            problem = f"{name!r}: rank_offset={each.rank_offset}, and {mode} modules stand on the same ranks, from 0 on"
            yield Violation("offset", name, problem)


def _whole_world(layouts: "Layouts", world_size: int) -> Iterator[Violation]:
    for name, each in layouts.items():
        if each.total_ranks != world_size:
            yield Violation("ranks", name, f"{name!r} has {_product(each)}, and {_running(world_size)}")


def _product(layout: ModuleParallelismConfig) -> str:
    sizes = [
        f"{axis}={getattr(layout, axis)}"
        for axis in ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")
        if getattr(layout, axis) > 1
    ]
    ranks = f"{layout.total_ranks} rank{'s' * (layout.total_ranks != 1)}"
    return f"{ranks} ({' x '.join(sizes)})" if len(sizes) > 1 else ranks


def _running(world_size: int) -> str:
    return "1 is running" if world_size == 1 else f"{world_size} are running"


def _heterogeneous(layouts: "Layouts", world_size: int, complete: bool) -> Iterator[Violation]:
    """Ranks that two modules claim, that none does, or that do not exist; `complete` when every module is known."""
    end, holder = 0, ""
    for name, each in sorted(layouts.items(), key=lambda item: item[1].rank_offset):
        own = each.ranks
        if own.start < end:
            shared = range(own.start, min(own.stop, end))
            problem = f"{name!r} and {holder!r} both stand on {_span(shared)}, and heterogeneous modules share none"
            yield Violation("overlap", name, problem)
        if own.start > end and complete:
            problem = (
                f"{name!r} starts at rank {own.start}, which leaves {_span(range(end, own.start))} without a module"
            )
            yield Violation("gap", name, problem)
        if own.stop > world_size:
            problem = f"{name!r} has {_product(each)}, up to rank {own.stop - 1}, and {_running(world_size)}"
            yield Violation("beyond", name, problem)
        if own.stop > end:
            end, holder = own.stop, name
    if end < world_size and complete:
        idle = _span(range(end, world_size))
        yield Violation("idle", holder, f"{holder!r} is the last module, and leaves {idle} without one")


def _span(ranks: range) -> str:
    return f"rank {ranks.start}" if len(ranks) == 1 else f"ranks {ranks.start}-{ranks.stop - 1}"


def _communicators(layouts: "Layouts", llm: str, mode: str) -> Iterator[Violation]:
    """What Megatron-Core's communicators between modules ask for."""
    for name, each in layouts.items():
        if each.context_parallel != 1 and name != llm:
            problem = (
                f"{name!r}: context_parallel={each.context_parallel}, and in {mode} placements the language model's "
                "sequences alone are divided"
            )
            yield Violation("context", name, problem)
    if llm not in layouts:
        return
    receiving = layouts[llm].data_parallel
    for name, each in layouts.items():
        if each.data_parallel % receiving and receiving % each.data_parallel:
            yield Violation(
                "fan",
                name,
                f"{name!r}: data_parallel={each.data_parallel} and {llm!r}: data_parallel={receiving}; one must divide "
                "the other, so that whole samples pass from replica to replica",
            )
