"""The differences between two models on disk, each a Hugging Face folder or a Megatron checkpoint.

Both are compared in Hugging Face names, so padding of the vocabulary, fusing and stacking do not count. One weight of
each side is held at a time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.entries import base_name, entry_of
from megatron.bridge.conversion.inspection import is_megatron
from megatron.bridge.conversion.plan import Plan, PlanItem
from megatron.bridge.conversion.transforms import Shape
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.offline.distcp_reader import MegatronWeights

_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Stored:
    """A model on disk: its Hugging Face weights, and names that repeat another (a tied output layer)."""

    shapes: Mapping[str, tuple[Shape, "torch.dtype"]]
    tied: Mapping[str, str]
    read: "Callable[[str], torch.Tensor]"


@dataclass
class Difference:
    """What differs. `values` holds (name, largest absolute difference), largest first; NaN where one side is NaN."""

    compared: int = 0
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: list[tuple[str, float]] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the two are equal bit for bit."""
        return not (self.only_first or self.only_second or self.shapes or self.dtypes or self.values)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"same": self.same, **vars(self)}


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare two models on disk.

    Raises:
        BridgeError: one of them cannot be read, or is a checkpoint that does not say which model it is.
    """
    one, two = open_stored(first), open_stored(second)
    tied = {**one.tied, **two.tied}
    result = Difference()
    pairs: list[tuple[str, str]] = []
    for name in [*one.shapes, *(name for name in two.shapes if name not in one.shapes)]:
        left, right = _held(name, one, tied), _held(name, two, tied)
        if left is None:
            result.only_second.append(name)
        elif right is None:
            result.only_first.append(name)
        else:
            pairs.append((left, right))
    for left, right in pairs:
        _compare(left, right, one, two, result)
    result.values.sort(key=lambda pair: (not math.isnan(pair[1]), -pair[1]))
    return result


def _held(name: str, stored: Stored, tied: Mapping[str, str]) -> str | None:
    """The name under which a side holds a weight: a tied one may be written once or twice."""
    held = name if name in stored.shapes else tied.get(name)
    return held if held in stored.shapes else None


def _compare(left: str, right: str, one: Stored, two: Stored, result: Difference) -> None:
    name = left if left == right else f"{left} and {right}"
    (shape, dtype), (other_shape, other_dtype) = one.shapes[left], two.shapes[right]
    if shape != other_shape:
        result.shapes[name] = shape, other_shape
        return
    if dtype != other_dtype:
        result.dtypes[name] = str(dtype).removeprefix("torch."), str(other_dtype).removeprefix("torch.")
    result.compared += 1
    distance = largest_difference(one.read(left), two.read(right))
    if distance is not None:
        result.values.append((name, distance))


def open_stored(path: str | Path) -> Stored:
    """A Hugging Face folder or Megatron checkpoint, to be read weight by weight in Hugging Face names."""
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.offline.exporter import offline_export_plan

    if not Path(path).exists():
        raise BridgeError(f"{path} does not exist; give a Hugging Face folder or a Megatron checkpoint")
    if not is_megatron(path):
        return _open_hf(Path(path))
    plan, weights = offline_export_plan(AutoBridge.from_megatron_checkpoint(path), path)
    reader = _Pieces(plan, weights)
    return Stored({name: (shape, reader.dtype(name)) for name, shape in plan.hf_shapes.items()}, plan.tied, reader.read)


class _Pieces:
    """Hugging Face weights of a Megatron checkpoint, each taken out of the Megatron weight that holds it."""

    def __init__(self, plan: Plan, weights: "MegatronWeights") -> None:
        self._weights = weights
        # One piece, or one per entry of a weight that stacks them.
        self._pieces: dict[str, list[tuple[PlanItem, int]]] = defaultdict(list)
        for item in plan:
            for place, name in enumerate(item.hf):
                self._pieces[base_name(name)].append((item, place))
        # Fused weights are asked for piece by piece, so the last one is kept.
        self._last: tuple[str, list[torch.Tensor]] = "", []

    def dtype(self, name: str) -> "torch.dtype":
        return self._weights[self._pieces[name][0][0].megatron].dtype

    def read(self, name: str) -> "torch.Tensor":
        import torch

        pieces = [self._piece(item, place) for item, place in self._pieces[name]]
        item, place = self._pieces[name][0]
        return torch.stack(pieces) if entry_of(item.hf[place]) else pieces[0]

    def _piece(self, item: PlanItem, place: int) -> "torch.Tensor":
        if self._last[0] != item.megatron:
            self._last = item.megatron, item.rule.transform.inverse(self._weights.read(item.megatron))
        return self._last[1][place]


def _open_hf(folder: Path) -> Stored:
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.hf import HFWeights

    weights = HFWeights(folder)
    tied: dict[str, str] = {}
    # Without a family (or a configuration) two folders can still be compared, name by name.
    with suppress(BridgeError):
        tied = {tie.name: tie.to for tie in AutoBridge.from_hf_pretrained(folder).weight_table().tied}
    return Stored({name: (info.shape, info.dtype) for name, info in weights.items()}, tied, weights.read)


def largest_difference(one: "torch.Tensor", two: "torch.Tensor") -> float | None:
    """Largest absolute difference of two tensors of one shape; None when they are equal bit for bit."""
    import torch

    one, two = one.reshape(-1), two.reshape(-1)
    largest, differing = 0.0, one.dtype != two.dtype
    for left, right in zip(one.split(_BLOCK_ELEMENTS), two.split(_BLOCK_ELEMENTS), strict=True):
        if left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            continue
        differing = True
        distance = float((left.double() - right.double()).abs().max())
        if math.isnan(distance):
            return distance
        largest = max(largest, distance)
    # Two dtypes that hold the same values are reported as such, not as a difference of values.
    return largest if differing and (largest or one.dtype == two.dtype) else None


def as_text(result: Difference, shown: int = 20) -> str:
    """The differences in lines, the largest first."""
    lines = [f"{result.compared} weights compared"]
    sections: list[tuple[str, list[str]]] = [
        ("only in the first", result.only_first),
        ("only in the second", result.only_second),
        ("other shapes", [f"{name}: {list(one)} and {list(two)}" for name, (one, two) in result.shapes.items()]),
        ("other dtypes", [f"{name}: {one} and {two}" for name, (one, two) in result.dtypes.items()]),
        ("other values, largest first", [f"{name}: {distance:.3e}" for name, distance in result.values]),
    ]
    for title, entries in sections:
        if entries:
            lines.append(f"{title} ({len(entries)}):")
            lines += [f"  {entry}" for entry in entries[:shown]]
            lines += [f"  ... and {len(entries) - shown} more"] if len(entries) > shown else []
    return "\n".join([*lines, "identical" if result.same else "different"])
