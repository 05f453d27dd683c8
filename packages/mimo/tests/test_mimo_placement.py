"""Placements: what is accepted, what is refused, with which words and which fix."""

import subprocess
import sys
from typing import Any

import pytest

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig, PlacementError, draw_placement

Layout = ModuleParallelismConfig


def _placement(mode: str | None, llm: str = "lm", **modules: Layout) -> MimoParallelismConfig:
    return MimoParallelismConfig(llm_module_name=llm, deployment_mode=mode, module_parallelisms=modules)


def _refused(placement: MimoParallelismConfig, world_size: Any) -> list[str]:
    with pytest.raises(PlacementError) as refusal:
        placement.finalize(world_size)
    assert isinstance(refusal.value, BridgeError)
    return [line[4:] for line in str(refusal.value).splitlines() if line.startswith("  - ")]


def test_the_documented_colocated_example() -> None:
    mimo_config = MimoParallelismConfig(
        llm_module_name="language_module",
        deployment_mode="colocated",
        module_parallelisms={
            "images": ModuleParallelismConfig(
                tensor_parallel=1,
                pipeline_parallel=1,
                data_parallel=8,
                rank_offset=0,
            ),
            "language_module": ModuleParallelismConfig(
                tensor_parallel=8,
                pipeline_parallel=1,
                data_parallel=1,
                rank_offset=0,
            ),
        },
    )
    mimo_config.finalize(world_size=8)
    assert _refused(mimo_config, 4) == [
        "'images' has 8 ranks, and 4 are running; start 8 ranks",
        "'language_module' has 8 ranks, and 4 are running; start 8 ranks",
    ]


@pytest.mark.parametrize(
    ("placement", "world_size", "mode"),
    [
        (_placement("homogeneous", images=Layout(tensor_parallel=2), lm=Layout(tensor_parallel=2)), 2, "homogeneous"),
        (
            _placement("homogeneous", lm=Layout(context_parallel=2, expert_parallel=4, data_parallel=2)),
            4,
            "homogeneous",
        ),
        (_placement(None, images=Layout(data_parallel=2), lm=Layout(data_parallel=2)), 2, "homogeneous"),
        (_placement(None, images=Layout(data_parallel=2), lm=Layout(tensor_parallel=2)), 2, "colocated"),
        (
            _placement("colocated", images=Layout(data_parallel=4), lm=Layout(tensor_parallel=2, data_parallel=2)),
            4,
            "colocated",
        ),
        (
            _placement(
                None, images=Layout(), audio=Layout(rank_offset=1), lm=Layout(pipeline_parallel=2, rank_offset=2)
            ),
            4,
            "heterogeneous",
        ),
        (_placement("heterogeneous", lm=Layout(tensor_parallel=2), images=Layout(rank_offset=2)), 3, "heterogeneous"),
    ],
)
def test_what_works_is_accepted(placement: MimoParallelismConfig, world_size: int, mode: str) -> None:
    placement.finalize(world_size)
    assert placement.deployment_mode == mode


@pytest.mark.parametrize(
    ("placement", "world_size", "lines"),
    [
        pytest.param(
            _placement("colocatd", images=Layout(data_parallel=2), lm=Layout(tensor_parallel=2, rank_offset=1)),
            2,
            [
                "deployment_mode='colocatd' is not one of 'homogeneous', 'colocated', 'heterogeneous'; "
                "set deployment_mode='colocated'",
                "'lm': rank_offset=1, and colocated modules stand on the same ranks, from 0 on; "
                "set rank_offset=0 for 'lm'",
            ],
            id="unknown mode",
        ),
        pytest.param(
            _placement("colocated", llm="languag", images=Layout(data_parallel=2), language=Layout(tensor_parallel=2)),
            2,
            [
                "llm_module_name='languag' is not one of the modules, which are 'images', 'language'; "
                "set llm_module_name='language'"
            ],
            id="unknown language module",
        ),
        pytest.param(
            _placement("colocated", images=Layout(data_parallel=4), lm=Layout(pipeline_parallel=4)),
            4,
            [
                "'lm': pipeline_parallel=4, and colocated modules run without pipeline; "
                "set pipeline_parallel=1 and data_parallel=4 for 'lm'"
            ],
            id="pipeline in a colocated module",
        ),
        pytest.param(
            _placement("colocated", images=Layout(data_parallel=2), lm=Layout(tensor_parallel=4)),
            4,
            ["'images' has 2 ranks, and 4 are running; set data_parallel=4 for 'images'"],
            id="a colocated module on fewer ranks",
        ),
        pytest.param(
            _placement(
                "colocated",
                images=Layout(tensor_parallel=2, data_parallel=3),
                lm=Layout(tensor_parallel=3, data_parallel=2),
            ),
            6,
            [
                "'images': data_parallel=3 and 'lm': data_parallel=2; one must divide the other, so that whole samples "
                "pass from replica to replica; set tensor_parallel=3 and data_parallel=2 for 'images'"
            ],
            id="fan-in that does not divide",
        ),
        pytest.param(
            _placement("homogeneous", images=Layout(data_parallel=4), lm=Layout(tensor_parallel=4)),
            4,
            [
                "'images' shares process groups with 'lm' and must have its sizes, not tensor_parallel=1 (there: 4), "
                "data_parallel=4 (there: 1); set tensor_parallel=4 and data_parallel=1 for 'images'"
            ],
            id="homogeneous modules that differ",
        ),
        pytest.param(
            _placement("heterogeneous", images=Layout(data_parallel=4), lm=Layout(tensor_parallel=4, rank_offset=2)),
            8,
            [
                "'lm' and 'images' both stand on ranks 2-3, and heterogeneous modules share none; "
                "set rank_offset=4 for 'lm'",
                "'lm' is the last module, and leaves ranks 6-7 without one; set rank_offset=4 for 'lm'",
            ],
            id="overlap",
        ),
        pytest.param(
            _placement("heterogeneous", images=Layout(), lm=Layout(tensor_parallel=2, rank_offset=2)),
            4,
            ["'lm' starts at rank 2, which leaves rank 1 without a module; set data_parallel=2 for 'images'"],
            id="gap",
        ),
        pytest.param(
            _placement("heterogeneous", images=Layout(), lm=Layout(rank_offset=1)),
            1,
            ["'lm' has 1 rank, up to rank 1, and 1 is running; start 2 ranks"],
            id="more ranks than there are",
        ),
        pytest.param(
            _placement("colocated", images=Layout(context_parallel=2, data_parallel=2), lm=Layout(context_parallel=4)),
            4,
            [
                "'images': context_parallel=2, and in colocated placements the language model's sequences alone are "
                "divided; set context_parallel=1 and data_parallel=4 for 'images'"
            ],
            id="an encoder's context parallelism",
        ),
        pytest.param(
            _placement("homogeneous", lm=Layout(expert_parallel=3, data_parallel=4)),
            4,
            [
                "'lm': expert_parallel=3 does not divide the 4 ranks (context_parallel=1 x data_parallel=4) that the "
                "experts are spread over; set expert_parallel=4 for 'lm'"
            ],
            id="experts",
        ),
        pytest.param(
            _placement("colocated", images=Layout(data_parallel=0), lm=Layout(tensor_parallel=2)),
            2,
            ["'images': data_parallel=0 must be a whole number, 1 or more; set data_parallel=2 for 'images'"],
            id="a size that is none",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_module_and_fix(
    placement: MimoParallelismConfig, world_size: int, lines: list[str]
) -> None:
    assert _refused(placement, world_size) == lines


def test_everything_is_reported_at_once() -> None:
    placement = _placement(
        "colocated",
        images=Layout(pipeline_parallel=2, context_parallel=4, rank_offset=1),
        audio=Layout(tensor_parallel=3),
        lm=Layout(tensor_parallel=4, context_parallel=2, expert_parallel=5),
    )
    lines = _refused(placement, 4)
    named = [line.split("'")[1] for line in lines]
    assert named == ["lm", "images", "images", "images", "audio", "lm", "images"]


@pytest.mark.parametrize("value", ["2", 2.0, True, None, -1])
def test_a_size_that_is_no_number_is_refused_in_every_mode(value: Any) -> None:
    for mode in (None, "homogeneous", "colocated", "heterogeneous"):
        lines = _refused(_placement(mode, images=Layout(tensor_parallel=value), lm=Layout()), 1)
        assert lines[0].startswith(f"'images': tensor_parallel={value!r} must be a whole number, 1 or more; set ")


def test_what_is_no_placement_is_refused() -> None:
    assert "names no module" in _refused(_placement("colocated"), 1)[0]
    raw: Any = {"data_parallel": 2}
    lines = _refused(_placement("colocated", images=raw), 0)
    assert lines[0].startswith("module 'images' has {'data_parallel': 2} where a ModuleParallelismConfig is expected")
    assert lines[1] == "world_size=0 is not a positive number of ranks; pass dist.get_world_size()"


def test_a_refused_placement_is_left_as_it_was() -> None:
    placement = _placement(None, images=Layout(data_parallel=2), lm=Layout(tensor_parallel=3))
    before = repr(placement)
    _refused(placement, 2)
    assert repr(placement) == before


def test_drawing() -> None:
    placement = _placement(
        "heterogeneous", images=Layout(), lm=Layout(tensor_parallel=2, pipeline_parallel=2, rank_offset=1)
    )
    assert draw_placement(placement, 6).splitlines() == [
        "heterogeneous placement",
        "rank  images  lm",
        "----  ------  -------",
        "0     whole   -",
        "1     -       PP0 TP0",
        "2     -       PP0 TP1",
        "3     -       PP1 TP0",
        "4     -       PP1 TP1",
        "5     -       -",
    ]


def test_a_placement_of_a_thousand_ranks_is_refused_quickly() -> None:
    placement = _placement(
        "heterogeneous", images=Layout(data_parallel=100), lm=Layout(tensor_parallel=8, rank_offset=96)
    )
    lines = _refused(placement, 1024)
    assert lines[0].startswith("'lm' and 'images' both stand on ranks 96-99")


def test_placements_need_no_torch() -> None:
    code = """
import sys
from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig, PlacementError
modules = {"lm": ModuleParallelismConfig(tensor_parallel=3), "images": ModuleParallelismConfig()}
wrong = MimoParallelismConfig(llm_module_name="lm", deployment_mode="colocated", module_parallelisms=modules)
try:
    wrong.finalize(4)
except PlacementError as error:
    placement, ranks = error.repair.apply(wrong, 4)
placement.finalize(ranks)
assert not {"torch", "megatron.core"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
