"""Verification: the two sides compared, weight by weight and logit by logit, with the figures to show for it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.auto_bridge import AutoBridge
from megatron.bridge.conversion.hf_config import read_config
from megatron.bridge.conversion.live_weights import as_chunks
from megatron.bridge.conversion.transforms import whole
from megatron.bridge.conversion.weight_source import QUANTIZATION_KEYS, quantization_config
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    import torch

    from megatron.bridge.conversion.live import Model

# Largest |difference| / largest |reference| that counts as the same function, by parameter dtype. In fp32 it leaves
# room for another order of summation; bf16 and fp16 have 8 and 11 bits.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class VerificationError(BridgeError):
    """The two sides differ."""


@dataclass(frozen=True)
class Certificate:
    """What was compared and what came out.

    Args:
        model: the Hugging Face folder.
        megatron: the checkpoint it was compared with; None for a model built from the folder itself.
        weights_differing: names of weights that differ in a bit, in shape or dtype, or stand on one side only.
        digests: SHA-256 over names, dtypes, shapes and bytes of the compared weights in order, of either side.
        logit_difference: max|ours - reference| / max|reference| over all positions and tokens of the vocabulary.
        tokens_compared: positions whose logits were compared.
        low_bit: how the folder's weights are quantised; both sides then had the weights that they stand for.
    """

    model: str
    architecture: str
    layout: Mapping[str, int]
    layer_spec: str | None
    dtype: str
    weights_compared: int
    weights_differing: tuple[str, ...]
    logit_difference: float
    logit_tolerance: float
    megatron: str | None = None
    bytes_compared: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)
    tokens_compared: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    low_bit: str | None = None

    @property
    def passed(self) -> bool:
        """Every weight bitwise equal and the logits within tolerance."""
        return not self.weights_differing and self.logit_difference <= self.logit_tolerance

    @property
    def proven(self) -> list[str]:
        """What was found to hold, in words."""
        found = []
        if not self.weights_differing:
            found.append(f"all {self.weights_compared} weights ({self.bytes_compared:,} bytes) are bitwise equal")
        if self.logit_difference <= self.logit_tolerance:
            found.append(
                f"logits of {self.tokens_compared} tokens agree within {self.logit_tolerance:.0e} of the largest"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain values."""
        return {**asdict(self), "passed": self.passed, "proven": self.proven}

    def refuse_failure(self) -> None:
        """Raise when the two sides differ.

        Raises:
            VerificationError: names the weights, or gives the logits' difference.
        """
        if self.weights_differing:
            named = ", ".join(self.weights_differing[:8])
            raise VerificationError(f"{len(self.weights_differing)} of {self.weights_compared} weights differ: {named}")
        if not self.passed:
            raise VerificationError(
                f"logits differ by {self.logit_difference:.2e} relative to the largest; "
                f"at most {self.logit_tolerance:.0e} was allowed ({self.dtype})"
            )


def reference_model(folder: Path, dtype: "torch.dtype", decoded: "Mapping[str, torch.Tensor] | None" = None) -> Any:
    """transformers' own model of a folder, on this process's device.

    Args:
        folder: the model.
        dtype: to compute in.
        decoded: its weights in full precision, where the folder holds them in few bits: to read those, transformers
            needs packages of its own for each format.
    """
    from transformers.utils.logging import disable_progress_bar

    from megatron.bridge import platform
    from megatron.bridge.conversion.reference import model_class

    disable_progress_bar()
    config = read_config(folder)
    if decoded is None:
        model = model_class(config).from_pretrained(str(folder), dtype=dtype)
    else:
        for name in QUANTIZATION_KEYS:
            vars(config).pop(name, None)
        model = model_class(config).from_pretrained(None, config=config, state_dict=dict(decoded), dtype=dtype)
    return model.to(platform.device()).eval()


def relative_difference(ours: "torch.Tensor", reference: "torch.Tensor") -> float:
    """max|ours - reference| / max|reference|; infinite when either holds a value that is not finite."""
    if not (ours.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return float((ours - reference).abs().max() / reference.abs().max())


def verify(
    folder: Path,
    model: "Model | None" = None,
    megatron_path: Path | None = None,
    layer_spec: str | None = None,
    **layout: int,
) -> Certificate:
    """Compare a Hugging Face folder with its Megatron counterpart. Collective.

    Args:
        folder: the Hugging Face side.
        model: the Megatron side, already built; None builds it from `megatron_path`, or from the folder itself.
        megatron_path: a Megatron checkpoint to compare with.
        layer_spec: layer spec to build with; None takes the machine's default.
        layout: provider fields, e.g. `tensor_model_parallel_size=2`.
    """
    from megatron.bridge import platform
    from megatron.bridge.conversion.logits import megatron_logits
    from megatron.bridge.conversion.probes import probe
    from megatron.bridge.conversion.reference import logits_of

    bridge = AutoBridge.from_hf_pretrained(folder)
    if model is None:
        options: dict[str, Any] = {**layout, **({"layer_spec": layer_spec} if layer_spec else {})}
        if megatron_path is None:
            model = bridge.to_megatron_model(**options)
        else:
            model = bridge.load_megatron_model(megatron_path, **options)
    weights = _compare_weights(bridge, model)
    quantization = quantization_config(bridge.source)  # type: ignore[arg-type]
    reference = reference_model(folder, weights.dtype, None if quantization is None else _decoded(bridge))
    given = probe(bridge.model_bridge, reference).to(platform.device())
    expected = logits_of(reference, given.tokens, given.inputs)
    ours = megatron_logits(model, given.tokens, given.inputs)[..., : expected.shape[-1]]
    difference = relative_difference(ours, expected)
    name = str(weights.dtype).removeprefix("torch.")
    return Certificate(
        model=str(folder),
        architecture=bridge.hf_config.architectures[0],
        layout=dict(layout),
        layer_spec=getattr(as_chunks(model)[0], "layer_spec", None),
        dtype=name,
        megatron=None if megatron_path is None else str(megatron_path),
        weights_compared=weights.count,
        bytes_compared=weights.nbytes,
        weights_differing=tuple(weights.differing),
        digests={"hugging_face": weights.theirs.hexdigest(), "megatron": weights.ours.hexdigest()},
        logit_difference=difference,
        logit_tolerance=LOGIT_TOLERANCE[name],
        tokens_compared=given.tokens.numel(),
        versions=_versions(),
        low_bit=None if quantization is None else str(quantization["quant_method"]),
    )


def _decoded(bridge: AutoBridge) -> "dict[str, torch.Tensor]":
    source = bridge.stored_weights
    return {name: source.read(name, whole(shape)) for name, shape in source.shapes.items()}


@dataclass
class _Comparison:
    """The weights of two sides, one after another. Bitwise; dtype and shape included."""

    dtype: "torch.dtype"
    count: int = 0
    nbytes: int = 0
    differing: list[str] = field(default_factory=list)
    theirs: Any = field(default_factory=hashlib.sha256)
    ours: Any = field(default_factory=hashlib.sha256)

    def add(self, name: str, ours: "torch.Tensor", theirs: "torch.Tensor | None", *, digest: bool) -> None:
        """Compare a weight; `digest` sums both up (one rank does: it takes longer than the comparison)."""
        self.count += 1
        self.nbytes += ours.nbytes
        if theirs is None or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not _same_bits(ours, theirs):
            self.differing.append(name)
        for side, tensor in ((self.ours, ours), (self.theirs, theirs)):
            if digest and tensor is not None:
                side.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                side.update(_bits(tensor).numpy().data)


def _bits(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same_bits(one: "torch.Tensor", two: "torch.Tensor") -> bool:
    return bool(_bits(one).equal(_bits(two)))


def _compare_weights(bridge: AutoBridge, model: "Model") -> _Comparison:
    import torch

    from megatron.bridge import platform

    source = bridge.stored_weights
    result, seen = _Comparison(torch.float32), set()
    for name, tensor in bridge.export_hf_weights(model, cpu=True):
        seen.add(name)
        if tensor.is_floating_point():
            result.dtype = tensor.dtype
        stored = source.read(name, whole(source.shapes[name])) if name in source.shapes else None
        result.add(name, tensor, stored, digest=platform.is_rank_zero())
    table = bridge.weight_table()
    tied = {tie.name for tie in table.tied}
    result.differing += [
        name for name in source.shapes if name not in seen and name not in tied and not table.ignores(name)
    ]
    return result


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "megatron-core", "transformers", "megatron-bridge-conversion")}
