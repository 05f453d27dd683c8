"""What a conversion would do, as data: every Megatron weight with the Hugging Face weights it is made of."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.owners import owners
from megatron.bridge.conversion.plan import Plan
from megatron.bridge.conversion.transforms import Shape

_COLUMNS: tuple[str, ...] = (
    "MEGATRON",
    "HUGGING FACE",
    "TRANSFORM",
    "SHARDS",
    "SHAPE",
    "DTYPE",
    "COUNT",
    "BYTES",
    "OWNER",
    "BYTES PER RANK",
)
_LONGEST = 100  # characters of a transform's or shard rule's values that are shown


@dataclass(frozen=True)
class PlanRow:
    """One Megatron weight of a plan.

    `nbytes` are as the side that was inspected holds it, low-bit weights decoded; `owner` names the ranks that hold it
    at the layout asked for, each `local_nbytes` of it.
    """

    megatron: str
    hf: tuple[str, ...]
    transform: str
    shard: str
    shape: Shape
    dtype: str
    nbytes: int
    owner: str
    local_nbytes: int


def inspect_plan(
    path: str | Path, *, trust_remote_code: bool = False, layout: Mapping[str, int] | None = None
) -> list[PlanRow]:
    """The proven plan of a Hugging Face folder (or hub id) or a Megatron checkpoint. Reads no weights.

    Args:
        path: what to inspect.
        trust_remote_code: run the configuration code that the model ships.
        layout: provider fields of the layout whose owners are told; None is a single rank.

    Raises:
        BridgeError: neither, some weight on either side is unaccounted for, or the layout does not fit.
    """
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.offline.exporter import offline_export_plan
    from megatron.bridge.conversion.offline.importer import offline_import_plan

    if is_megatron(path):
        bridge = AutoBridge.from_megatron_checkpoint(path, trust_remote_code=trust_remote_code)
        plan, weights = offline_export_plan(bridge, path)
        return _rows(plan, {item.megatron: weights[item.megatron].dtype for item in plan}, layout or {})
    bridge = AutoBridge.from_hf_pretrained(path, trust_remote_code=trust_remote_code)
    plan = offline_import_plan(bridge)
    held = bridge.stored_weights.dtypes
    return _rows(plan, {item.megatron: held[base_name(item.hf[0])] for item in plan}, layout or {})


def is_megatron(path: str | Path) -> bool:
    """Whether `path` is, or was meant as, a Megatron checkpoint rather than a Hugging Face folder or hub id."""
    from megatron.bridge.conversion.checkpoint_layout import LATEST_POINTER, METADATA_FILE

    folder = Path(path)
    if any((folder / name).exists() for name in (LATEST_POINTER, METADATA_FILE, "metadata.json")):
        return True
    return folder.is_dir() and any(folder.glob("*.distcp"))


def _rows(plan: Plan, dtypes: Mapping[str, Any], layout: Mapping[str, int]) -> list[PlanRow]:
    owner = owners(plan, layout)
    return [
        PlanRow(
            item.megatron,
            item.hf,
            _named(item.rule.transform),
            _named(item.rule.shard),
            item.shape,
            str(dtypes[item.megatron]).removeprefix("torch."),
            item.numel * dtypes[item.megatron].itemsize,
            str(owner[item.megatron]),
            prod(owner[item.megatron].local_shape) * dtypes[item.megatron].itemsize,
        )
        for item in plan
    ]


def _named(value: Any) -> str:
    """`Blocks(0, 2)` for a dataclass; values that would fill a screen are left out."""
    values = ", ".join(repr(getattr(value, field.name)) for field in fields(value))
    return f"{type(value).__name__}({values if len(values) <= _LONGEST else '...'})"


def as_json(rows: Iterable[PlanRow]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [asdict(row) for row in rows]


def as_table(rows: Iterable[PlanRow]) -> str:
    """Rows as aligned columns; layers that differ only in their number share a line, marked `*`."""
    from megatron.bridge.conversion.names import skeleton

    merged: dict[tuple[Any, ...], list[PlanRow]] = {}
    for row in rows:
        names = skeleton(row.megatron), *map(skeleton, row.hf)
        key = (*names, row.transform, row.shard, row.shape, row.dtype, row.owner)
        merged.setdefault(key, []).append(row)
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for same in merged.values():
        first, total, local = same[0], sum(row.nbytes for row in same), sum(row.local_nbytes for row in same)
        name, *hf = (skeleton(each).replace("#", "*") for each in (first.megatron, *first.hf))
        if len(same) == 1:
            name, *hf = first.megatron, *first.hf
        shape = "x".join(map(str, first.shape))
        counts = str(len(same)), f"{total:,}", first.owner, f"{local:,}"
        lines.append((name, hf[0], first.transform, first.shard, shape, first.dtype, *counts))
        lines.extend(("", other, *[""] * (len(_COLUMNS) - 2)) for other in hf[1:])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
