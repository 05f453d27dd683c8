"""FP8 block-scaled on the way out: the matrices of the linear layers in float8, with a scale per 128 x 128 block.

As DeepSeek publishes: embeddings, output head, routers, norms and biases keep their precision.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.entries import base_name
from megatron.bridge.conversion.low_bit.fp8 import SCALE_SUFFIX
from megatron.bridge.conversion.plan import PlanItem
from megatron.bridge.conversion.transforms import Transposed
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.hf.shard_files import TensorSpec

NAME = "fp8-block"
BLOCK = 128
_LINEAR = re.compile(r".*\.linear_\w+\.weight")
_WEIGHT = ".weight"


class Fp8BlockEncoder:
    """Quantises what an export yields.

    Args:
        items: of the export's plan.
        what: named in errors.

    Raises:
        BridgeError: a linear layer that the format has no form for, or none at all.
    """

    def __init__(self, items: Iterable[PlanItem], what: str) -> None:
        self._what = what
        self._quantized: set[str] = set()
        kept: dict[str, None] = {}
        for item in items:
            if _LINEAR.fullmatch(item.megatron):
                self._refuse_without_form(item)
                self._quantized |= set(item.hf)
            else:
                shapes = zip(item.hf, item.hf_shapes, strict=True)
                kept |= dict.fromkeys(name for name, shape in shapes if name.endswith(_WEIGHT) and len(shape) > 1)
        if not self._quantized:
            raise BridgeError(f"{what}: the model has no linear layers to write as {NAME}")
        described = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [name.removesuffix(_WEIGHT) for name in kept],
        }
        self.config: dict[str, Any] = {"quantization_config": described}

    def outputs(self, name: str) -> tuple[str, ...]:
        """The names under which a weight is written."""
        return (name, f"{name}{SCALE_SUFFIX}") if name in self._quantized else (name,)

    def specs(self, tensors: "Mapping[str, TensorSpec]") -> "dict[str, TensorSpec]":
        """Shapes and dtypes of what is written for weights of these."""
        import torch

        found: dict[str, TensorSpec] = {}
        for name, (shape, dtype) in tensors.items():
            found[name] = (shape, torch.float8_e4m3fn if name in self._quantized else dtype)
            for scale in self.outputs(name)[1:]:
                found[scale] = (tuple(-(-size // BLOCK) for size in shape), torch.float32)
        return found

    def encode(self, name: str, weight: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        """What is written for a weight.

        Raises:
            BridgeError: it holds values that are not finite.
        """
        if name not in self._quantized:
            yield name, weight
            return
        try:
            yield from zip(self.outputs(name), quantized(weight), strict=True)
        except ValueError as error:
            raise BridgeError(f"{self._what}: {name} {error}") from error

    def _refuse_without_form(self, item: PlanItem) -> None:
        for name, shape in zip(item.hf, item.hf_shapes, strict=True):
            reason = None
            if base_name(name) != name:
                reason = "stacks experts"
            elif isinstance(item.rule.transform, Transposed):
                reason = "is stored transposed"
            elif len(shape) != 2 or not name.endswith(_WEIGHT):
                reason = f"is no matrix of a linear layer (shape {list(shape)})"
            if reason is not None:
                raise BridgeError(
                    f"{self._what}: {name} {reason}, for which {NAME} has no form; leave out quantization"
                )


def quantized(weight: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """A matrix [rows, columns] in float8 and its scales [rows / 128, columns / 128], rounded up; number times scale.

    Each block's largest value becomes float8's largest. The arithmetic is that of transformers' own quantisation.

    Raises:
        ValueError: values that are not finite.
    """
    import torch
    from torch.nn.functional import pad

    rows, columns = weight.shape
    padded = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax((1, 3))
    if not bool(largest.isfinite().all()):
        raise ValueError("holds values that are not finite")
    top = torch.finfo(torch.float8_e4m3fn).max
    factors = torch.where(largest > 0, top / torch.where(largest > 0, largest, 1.0), 1.0)
    scaled = (blocks * factors[:, None, :, None]).clamp(-top, top).flatten(2).flatten(0, 1)
    return scaled[:rows, :columns].to(torch.float8_e4m3fn), 1.0 / factors
