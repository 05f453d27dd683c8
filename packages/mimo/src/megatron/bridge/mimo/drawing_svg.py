"""A placement as a picture: one row for each rank, one column for each module, a shade for each replica."""

from html import escape
from typing import TYPE_CHECKING

from megatron.bridge.mimo.drawing import held_part

if TYPE_CHECKING:
    from megatron.bridge.mimo.parallelism import MimoParallelismConfig, ModuleParallelismConfig

# In pixels.
_ROW, _COLUMN, _LEFT, _TOP, _GAP = 24, 150, 64, 58, 3
# Of each module: hue; replicas differ in lightness.
_HUES = (210, 28, 130, 280, 0, 50)
_FONT = 'font-family="system-ui, sans-serif" font-size="12"'


def placement_svg(config: "MimoParallelismConfig", world_size: int, title: str = "") -> str:
    """The text of an SVG file that shows what `drawing.draw_placement` writes.

    Args:
        config: the placement; one that does not work can be drawn, too.
        world_size: ranks.
        title: above it; the deployment mode follows.
    """
    modules = config.module_parallelisms
    width, height = _LEFT + _COLUMN * len(modules) + _GAP, _TOP + _ROW * world_size + _GAP
    heading = f"{title}: {config.mode} placement" if title else f"{config.mode} placement"
    width = max(width, 7 * len(heading) + 2 * _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {_FONT}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(_GAP, 20, heading, weight="bold"),
        _text(_GAP, _TOP - 8, "rank"),
    ]
    for rank in range(world_size):
        lines.append(_text(_GAP, _TOP + _ROW * rank + 16, str(rank)))
    for place, (name, layout) in enumerate(modules.items()):
        lines += _column(name, layout, place, world_size)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _column(name: str, layout: "ModuleParallelismConfig", place: int, world_size: int) -> list[str]:
    left = _LEFT + _COLUMN * place
    lines = [_text(left + _GAP, _TOP - 8, name, weight="bold")]
    for rank in range(world_size):
        position = f'x="{left}" y="{_TOP + _ROW * rank}" width="{_COLUMN - _GAP}" height="{_ROW - _GAP}" rx="3"'
        coordinates = layout.coordinates(rank)
        if coordinates is None:
            lines.append(f'<rect {position} fill="none" stroke="#cccccc" stroke-dasharray="3 3"/>')
            continue
        fill = _shade(place, coordinates["data_parallel"], layout.data_parallel)
        lines.append(f'<rect {position} fill="{fill}" stroke="#666666" stroke-width="0.5"/>')
        lines.append(_text(left + 8, _TOP + _ROW * rank + 15, held_part(layout, rank)))
    return lines


def _shade(place: int, replica: int, replicas: int) -> str:
    """Replicas go from dark to light."""
    lightness = 68 + 22 * replica / max(replicas - 1, 1)
    return f"hsl({_HUES[place % len(_HUES)]}, 60%, {lightness:.0f}%)"


def _text(x: int, y: int, content: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}">{escape(content)}</text>'
