"""A way to divide a model and its batch over ranks."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.planner.shape import ModelShape

type Recompute = Literal["none", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes, and what else of a run decides about memory.

    Attributes:
        tensor, pipeline, virtual, context, expert, expert_tensor: sizes; `virtual` is of stages per rank, 1 for none;
            `expert_tensor` is 1 for experts that no tensor-parallel ranks divide.
        micro_batch: sequences per forward pass.
        recompute: `full` keeps each layer's input and computes the rest again in the backward pass.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"

    @property
    def ranks(self) -> int:
        """Ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context

    def fields(self) -> dict[str, Any]:
        """The provider fields that make it."""
        full = self.recompute == "full"
        return {**self.sizes(), **(_FULL if full else {})}

    def sizes(self) -> dict[str, Any]:
        """The provider fields of the parallel sizes."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual if self.virtual > 1 else None,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
            "sequence_parallel": self.tensor > 1,
        }

    def at(self, shape: ModelShape) -> ModelShape:
        """The model divided so."""
        return shape.replace(**self.sizes())

    def __str__(self) -> str:
        named = {name: getattr(self, field) for name, field in _NAMES.items() if name != "MB"}
        parts = [f"{name}{size}" for name, size in named.items() if size > 1]
        full = ["full recompute"] if self.recompute == "full" else []
        return " ".join([*parts, f"MB{self.micro_batch}", *full])

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """The layout that is written so: `TP4 PP8 VPP5 MB1 full recompute`.

        Raises:
            BridgeError: another word.
        """
        words = text.replace(",", " ").split()
        sizes = [re.fullmatch(r"(TP|PP|VPP|CP|EP|ETP|MB)([1-9]\d*)", word.upper()) for word in words]
        unknown = [
            word for word, size in zip(words, sizes, strict=True) if not size and word not in ("full", "recompute")
        ]
        if unknown:
            raise BridgeError(f"the layout {text!r} has {unknown[0]!r}; write it as 'TP4 PP8 VPP5 CP2 EP8 MB1 full'")
        fields: dict[str, Any] = {_NAMES[size[1]]: int(size[2]) for size in sizes if size}
        return cls(**fields, recompute="full" if "full" in words else "none")


# As people write them.
_NAMES = {
    "TP": "tensor",
    "PP": "pipeline",
    "VPP": "virtual",
    "CP": "context",
    "EP": "expert",
    "ETP": "expert_tensor",
    "MB": "micro_batch",
}
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
