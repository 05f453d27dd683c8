"""A placement as a picture: what `draw_placement` writes, row for row."""

import xml.etree.ElementTree as ET
from pathlib import Path

from click.testing import CliRunner

from megatron.bridge.cli.root import cli
from megatron.bridge.mimo import MimoParallelismConfig, ModuleParallelismConfig, draw_placement
from megatron.bridge.mimo.drawing import written
from megatron.bridge.mimo.drawing_svg import placement_svg

APART = MimoParallelismConfig(
    llm_module_name="lm",
    deployment_mode="heterogeneous",
    module_parallelisms={
        "images <x>": ModuleParallelismConfig(data_parallel=2),
        "lm": ModuleParallelismConfig(tensor_parallel=2, pipeline_parallel=2, rank_offset=2),
    },
)
NAME = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [each.text or "" for each in ET.fromstring(picture).iter(f"{NAME}text")]


def test_the_picture_says_what_the_text_says() -> None:
    told = texts(placement_svg(APART, 6))
    drawn = draw_placement(APART, 6)
    cells = [part for row in drawn.splitlines()[3:] for part in row.split("  ")[1:] if part.strip(" -")]
    assert sorted(each.strip() for each in cells) == sorted(each for each in told if each[:2] in ("TP", "PP", "DP"))
    assert told[0] == "heterogeneous placement"
    assert "images <x>" in told


def test_a_rank_without_a_module_has_an_empty_cell_and_replicas_have_shades() -> None:
    picture = ET.fromstring(placement_svg(APART, 6))
    cells = [each for each in picture.iter(f"{NAME}rect") if each.get("rx")]
    assert len(cells) == 2 * 6
    assert sum(each.get("fill") == "none" for each in cells) == 4 + 2
    assert len({each.get("fill") for each in cells} - {"none"}) == 3  # two replicas of one module, one of the other


def test_a_placement_on_one_line() -> None:
    assert written(APART) == "images <x> DP2, lm PP2 TP2"


def test_what_cannot_work_is_drawn_and_then_refused(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    sizes = "{images: {data_parallel: 2}, language_module: {tensor_parallel: 4}}"
    file.write_text(f"model: {{module_parallelisms: {sizes}}}\nruntime: {{pipeline_schedule: colocated}}\n")
    told = CliRunner().invoke(cli, ["mimo", "draw", str(file)])
    assert told.exit_code == 1
    assert "2     -       TP2" in told.output
    assert "'images' has 2 ranks, and 4 are running; set data_parallel=4 for 'images'" in told.output
    file.write_text(
        file.read_text() + "ablate: {model.module_parallelisms.images: [{data_parallel: 4}, {tensor_parallel: 4}]}\n"
    )
    told = CliRunner().invoke(cli, ["mimo", "draw", str(file), "--svg", str(tmp_path / "picture.svg")])
    assert told.exit_code == 0, told.output
    assert "TP3" in texts((tmp_path / "picture-2.svg").read_text())
    assert texts((tmp_path / "picture-1.svg").read_text())[0] == "wrong images=data_parallel=4: colocated placement"
