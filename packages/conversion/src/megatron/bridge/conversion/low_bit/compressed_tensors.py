"""Of compressed-tensors: integers packed into words (`pack-quantized`), and plain scaled floats and integers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.low_bit.scaled import ScaledWeight
from megatron.bridge.conversion.low_bit.scales import ScaleGrid
from megatron.bridge.conversion.low_bit.source import Decoding, LowBitWeight
from megatron.bridge.conversion.transforms import Region, Shape, whole
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.weight_source import FolderSource

_PACKED = "pack-quantized"
_PLAIN = frozenset(("float-quantized", "int-quantized", "naive-quantized"))
_DENSE = "dense"
_WORD_BITS = 32
_WIDTHS = (4, 8)
# What calibrates activations and key-value caches for inference: a weight in full precision needs none.
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class PackedIntegers:
    """Integers without sign, packed along an axis, the first in a word's lowest bits.

    Args:
        name: of the tensor of 32-bit words.
        bits: of each integer.
        axis: along which they are packed.
    """

    name: str
    bits: int
    axis: int

    def read(self, source: "FolderSource", region: Region) -> "torch.Tensor":
        """The region's integers, shifted so that they have a sign, in float32."""
        import torch

        per_word = _WORD_BITS // self.bits
        start, stop = region[self.axis]
        first, last = start // per_word, -(-stop // per_word)
        words = source.read(self.name, (*region[: self.axis], (first, last), *region[self.axis + 1 :]))
        shifts = torch.arange(per_word, dtype=torch.int32) * self.bits
        shape = [per_word if axis == self.axis + 1 else 1 for axis in range(words.ndim + 1)]
        unpacked = (words.unsqueeze(self.axis + 1) >> shifts.view(shape)) & ((1 << self.bits) - 1)
        integers = unpacked.flatten(self.axis, self.axis + 1).narrow(self.axis, start - first * per_word, stop - start)
        return (integers - (1 << (self.bits - 1))).float()


@dataclass(frozen=True)
class PackedWeight:
    """`(integer - zero point) * scale`, in the scales' precision.

    Args:
        integers: of the weight.
        shape: of the weight.
        scales: see `ScaleGrid`.
        zero_points: packed along the rows, one per scale; None where they are all 0.
    """

    integers: PackedIntegers
    shape: Shape
    scales: ScaleGrid
    zero_points: PackedIntegers | None

    def read(self, source: "FolderSource", region: Region) -> "torch.Tensor":
        """The region's values."""
        scales = self.scales.read(source, region)
        values = self.integers.read(source, region)
        if self.zero_points is not None:
            values = values - self._zero_points(source, region)
        return (values * scales.float()).to(scales.dtype)

    def _zero_points(self, source: "FolderSource", region: Region) -> "torch.Tensor":
        (start, stop), size = region[1], self.scales.block[1]
        first, last = start // size, -(-stop // size)
        points = self.zero_points.read(source, (region[0], (first, last)))  # type: ignore[union-attr]
        return points.repeat_interleave(size, 1).narrow(1, start - first * size, stop - start)


def decoding(source: "FolderSource", config: Mapping[str, Any], what: str) -> Decoding:
    """The quantised weights of a folder.

    Raises:
        BridgeError: a format or strategy that is not supported, or tensors that do not belong together.
    """
    groups = _Groups(config, what)
    weights: dict[str, LowBitWeight] = {}
    consumed = {name for name in source.shapes if name.endswith(_ACTIVATIONS)}
    for name in source.shapes:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            weights[f"{module}.weight"] = _packed(source, module, groups, what)
            consumed |= {f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
            consumed.add(f"{module}.weight_zero_point")
        elif name.endswith(".weight") and f"{name}_scale" in source.shapes:
            weights[name] = _plain(source, name, groups, what)
            consumed.add(f"{name}_scale")
    return Decoding(weights, frozenset(consumed))


class _Groups:
    """What the configuration says about the ways in which weights are quantised."""

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        self._what = what
        self.packed: list[Mapping[str, Any]] = []
        self.plain: list[Mapping[str, Any]] = []
        for group in (config.get("config_groups") or {}).values():
            self._sort(group, group.get("format") or config.get("format"))
        if config.get("sparsity_config") and config["sparsity_config"].get("format") not in (None, _DENSE):
            raise BridgeError(f"{what}: sparse weights ({config['sparsity_config']['format']}) are not supported")

    def _sort(self, group: Mapping[str, Any], format: str | None) -> None:
        arguments = group.get("weights")
        if arguments is None or format == _DENSE:
            return
        if format == _PACKED:
            self.packed.append(arguments)
        elif format in _PLAIN:
            self.plain.append(arguments)
        else:
            raise BridgeError(
                f"{self._what}: the compressed-tensors format {format!r} is not supported, {_PACKED} and "
                f"{', '.join(sorted(_PLAIN))} are; load it in transformers with dequantize=True and save it again"
            )

    def one(self, groups: list[Mapping[str, Any]], weight: str, value: str) -> Any:
        """What all of `groups` say; different answers could not be told apart by a weight's name."""
        said = {repr(group.get(value)): group.get(value) for group in groups}
        if len(said) != 1:
            raise BridgeError(
                f"{self._what}: {weight} is quantised, and the groups of quantization_config state {value} = "
                f"{', '.join(said) or 'nothing'} for it; one value is needed"
            )
        return next(iter(said.values()))


def _packed(source: "FolderSource", module: str, groups: _Groups, what: str) -> PackedWeight:
    name, scale, points = f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_zero_point"
    absent = [each for each in (scale, f"{module}.weight_shape") if each not in source.shapes]
    if absent:
        raise BridgeError(f"{what}: {name} comes without {' and '.join(absent)}; fetch the checkpoint again")
    if f"{module}.weight_g_idx" in source.shapes:
        raise BridgeError(f"{what}: {module} has groups in another order (weight_g_idx), which is not supported")
    bits = groups.one(groups.packed, name, "num_bits")
    if bits not in _WIDTHS:
        raise BridgeError(f"{what}: {name} has integers of {bits} bits; supported are {_WIDTHS}")
    stated = f"{module}.weight_shape"
    shape = tuple(source.read(stated, whole(source.shapes[stated])).tolist())
    words = -(-shape[-1] * bits // _WORD_BITS)
    if len(shape) != 2 or source.shapes[name] != (shape[0], words):
        raise BridgeError(
            f"{what}: {name} {list(source.shapes[name])} cannot hold {list(shape)} integers of {bits} bits, which "
            f"{stated} states; fetch the checkpoint again"
        )
    grid = ScaleGrid.over(scale, source.shapes[scale], name, shape, _block(groups, groups.packed, name, shape, what))
    held = source.shapes.get(points)
    if held is None:
        return PackedWeight(PackedIntegers(name, bits, 1), shape, grid, None)
    if held != (-(-shape[0] * bits // _WORD_BITS), grid.stored[-1]):
        raise BridgeError(f"{what}: {points} {list(held)} does not fit {scale} {list(grid.stored)}; fetch it again")
    return PackedWeight(PackedIntegers(name, bits, 1), shape, grid, PackedIntegers(points, bits, 0))


def _plain(source: "FolderSource", name: str, groups: _Groups, what: str) -> ScaledWeight:
    if f"{name}_zero_point" in source.shapes:
        raise BridgeError(f"{what}: {name} has zero points and is not packed, which is not supported")
    shape, scale = source.shapes[name], f"{name}_scale"
    block = _block(groups, groups.plain, name, shape, what)
    return ScaledWeight(name, shape, ScaleGrid.over(scale, source.shapes[scale], name, shape, block), rounded=True)


def _block(groups: _Groups, own: list[Mapping[str, Any]], name: str, shape: Shape, what: str) -> Shape:
    """The elements that share a scale."""
    strategy = groups.one(own, name, "strategy")
    if strategy == "tensor":
        return shape
    if strategy == "channel":
        return (1, shape[1])
    if strategy == "group":
        return (1, int(groups.one(own, name, "group_size")))
    if strategy == "block":
        rows, columns = groups.one(own, name, "block_structure")
        return (int(rows), int(columns))
    raise BridgeError(f"{what}: {name} has scales per {strategy!r}; supported are tensor, channel, group and block")
