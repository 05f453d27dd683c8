"""Where each module of a MIMO model lives: its own parallel sizes, and the ranks that they stand on."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.mimo.repairs import Fix
    from megatron.bridge.mimo.violations import Violation

SIZES = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "data_parallel")
DEPLOYMENT_MODES = ("homogeneous", "colocated", "heterogeneous")


class PlacementError(BridgeError):
    """A placement cannot work.

    Attributes:
        findings: each violation with the smallest change that ends it, once those before it are made.
        repair: all of these changes together, after which the placement works; None when it cannot be read at all.
    """

    def __init__(
        self,
        message: str,
        findings: "tuple[tuple[Violation, Fix], ...]" = (),
        repair: "Fix | None" = None,
    ) -> None:
        super().__init__(message)
        self.findings = findings
        self.repair = repair


def is_count(value: object, least: int) -> bool:
    """Whether `value` is a whole number of at least `least`; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(kw_only=True)
class ModuleParallelismConfig:
    """The parallel sizes of one module, and its first rank.

    Consecutive ranks differ in tensor, then context, then data, then pipeline coordinate.

    Attributes:
        tensor_parallel, pipeline_parallel, context_parallel, data_parallel: their product is the module's ranks.
        expert_parallel: spreads the experts over the module's context- and data-parallel ranks; adds no ranks.
        rank_offset: the module's first rank in the world.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    data_parallel: int = 1
    rank_offset: int = 0

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the module."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def total_ranks(self) -> int:
        """Ranks that the module uses."""
        return self.ranks_per_replica * self.data_parallel

    @property
    def ranks(self) -> range:
        """The ranks themselves."""
        return range(self.rank_offset, self.rank_offset + self.total_ranks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The parallel sizes, without the offset, in the order of `SIZES`."""
        return tuple(getattr(self, name) for name in SIZES)

    @property
    def malformed_fields(self) -> list[str]:
        """Fields that are no whole number, or below the least they may be: 1 for sizes, 0 for the offset."""
        found = [name for name in SIZES if not is_count(getattr(self, name), 1)]
        return found if is_count(self.rank_offset, 0) else [*found, "rank_offset"]

    def coordinates(self, rank: int) -> dict[str, int] | None:
        """Tensor, context, data and pipeline index of a rank of the world; None when the module is not on it."""
        if rank not in self.ranks:
            return None
        found, rest = {}, rank - self.rank_offset
        for axis in ("tensor_parallel", "context_parallel", "data_parallel", "pipeline_parallel"):
            rest, found[axis] = divmod(rest, getattr(self, axis))
        return found


@dataclass(kw_only=True)
class MimoParallelismConfig:
    """The placement of a MIMO model: which module stands on which ranks.

    Attributes:
        llm_module_name: the key of the language model in `module_parallelisms`; every other module feeds it.
        module_parallelisms: the modules' own layouts.
        deployment_mode: `homogeneous` (all modules share one layout and its process groups), `colocated` (own
            layouts on the same ranks), `heterogeneous` (own ranks); None is told from the layouts by `finalize`.
    """

    llm_module_name: str
    module_parallelisms: dict[str, ModuleParallelismConfig]
    deployment_mode: str | None = None

    @property
    def mode(self) -> str:
        """The deployment mode: as set, the known one that is near to it, or the one that the layouts show."""
        if self.deployment_mode in DEPLOYMENT_MODES:
            return self.deployment_mode
        near = difflib.get_close_matches(str(self.deployment_mode).casefold(), DEPLOYMENT_MODES, n=1)
        if near:
            return near[0]
        layouts = [each for each in self.module_parallelisms.values() if not each.malformed_fields]
        if any(each.ranks != layouts[0].ranks for each in layouts):
            return "heterogeneous"
        return "homogeneous" if all(each == layouts[0] for each in layouts) else "colocated"

    def finalize(self, world_size: int) -> None:
        """Check the placement against `world_size` ranks, before any process group exists.

        Sets `deployment_mode` when it was None.

        Raises:
            PlacementError: every violation, each with its module and the smallest change that ends it.
        """
        from megatron.bridge.mimo.violations import find_violations, refuse_malformed

        refuse_malformed(self, world_size)
        if found := find_violations(self, world_size):
            raise _refusal(self, world_size, found)
        self.deployment_mode = self.mode


def _refusal(config: MimoParallelismConfig, world_size: int, found: "list[Violation]") -> PlacementError:
    from megatron.bridge.mimo.repairs import Fix, smallest_fixes

    fixes = smallest_fixes(config, world_size, found)
    modules, ranks = len(config.module_parallelisms), f"{world_size} rank{'s' * (world_size != 1)}"
    headline = f"the {config.mode} placement of {modules} module{'s' * (modules != 1)} on {ranks} cannot work:"
    lines = [f"  - {violation.problem}; {fix}" for violation, fix in zip(found, fixes, strict=True)]
    steps = list(dict.fromkeys(fixes))
    repair = Fix.together(steps)
    if len(steps) > 1:
        lines.append(f"in all: {repair}")
    return PlacementError("\n".join([headline, *lines]), tuple(zip(found, fixes, strict=True)), repair)
