"""Draws docs/data-way.svg and docs/layouts.svg: `uv run docs/site/pictures.py`. A picture has a ground of its own."""

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).parents[1]
GROUND, LINE, INK, FAINT, WAY = "#fbfaf7", "#3b4252", "#2e3440", "#4c566a", "#8a5a44"
SAND, GREEN, SKY, BLUE, STONE = "#f7e6c4", "#dbe7d3", "#cfe0ee", "#b9d3e8", "#e3e1dc"
FIRST, SECOND = SKY, "#f4d9a8"  # the two ranks of a small picture


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{LINE}" stroke-width="1.3"/>'


def text(x: float, y: float, words: str, size: float = 12.5, colour: str = FAINT, weight: int = 400) -> str:
    style = f'font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="middle"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def titled(x: float, y: float, width: float, height: float, fill: str, title: str, *lines: str) -> list[str]:
    """A box with a title and lines below it, centred."""
    middle, top = x + width / 2, y + height / 2 - 7.5 * len(lines) + 5
    below = [text(middle, top + 17 * (row + 1), line) for row, line in enumerate(lines)]
    return [box(x, y, width, height, fill), text(middle, top, title, 15.5, INK, 600), *below]


def arrow(*points: tuple[float, float], dashed: bool = False, both: bool = False) -> str:
    way = " L".join(f"{x} {y}" for x, y in points)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    start = ' marker-start="url(#head)"' if both else ""
    return f'<path d="M{way}" fill="none" stroke="{WAY}" stroke-width="1.8"{dash}{start} marker-end="url(#head)"/>'


def picture(width: int, height: int, title: str, description: str, parts: Iterable[str]) -> str:
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{WAY}"/></marker>'
    )
    family = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title desc" font-family="{family}">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(description)}</desc>',
        f"<defs>{head}</defs>",
        f'<rect width="{width}" height="{height}" rx="12" fill="{GROUND}"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def data_way() -> str:
    """From a Hugging Face folder through a plan to ranks, and to what they write."""
    ranks = [
        part
        for number, (x, y) in enumerate([(596, 88), (722, 88), (596, 146), (722, 146)])
        for part in titled(x, y, 112, 46, BLUE, f"rank {number}")
    ]
    parts = [
        *titled(30, 40, 190, 78, SAND, "Hugging Face folder", "config.json, safetensors"),
        *titled(30, 152, 190, 78, SAND, "a family's table", "rules: transform, shard"),
        *titled(290, 80, 170, 110, GREEN, "plan", "each weight of both", "sides has a partner,", "or nothing is done"),
        box(580, 40, 270, 168, SKY),
        text(715, 68, "a model over ranks, trained", 15.5, INK, 600),
        *ranks,
        *titled(40, 310, 230, 80, STONE, "Megatron checkpoint", "holds no layout;", "digests of every file"),
        *titled(340, 310, 210, 80, SAND, "Hugging Face folder", "complete and verified,", "or absent"),
        *titled(625, 310, 190, 80, STONE, "inference engine", "buckets by name,", "bounded memory"),
        arrow((220, 84), (288, 116)),
        arrow((220, 186), (288, 156)),
        arrow((460, 134), (578, 134)),
        text(519, 124, "each rank reads"),
        text(519, 152, "the bytes it owns", 12),
        arrow((715, 208), (715, 308)),
        text(752, 262, "stream"),
        arrow((640, 208), (480, 308)),
        text(606, 262, "export"),
        arrow((580, 196), (272, 326), both=True),
        text(392, 228, "save; resume at any layout"),
        arrow((330, 190), (170, 308), dashed=True),
        text(116, 266, "offline: without a model"),
        arrow((270, 362), (338, 362)),
        text(304, 382, "export"),
    ]
    says = (
        "A Hugging Face folder and a family's table make a plan; each rank reads the bytes it owns; the model streams "
        "to an inference engine, is exported to a Hugging Face folder and saved as a Megatron checkpoint, from which a "
        "run goes on at any layout. Offline conversion goes from the plan to the checkpoint without a model."
    )
    return picture(880, 420, "The data's way", says, parts)


def panel(x: float, name: str, says: tuple[str, str], parts: list[str]) -> list[str]:
    return [text(x + 80, 40, name, 15.5, INK, 600), *parts, text(x + 80, 206, says[0]), text(x + 80, 223, says[1])]


def layouts() -> str:
    """What two ranks hold under each kind of parallelism, and eight ranks under three of them."""
    tensor = [box(45, 80, 45, 90, FIRST), box(90, 80, 45, 90, SECOND), text(90, 70, "a matrix")]
    pipeline = [box(215, 150 - 28 * row, 110, 24, FIRST if row < 2 else SECOND) for row in range(4)]
    pipeline += [text(270, 167 - 28 * row, f"layer {row}") for row in range(4)]
    data = [
        part
        for row, fill in enumerate((FIRST, SECOND))
        for part in (box(400 + 52 * row, 66, 44, 66, fill), box(400 + 52 * row, 150, 44, 20, fill))
    ]
    data += [text(422 + 52 * at, y, word, 11) for at in (0, 1) for y, word in ((103, "model"), (164, "rows"))]
    context = [box(566 + 28 * at, 106, 28, 30, FIRST if at in (0, 3) else SECOND) for at in range(4)]
    context += [text(622, 96, "a sequence, in four")]
    experts = [box(724 + 34 * at, 116, 28, 50, FIRST if at < 2 else SECOND) for at in range(4)]
    experts += [box(752, 66, 76, 24, STONE), text(790, 83, "router", 12)]
    experts += [f'<path d="M790 90 L{738 + 34 * at} 114" stroke="{WAY}" stroke-width="1.2"/>' for at in range(4)]
    parts = [
        *panel(10, "tensor (TP)", ("each matrix is cut:", "half of the heads"), tensor),
        *panel(190, "pipeline (PP)", ("layers in stages,", "micro-batches flow"), pipeline),
        *panel(368, "data (DP)", ("a model each,", "other rows of the batch"), data),
        *panel(542, "context (CP)", ("each sequence is cut,", "ends and middle"), context),
        *panel(710, "expert (EP)", ("experts on", "different ranks"), experts),
        *(box(300 + 130 * at, 244, 16, 16, fill) for at, fill in enumerate((FIRST, SECOND))),
        text(346, 257, "rank 0"),
        text(476, 257, "rank 1"),
        text(440, 300, "TP2 PP2 DP2 on eight ranks", 15.5, INK, 600),
        *grid(),
    ]
    says = (
        "Tensor parallelism cuts each matrix, pipeline parallelism puts layers in stages, data parallelism gives each "
        "rank a model and other rows, context parallelism cuts sequences, expert parallelism spreads experts. Below: "
        "eight ranks with tensor, pipeline and data parallelism of two each; neighbours are tensor-parallel, the "
        "halves are pipeline stages."
    )
    return picture(880, 440, "Parallel layouts", says, parts)


def grid() -> list[str]:
    """Eight ranks in Megatron-Core's order: tensor first, then data, pipeline last."""
    parts = []
    for rank in range(8):
        x, fill = 60 + 97 * rank, SKY if rank < 4 else SAND
        places = f"TP{rank % 2} DP{rank // 2 % 2}"
        parts += [box(x, 320, 85, 58, fill), text(x + 42, 344, f"rank {rank}", 13, INK, 600), text(x + 42, 364, places)]
    return [*parts, text(248, 404, "PP0: the first layers"), text(636, 404, "PP1: the last layers")]


PICTURES = {"data-way.svg": data_way, "layouts.svg": layouts}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), "utf-8")
