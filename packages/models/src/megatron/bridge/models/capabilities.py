"""The capability record: what `just zoo` has proven of each architecture, and what a layout lacks to be among it.

The record is data beside this file, generated and never written by hand. Reading it imports nothing heavy.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError

RECORD = Path(__file__).with_name("capabilities.json")
FORMAT = 1

_log = logging.getLogger(__name__)

# Provider field -> how a kind of parallelism is called.
_KINDS = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "virtual_pipeline_model_parallel_size": "virtual pipeline",
    "context_parallel_size": "context",
    "expert_model_parallel_size": "expert",
}


@dataclass(frozen=True)
class Capability:
    """What was proven of one architecture, on tiny random models in float32.

    Attributes:
        cases: the configurations that were tried; each holds at every layout of `layouts`.
        layouts: layout -> largest difference of a logit from transformers', relative to the largest logit. Every weight
            came back bit for bit.
        unproven: layout -> why it is not among them.
        peft: method -> what was proven of it, or why it does not apply.
        low_bit: format -> what was proven of a checkpoint stored in it, or why it is not.
        mtp: whether multi-token prediction was proven besides.
        layer_spec: layer spec of the proof.
        date: of the proof, YYYY-MM-DD.
        versions: of torch, megatron-core and transformers.
    """

    cases: tuple[str, ...]
    layouts: Mapping[str, float]
    unproven: Mapping[str, str] = field(default_factory=dict)
    peft: Mapping[str, str] = field(default_factory=dict)
    low_bit: Mapping[str, str] = field(default_factory=dict)
    mtp: bool = False
    layer_spec: str = "torch"
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The largest relative difference of the logits at any proven layout."""
        return max(self.layouts.values(), default=float("nan"))


@dataclass(frozen=True)
class Record:
    """Capabilities by architecture, and the provider fields of the layouts that they name."""

    layouts: Mapping[str, Mapping[str, Any]]
    architectures: Mapping[str, Capability]

    def to_text(self) -> str:
        """The record as its file holds it."""
        return (
            json.dumps(
                {
                    "format": FORMAT,
                    "layouts": self.layouts,
                    "architectures": {name: asdict(self.architectures[name]) for name in sorted(self.architectures)},
                },
                indent=1,
            )
            + "\n"
        )


def read_record(path: Path = RECORD) -> Record:
    """The record in a file.

    Raises:
        BridgeError: it cannot be read, or is of another format.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise BridgeError(f"{path} is of format {held['format']}, and this reads {FORMAT}; make it anew: just zoo")
        architectures = {
            name: Capability(**{**values, "cases": tuple(values["cases"])})
            for name, values in held["architectures"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BridgeError(f"the capability record {path} cannot be read ({error!r}); make it anew: just zoo") from error
    return Record(held["layouts"], architectures)


@cache
def shipped_record() -> Record:
    """The record that this package ships."""
    return read_record()


def kinds(fields: Mapping[str, Any]) -> frozenset[str]:
    """The kinds of parallelism that a layout combines; sizes other than those tried run the same code."""
    found = {kind for name, kind in _KINDS.items() if (fields.get(name) or 1) > 1}
    expert_tensor = fields.get("expert_tensor_parallel_size")
    if expert_tensor is not None and expert_tensor != (fields.get("tensor_model_parallel_size") or 1):
        found.add("expert tensor")
    return frozenset(found | ({"sequence"} if fields.get("sequence_parallel") else set()))


def missing_proof(architecture: str, fields: Mapping[str, Any], layer_spec: str | None = None) -> str | None:
    """What the shipped record lacks for a model at a layout, in one line; None when it is in the record.

    Args:
        architecture: as `config.json` names it.
        fields: provider fields of the layout.
        layer_spec: what the model is built with, or None not to ask.
    """
    held = shipped_record()
    wanted = kinds(fields)
    told = " x ".join(sorted(wanted)) + " parallelism" if wanted else "one rank"
    capability = held.architectures.get(architecture)
    if capability is None:
        return f"{architecture} is not in the capability record: no layout of it has been proven there"
    if layer_spec not in (None, capability.layer_spec):
        return f"{architecture} with layer spec {layer_spec!r} is not in the record, only {capability.layer_spec!r}"
    if any(kinds(held.layouts[name]) == wanted for name in capability.layouts):
        return None
    return f"{architecture} at {told} is not in the capability record (proven: {', '.join(capability.layouts)})"


@cache
def _tell(notice: str) -> None:
    _log.warning("%s; `megatron-bridge verify` compares weights and logits", notice)


def tell_missing_proof(architecture: str, fields: Mapping[str, Any], layer_spec: str | None = None) -> None:
    """Log what the record lacks for a model, once per process."""
    if notice := missing_proof(architecture, fields, layer_spec):
        _tell(notice)
