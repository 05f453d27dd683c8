"""Generated placements: every proposed fix does what it says, and Megatron-Core agrees on what works."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.bridge.mimo import DEPLOYMENT_MODES, MimoParallelismConfig, ModuleParallelismConfig, PlacementError
from megatron.bridge.mimo.violations import find_violations

_SIZE = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 8])
_BAD_SIZE = st.sampled_from([0, -2, "2", None, 1.5, 1, 2])


@st.composite
def _layouts(draw: st.DrawFn, sizes: st.SearchStrategy[object]) -> ModuleParallelismConfig:
    names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "data_parallel")
    changed = draw(st.dictionaries(st.sampled_from(names), sizes, max_size=3))
    return ModuleParallelismConfig(**changed, rank_offset=draw(st.sampled_from([0, 0, 0, 1, 2, 4, 6, -1])))


@st.composite
def _placements(draw: st.DrawFn) -> tuple[MimoParallelismConfig, int]:
    names = draw(st.sampled_from([["lm"], ["images", "lm"], ["lm", "images"], ["images", "audio", "lm"]]))
    sizes = draw(st.sampled_from([_SIZE, _SIZE, _SIZE, st.one_of(_SIZE, _BAD_SIZE)]))
    placement = MimoParallelismConfig(
        llm_module_name=draw(st.sampled_from(["lm", "lm", "lm", "llm", "language"])),
        module_parallelisms={name: draw(_layouts(sizes)) for name in names},
        deployment_mode=draw(
            st.sampled_from([*DEPLOYMENT_MODES, *DEPLOYMENT_MODES, None, "colocate", "disaggregated"])
        ),
    )
    return placement, draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))


@settings(max_examples=150, deadline=None)
@given(_placements())
def test_every_fix_leaves_fewer_violations_and_all_together_none(case: tuple[MimoParallelismConfig, int]) -> None:
    placement, world_size = case
    violations = find_violations(placement, world_size)
    assume(violations)
    with pytest.raises(PlacementError) as refusal:
        placement.finalize(world_size)
    error = refusal.value
    assert [violation for violation, _ in error.findings] == violations
    repaired, repaired_world = placement, world_size
    for fix in dict.fromkeys(fix for _, fix in error.findings):
        before = find_violations(repaired, repaired_world)
        repaired, repaired_world = fix.apply(repaired, repaired_world)
        after = {each.key for each in find_violations(repaired, repaired_world)}
        assert after < {each.key for each in before}, fix
    assert error.repair is not None
    assert error.repair.apply(placement, world_size) == (repaired, repaired_world)
    repaired.finalize(repaired_world)
    _assert_named(error)


def _assert_named(error: PlacementError) -> None:
    for violation, fix in error.findings:
        assert violation.module is None or repr(violation.module) in violation.problem
        assert f"  - {violation.problem}; {fix}" in str(error)
        for change in fix.changes:
            assert change.module is None or repr(change.module) in str(fix)
            assert str(change.value) in str(fix)


def _all_pairs(world_size: int, sizes: tuple[int, ...]) -> Iterator[tuple[ModuleParallelismConfig, ...]]:
    for tp, pp, cp, dp, offset in itertools.product(sizes, (1, 2), (1, 2), sizes, (0, 2)):
        if tp * pp * cp * dp <= world_size:
            for other in itertools.product(sizes, sizes, (1, 3)):
                yield (
                    ModuleParallelismConfig(
                        tensor_parallel=tp,
                        pipeline_parallel=pp,
                        context_parallel=cp,
                        data_parallel=dp,
                        rank_offset=offset,
                    ),
                    ModuleParallelismConfig(
                        tensor_parallel=other[0], data_parallel=other[1], context_parallel=other[2]
                    ),
                )


def _core_accepts(layouts: tuple[ModuleParallelismConfig, ...]) -> bool:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator

    from megatron.bridge.mimo.uneven_bridges import of_whole_sequences

    communicator = object.__new__(ColocatedBridgeCommunicator)
    axes = ("tensor_parallel", "context_parallel", "data_parallel", "pipeline_parallel")
    try:
        communicator.src_grid, own = (
            HyperCommGrid(
                [getattr(each, axis) for axis in axes], ["tp", "cp", "dp", "pp"], rank_offset=each.rank_offset
            )
            for each in layouts
        )
        communicator.dest_grid = of_whole_sequences(own)
        communicator._validate_grids()
    except (ValueError, RuntimeError):
        return False
    # Its grids may leave ranks of the world alone; a run may not.
    return layouts[0].total_ranks == 6 and layouts[0].rank_offset == 0


def test_colocated_placements_are_those_that_megatron_core_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    verdicts = []
    for images, lm in _all_pairs(6, (1, 2, 3, 6)):
        placement = MimoParallelismConfig(
            llm_module_name="lm", deployment_mode="colocated", module_parallelisms={"images": images, "lm": lm}
        )
        ours = not find_violations(placement, 6)
        assert ours == _core_accepts((images, lm)), placement
        verdicts.append(ours)
    assert sum(verdicts) >= 10
    assert len(verdicts) - sum(verdicts) >= 500


def test_coordinates_are_those_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.hyper_comm_grid import HyperCommGrid

    monkeypatch.setenv("WORLD_SIZE", "27")
    layout = ModuleParallelismConfig(
        tensor_parallel=2, context_parallel=2, data_parallel=3, pipeline_parallel=2, rank_offset=3
    )
    grid = HyperCommGrid([2, 2, 3, 2], ["tp", "cp", "dp", "pp"], rank_offset=3)
    for short, axis in {"tp": "tensor", "cp": "context", "dp": "data", "pp": "pipeline"}.items():
        for group in grid.get_rank_enum(short):
            places = [layout.coordinates(rank) or {} for rank in group]
            assert [place[f"{axis}_parallel"] for place in places] == list(range(len(group)))
            assert len({tuple(sorted((place | {f"{axis}_parallel": 0}).items())) for place in places}) == 1
    assert layout.coordinates(2) is None
    assert layout.coordinates(27) is None
