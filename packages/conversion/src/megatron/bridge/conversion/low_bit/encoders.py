"""How the weights of an export are written: in full precision, or in few bits on request."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from megatron.bridge.conversion.low_bit.fp8_export import NAME, Fp8BlockEncoder
from megatron.bridge.conversion.plan import PlanItem
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.hf.shard_files import TensorSpec


class Encoder(Protocol):
    """Turns each weight of an export into what its folder holds."""

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` says about it."""

    def outputs(self, name: str) -> tuple[str, ...]:
        """The names under which a weight is written."""

    def specs(self, tensors: "Mapping[str, TensorSpec]") -> "dict[str, TensorSpec]":
        """Shapes and dtypes of what is written for weights of these."""

    def encode(self, name: str, weight: "torch.Tensor") -> "Iterable[tuple[str, torch.Tensor]]":
        """What is written for a weight, by name."""


class FullPrecision:
    """Weights as they are."""

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def outputs(self, name: str) -> tuple[str, ...]:
        return (name,)

    def specs(self, tensors: "Mapping[str, TensorSpec]") -> "dict[str, TensorSpec]":
        return dict(tensors)

    def encode(self, name: str, weight: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        yield name, weight


def encoder_of(quantization: str | None, items: Iterable[PlanItem], what: str) -> Encoder:
    """The encoder for what a caller asks for.

    Args:
        quantization: `fp8-block`, or None for full precision.
        items: of the export's plan.
        what: named in errors.

    Raises:
        BridgeError: another name, or a model that cannot be written so.
    """
    if quantization is None:
        return FullPrecision()
    if quantization != NAME:
        raise BridgeError(f"{what}: quantization {quantization!r} cannot be written; only {NAME!r} can")
    return Fp8BlockEncoder(items, what)
