"""The process groups of each module of a placement, on Megatron-Core's `HyperCommGrid`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY as LANGUAGE
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig

__all__ = ["LANGUAGE", "ModuleGroups", "build_module_groups", "destroy_module_groups"]

# The view of a grid in which experts are spread over what is context and data parallelism otherwise.
_EXPERT = "expert"
_DENSE_GROUPS = (
    *(["tp"], ["cp"], ["pp"], ["dp"], ["dp", "cp"], ["tp", "cp"], ["tp", "pp"], ["tp", "dp", "cp"]),
    ["tp", "cp", "dp", "pp"],
)
_EXPERT_GROUPS = (["ep"], ["expt_tp"], ["expt_dp"], ["expt_tp", "ep"], ["expt_tp", "ep", "pp"])


@dataclass(frozen=True)
class ModuleGroups:
    """One module's place.

    Attributes:
        layout: its sizes.
        grid: of its ranks.
        groups: this rank's; None where the module is not on this rank.
    """

    layout: ModuleParallelismConfig
    grid: HyperCommGrid
    groups: ProcessGroupCollection | None

    @property
    def here(self) -> ProcessGroupCollection:
        """The groups, on a rank that has the module."""
        assert self.groups is not None
        return self.groups


def build_module_groups(placement: MimoParallelismConfig) -> dict[str, ModuleGroups]:
    """Grid and groups of every module, the language model by Megatron-Core's own key. Collective over the world.

    Homogeneous modules share theirs, but for the embedding's groups, which only the language model has. In a pipeline
    the encoders stand on its first stage: the first ranks, since ranks count stages last.
    """
    layouts = {
        LANGUAGE if name == placement.llm_module_name else name: layout
        for name, layout in placement.module_parallelisms.items()
    }
    if placement.mode != "homogeneous":
        return {name: _built(layout, embeds=name == LANGUAGE) for name, layout in layouts.items()}
    language = _built(layouts[LANGUAGE], embeds=True)
    if language.layout.pipeline_parallel == 1:
        encoder = dataclasses.replace(language, groups=_without_embedding(language.here))
    else:
        encoder = _built(dataclasses.replace(language.layout, pipeline_parallel=1), embeds=False)
    return {name: language if name == LANGUAGE else encoder for name in layouts}


def destroy_module_groups(modules: dict[str, ModuleGroups]) -> None:
    """Take the grids' groups down."""
    for grid in {id(each.grid): each.grid for each in modules.values()}.values():
        grid.destroy()


def _built(layout: ModuleParallelismConfig, embeds: bool) -> ModuleGroups:
    tensor, context, data, pipeline = (
        layout.tensor_parallel,
        layout.context_parallel,
        layout.data_parallel,
        layout.pipeline_parallel,
    )
    grid = HyperCommGrid([tensor, context, data, pipeline], ["tp", "cp", "dp", "pp"], rank_offset=layout.rank_offset)
    expert = layout.expert_parallel
    grid.register_view(
        _EXPERT,
        shape=[tensor, expert, context * data // expert, pipeline],
        dim_names=["expt_tp", "ep", "expt_dp", "pp"],
        shared_dims=["pp"],
    )
    for dims in _DENSE_GROUPS:
        grid.create_pg(dims)
    for dims in _EXPERT_GROUPS:
        grid.create_pg(dims, view=_EXPERT)
    # Making a group is collective: ranks outside the grid take part too.
    embedding = _embedding_groups(grid) if embeds else (None, None)
    groups = _collection(grid, *embedding) if grid.is_current_rank_in_grid() else None
    return ModuleGroups(layout, grid, groups)


def _embedding_groups(grid: HyperCommGrid) -> tuple[Any, Any]:
    """This rank's groups of the stages that hold the (tied) word embeddings, and those of positions."""
    words = positions = None
    for ranks in grid.get_rank_enum("pp"):
        first, ends = [ranks[0]], sorted({ranks[0], ranks[-1]})
        of_positions, of_words = dist.new_group(first), dist.new_group(ends)
        positions = of_positions if dist.get_rank() in first else positions
        words = of_words if dist.get_rank() in ends else words
    return words, positions


def _collection(grid: HyperCommGrid, words: Any, positions: Any) -> ProcessGroupCollection:
    def expert(dims: Any) -> Any:
        return grid.get_pg(dims, view=_EXPERT)

    data = grid.get_pg(["dp", "cp"])
    expert_data, expert_model = expert("expt_dp"), expert(["expt_tp", "ep", "pp"])
    return ProcessGroupCollection(
        tp=grid.get_pg("tp"),
        pp=grid.get_pg("pp"),
        cp=grid.get_pg("cp"),
        dp=grid.get_pg("dp"),
        dp_cp=data,
        intra_dp_cp=data,
        dp_cp_gtp_remat=data,
        tp_cp=grid.get_pg(["tp", "cp"]),
        tp_dp_cp=grid.get_pg(["tp", "dp", "cp"]),
        mp=grid.get_pg(["tp", "pp"]),
        intra_dist_opt=grid.get_pg(["tp", "cp", "dp", "pp"]),
        ep=expert("ep"),
        expt_tp=expert("expt_tp"),
        tp_ep=expert(["expt_tp", "ep"]),
        tp_ep_pp=expert_model,
        tp_ep_pp_with_egtp_remat=expert_model,
        expt_dp=expert_data,
        intra_expt_dp=expert_data,
        expt_dp_gtp_remat=expert_data,
        embd=words,
        pos_embd=positions,
    )


def _without_embedding(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    values = {name: value for name, value in vars(groups).items() if not name.startswith("_")}
    return ProcessGroupCollection(**{**values, "embd": None, "pos_embd": None})
