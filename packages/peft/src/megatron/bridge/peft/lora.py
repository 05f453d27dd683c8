"""LoRA (arXiv:2106.09685): a product of two narrow matrices is learnt beside each target layer's frozen weight."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.layer_method import LayerMethod
from megatron.bridge.peft.targets import matches_any

if TYPE_CHECKING:
    from megatron.bridge.peft.adapter import Adapter, Place

# Of attention and MLP, experts included.
LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(kw_only=True)
class LoRA(LayerMethod):
    """Learn `scale * B A` beside the weights of the target layers: linear ones, embeddings, output layers, routers.

    A fused layer (q, k and v; gate and up) has one A, and B for all its parts; `CanonicalLoRA` has one pair for each.

    Attributes:
        target_modules: as in `PEFT`; the linear layers of attention and MLP when not set.
        dim: rank of the product.
        alpha: the product is scaled by `alpha / dim`.
        dropout: share of the inputs (of the outputs) that a training step drops.
        dropout_position: `pre` drops inputs of A as peft does, `post` what is added.
        use_rslora: scale by `alpha / sqrt(dim)` (arXiv:2312.03732).
        lora_plus_ratio: learning rate of B over that of A (LoRA+, arXiv:2402.12354); None for the same.
        init_lora_weights: `kaiming`, `gaussian` and `orthogonal` begin with a product of zero; `pissa` and `olora`
            with the main directions of the weight, which are taken off the output again: the weight itself stays.
        separate_parts: a pair of matrices for each Hugging Face part of a fused layer, or for those named alone.
        shared_parts: target patterns of layers whose parts share an A all the same.
        share_experts: one pair of matrices for all experts of a layer, instead of a pair for each.
        rank_pattern, alpha_pattern: another rank, another alpha for layers by target pattern.
        seed: of the initial values; the same seed gives the same adapter at any parallel layout.
        lora_rank, lora_alpha, lora_dropout: other names of `dim`, `alpha` and `dropout`.
    """

    target_modules: list[str] = field(default_factory=lambda: list(LINEAR_LAYERS))
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    use_rslora: bool = False
    lora_plus_ratio: float | None = None
    init_lora_weights: str = "kaiming"
    separate_parts: bool = False
    shared_parts: list[str] = field(default_factory=list)
    share_experts: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    seed: int = 1234
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None

    def __post_init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        for name, other in (("dim", "lora_rank"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
            if (value := getattr(self, other)) is not None:
                setattr(self, name, value)
                setattr(self, other, None)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        ranks = {"dim": self.dim} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for where, rank in ranks.items():
            if rank < 1:
                yield f"{where}={rank} must be at least 1; leave a layer out by exclude_modules"
        if self.alpha <= 0:
            yield f"alpha={self.alpha} must be greater than 0"
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must lie in [0, 1)"
        if self.dropout_position not in ("pre", "post"):
            yield f"dropout_position={self.dropout_position!r} is neither 'pre' nor 'post'"
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            yield f"lora_plus_ratio={self.lora_plus_ratio} must be greater than 0"
        yield from self._initialisation_problems()

    def _initialisation_problems(self) -> Iterator[str]:
        known = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
        if self.init_lora_weights not in known:
            yield f"init_lora_weights={self.init_lora_weights!r} is not supported; there are {', '.join(known)}"
        for setting in ("separate_parts", "share_experts"):
            if getattr(self, setting) and self.init_lora_weights in ("pissa", "olora"):
                yield f"init_lora_weights={self.init_lora_weights!r} is not supported with {setting}"
        if self.init_lora_weights == "orthogonal" and self.dim % 2:
            yield f"init_lora_weights='orthogonal' halves the rank, and dim={self.dim} is odd"

    def rank_of(self, place: "Place") -> int:
        """The rank of one layer's adapter."""
        return int(_of_pattern(self.rank_pattern, place, self.dim))

    def scale_of(self, place: "Place", rank: int) -> float:
        """What one layer's product is multiplied by."""
        alpha = _of_pattern(self.alpha_pattern, place, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def takes_parts(self) -> bool:
        return self.separate_parts

    @property
    def serves_plain_layers(self) -> bool:
        return True

    @property
    def shares_experts(self) -> bool:
        return self.share_experts

    def adapter(self, layer: Any, place: "Place") -> "Adapter":
        from megatron.bridge.peft.low_rank import LowRank
        from megatron.bridge.peft.low_rank_parts import LowRankParts

        return LowRankParts(place, layer, self) if self.separates(place) else LowRank(place, layer, self)

    def separates(self, place: "Place") -> bool:
        """Whether the parts of a layer have matrices of their own.

        Raises:
            BridgeError: they should, and nothing tells which parts there are.
        """
        if not self.separate_parts or place.division.kind == "plain":
            return False
        if not place.hf:
            raise BridgeError(
                f"{type(self).__name__}: nothing tells which Hugging Face modules {place.name} holds; build the model "
                "by AutoBridge.to_megatron_provider(), or let parts share their matrices (LoRA)"
            )
        shared = matches_any(self.shared_parts, [place.name]) or all(
            matches_any(self.shared_parts, [module]) for module in place.hf
        )
        return len(place.hf) > 1 and not shared

    def optimizer_overrides(self, lr: float, min_lr: float) -> Mapping[str, Mapping[str, float]]:
        if self.lora_plus_ratio is None:
            return {}
        ratio = self.lora_plus_ratio
        return {"*.lora_B": {"max_lr": lr * ratio, "min_lr": min_lr * ratio}}

    @property
    def hf_name(self) -> str:
        return "LORA"

    def hf_config(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        ranks = {module: own["rank"] for module, own in settings.items()}
        alphas = {module: self._alpha(own["scale"], own["rank"]) for module, own in settings.items()}
        rank, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0]
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout if self.dropout_position == "pre" else 0.0,
            "use_rslora": self.use_rslora,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
            "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        }

    def _alpha(self, scale: float, rank: int) -> float:
        """The alpha that gives this scale at this rank; a whole number as such."""
        alpha = scale * (math.sqrt(rank) if self.use_rslora else rank)
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _of_pattern(patterns: Mapping[str, float], place: "Place", otherwise: float) -> float:
    for pattern, value in patterns.items():
        if matches_any([pattern], [place.name, *place.hf]):
            return value
    return otherwise
