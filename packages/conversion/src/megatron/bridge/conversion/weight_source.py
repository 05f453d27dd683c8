"""A Hugging Face folder as a source of weights, for live and offline executors; checkpoints in few bits are decoded."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from megatron.bridge.conversion.transforms import Region, Shape, whole
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.hf import HFSource, HFWeights
    from megatron.bridge.conversion.low_bit.source import Decoding


class StoredWeights(Protocol):
    """Hugging Face weights of a folder, by name."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    @property
    def dtypes(self) -> "Mapping[str, torch.dtype]": ...

    def read(self, name: str, region: Region) -> "torch.Tensor": ...


class FolderSource:
    """Weights of an opened folder as they are; each read touches only the bytes of its region."""

    def __init__(self, weights: "HFWeights") -> None:
        self._weights = weights
        self.shapes: Mapping[str, Shape] = {name: info.shape for name, info in weights.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: info.dtype for name, info in weights.items()}

    def read(self, name: str, region: Region) -> "torch.Tensor":
        """The region of a weight, on the CPU."""
        if region == whole(self.shapes[name]):
            return self._weights.read(name)
        return self._weights.read(name, tuple(slice(start, stop) for start, stop in region))


def open_weights(source: "HFSource", dtype: "torch.dtype") -> StoredWeights:
    """The weights of a model, in full precision.

    Args:
        source: the model.
        dtype: of weights that are stored in few bits; others have their own.

    Raises:
        BridgeError: they are stored in a format that is not supported, or not as `config.json` says.
    """
    folder, config = FolderSource(source.weights), quantization_config(source)
    weights: StoredWeights = folder
    if config is not None:
        from megatron.bridge.conversion.low_bit.source import LowBitSource

        weights = LowBitSource(folder, _decoding(folder, config, source), dtype)
    _refuse_undecoded(weights, source)
    return weights


def quantization_config(source: "HFSource") -> Mapping[str, Any] | None:
    """What the folder's `config.json` says about low-bit weights; None for a model in full precision."""
    path = source.folder / "config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BridgeError(f"{path} cannot be read as a model configuration: {error}") from error
    parts = [stated, stated.get("text_config")] if isinstance(stated, dict) else []
    for part, name in ((part, name) for part in parts if isinstance(part, dict) for name in QUANTIZATION_KEYS):
        if found := part.get(name):
            if not isinstance(found, dict):
                raise BridgeError(f"{path}: {name} is no table but {found!r}")
            return found
    return None


# The second is how older compressed-tensors checkpoints spell it.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def _decoding(folder: FolderSource, config: Mapping[str, Any], source: "HFSource") -> "Decoding":
    from megatron.bridge.conversion.low_bit import compressed_tensors, fp8, mxfp4

    methods: dict[Any, Callable[..., Decoding]] = {
        "fp8": fp8.decoding,
        "mxfp4": mxfp4.decoding,
        "compressed-tensors": compressed_tensors.decoding,
    }
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in methods:
        raise BridgeError(
            f"{source.path_or_id} holds weights quantised by {method!r} (quantization_config in config.json); only "
            f"{', '.join(methods)} are read. Convert the original checkpoint, or load this one in "
            "transformers, call model.dequantize() and save_pretrained() to a new folder"
        )
    try:
        return methods[method](folder, config, source.path_or_id)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BridgeError(
            f"{source.path_or_id}: quantization_config in config.json cannot be understood "
            f"({type(error).__name__}: {error}): {dict(config)}; fetch config.json again"
        ) from error


def _refuse_undecoded(weights: StoredWeights, source: "HFSource") -> None:
    """Without their scales, numbers in few bits would be taken for values."""
    small = [
        name
        for name, dtype in weights.dtypes.items()
        if (dtype.itemsize < 2 if dtype.is_floating_point else name.endswith(".weight"))
    ]
    if small:
        raise BridgeError(
            f"{source.path_or_id} holds weights in few bits ({', '.join(small[:3])}) for which quantization_config in "
            "its config.json gives no scales; fetch config.json and the weights again"
        )
