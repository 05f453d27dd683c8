"""FP8 in scaled blocks, as DeepSeek publishes: `NAME` in float8 with `NAME_scale_inv`, one scale per block."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.low_bit.scaled import ScaledWeight
from megatron.bridge.conversion.low_bit.scales import ScaleGrid
from megatron.bridge.conversion.low_bit.source import Decoding
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.conversion.weight_source import FolderSource

SCALE_SUFFIX = "_scale_inv"
# Scales of activations, for inference in FP8: a weight in full precision needs none.
_ACTIVATION_SCALES = (".activation_scale", ".input_scale")


def decoding(source: "FolderSource", config: Mapping[str, Any], what: str) -> Decoding:
    """The float8 weights of a folder, each with its scales.

    Args:
        source: the folder.
        config: its `quantization_config`; without `weight_block_size` each weight has a single scale.
        what: named in errors.

    Raises:
        BridgeError: a float8 weight without scales, or scales that fit no weight.
    """
    import torch

    if config.get("expert_dtype", "fp8") != "fp8":
        raise BridgeError(f"{what}: expert_dtype {config['expert_dtype']!r} beside fp8 is not supported")
    weights, consumed = {}, {name for name in source.shapes if name.endswith(_ACTIVATION_SCALES)}
    for name, shape in source.shapes.items():
        if source.dtypes[name] != torch.float8_e4m3fn:
            continue
        scale = f"{name}{SCALE_SUFFIX}"
        if scale not in source.shapes:
            raise BridgeError(
                f"{what}: {name} is stored in float8 and its scales, {scale}, are not there; fetch the checkpoint again"
            )
        grid = ScaleGrid.over(scale, source.shapes[scale], name, shape, _block(config, shape, what))
        weights[name] = ScaledWeight(name, shape, grid)
        consumed.add(scale)
    return Decoding(weights, frozenset(consumed))


def _block(config: Mapping[str, Any], shape: tuple[int, ...], what: str) -> tuple[int, ...]:
    stated = config.get("weight_block_size")
    if stated is None:
        return shape
    if not (
        isinstance(stated, list | tuple) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated)
    ):
        raise BridgeError(f"{what}: weight_block_size must be two numbers above 0, e.g. [128, 128]; it is {stated!r}")
    return (*(1,) * (len(shape) - 2), *stated)
