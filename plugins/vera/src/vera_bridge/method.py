"""VeRA (arXiv:2310.11454): two frozen random matrices serve all layers, and two vectors of each layer are learnt."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.layer_method import LayerMethod

if TYPE_CHECKING:
    import torch

    from megatron.bridge.peft.adapter import Adapter, Place


@dataclass(kw_only=True)
class VeRA(LayerMethod):
    """Learn `b * B (d * A x)` beside the target layers: vectors b [outputs] and d [dim] for each Hugging Face part.

    A [dim, inputs] and B [outputs, dim] are as large as the largest layer; smaller ones take their first columns and
    rows. They follow from `seed` alone, at any parallel layout, and are those that peft makes of the same number.

    Attributes:
        target_modules: as in `PEFT`; the linear layers of attention and MLP when not set. Experts take no part.
        dim: rank of the product.
        d_initial: what every d begins with; b begins at zero, so that the model begins as it is.
        dropout: share of the inputs that a training step drops.
        seed: of the random matrices.
        projection_sizes: inputs and outputs that A and B must have, where a file of peft tells them.
    """

    target_modules: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    dim: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    projection_sizes: list[int] | None = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.dim < 1:
            yield f"dim={self.dim} must be at least 1"
        if self.d_initial == 0:
            yield "d_initial=0 never learns: neither vector would have a gradient; the paper takes 0.1"
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must lie in [0, 1)"

    @property
    def takes_parts(self) -> bool:
        return True

    def adapter(self, layer: Any, place: "Place") -> "Adapter":
        from vera_bridge.adapter import Vectors

        division = place.division
        if division.kind in ("vocabulary", "whole") or division.expert or place.name.endswith("output_layer"):
            raise BridgeError(
                f"VeRA is for the linear layers of attention and dense MLPs; leave {place.name} out by exclude_modules"
            )
        return Vectors(place, layer, self)

    def applied(self, chunks: "list[torch.nn.Module]") -> None:
        """Make the shared matrices, now that it is known how large they are. Collective."""
        from vera_bridge.projections import share

        super().applied(chunks)
        share(self, chunks)

    @property
    def hf_name(self) -> str:
        return "VERA"

    def hf_config(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "r": self.dim,
            "projection_prng_key": self.seed,
            "save_projection": False,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "bias": "none",
            "fan_in_fan_out": False,
        }
