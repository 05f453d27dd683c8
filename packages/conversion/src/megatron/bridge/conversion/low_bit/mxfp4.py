"""MXFP4, as GPT-OSS publishes: two 4-bit floats per byte in `NAME_blocks`, a power of two per 32 in `NAME_scales`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.low_bit.scaled import as_float
from megatron.bridge.conversion.low_bit.source import Decoding
from megatron.bridge.conversion.transforms import Region, Shape
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.weight_source import FolderSource

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_BLOCK = 2 * _BLOCK_BYTES  # elements that share a scale
# The values of OCP's E2M1: sign, two bits of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Mxfp4Weight:
    """Experts' matrices `[expert, in, out]`, of which the file holds `[expert, out, in / 32, 16]` bytes.

    Args:
        name: of the weight, without suffix.
        shape: of the weight.
    """

    name: str
    shape: Shape

    def read(self, source: "FolderSource", region: Region) -> "torch.Tensor":
        """The region's values, in float32."""
        import torch

        *leading, (start, stop), rows = region
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        held = (*leading, rows, (first, last))
        packed = source.read(f"{self.name}{_BLOCKS}", (*held, (0, _BLOCK_BYTES)))
        scales = as_float(source.read(f"{self.name}{_SCALES}", held))
        values = torch.tensor(_VALUES)
        # The low half of a byte comes first.
        halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
        matrix = (values[halves] * scales[..., None]).flatten(-2)
        return matrix.narrow(-1, start - first * _BLOCK, stop - start).transpose(-1, -2)


def decoding(source: "FolderSource", config: Mapping[str, Any], what: str) -> Decoding:
    """The weights of a folder that are stored as blocks and scales.

    Raises:
        BridgeError: blocks without scales or of another shape.
    """
    import torch

    weights, consumed = {}, set()
    for blocks, held in source.shapes.items():
        if not blocks.endswith(_BLOCKS):
            continue
        name = blocks.removesuffix(_BLOCKS)
        scales = f"{name}{_SCALES}"
        found = source.shapes.get(scales)
        bytes_only = all(source.dtypes.get(part) == torch.uint8 for part in (blocks, scales))
        if found != held[:-1] or held[-1] != _BLOCK_BYTES or not bytes_only:
            raise BridgeError(
                f"{what}: {blocks} {list(held)} with {scales} {None if found is None else list(found)} is no MXFP4 "
                f"weight, which has bytes [..., rows, blocks, {_BLOCK_BYTES}] and [..., rows, blocks]; fetch it again"
            )
        *leading, rows, count, _ = held
        weights[name] = Mxfp4Weight(name, (*leading, count * _BLOCK, rows))
        consumed |= {blocks, scales}
    return Decoding(weights, frozenset(consumed))
