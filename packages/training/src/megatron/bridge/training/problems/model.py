"""What is wrong with the model itself: its sizes, what it computes again, its precision."""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.problems.layout import model_layout_problems

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


# Modules whose outputs Megatron-Core gives up by a means that asks Transformer Engine for its state (0.19).
_RECOMPUTED_BY_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")


LOW_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}


def model_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What Megatron-Core would refuse when it builds the model, and what it would not."""
    model = cfg.model
    try:
        model.transformer_config()
    except BridgeError as error:
        yield f"model: {error}"
    yield from model_layout_problems(model)
    yield from _recompute(model)
    dtype = _dtype_name(model)
    for flag, name in LOW_PRECISION.items():
        if (dtype == name) != bool(getattr(model, flag)):
            yield f"model.{flag}={getattr(model, flag)} and model.params_dtype={dtype} contradict each other; set both"


def _recompute(model: Any) -> Iterator[str]:
    named = set(model.recompute_modules or ()) if model.recompute_granularity == "selective" else set()
    if importlib.util.find_spec("transformer_engine") is None:
        for name in sorted(named.intersection(_RECOMPUTED_BY_ENGINE)):
            yield (
                f"model.recompute_modules names {name!r}, which Megatron-Core computes again only where Transformer "
                "Engine is installed; leave it out, or take recompute_granularity=full"
            )


def _dtype_name(model: Any) -> str:
    return str(getattr(model, "params_dtype", "float32")).removeprefix("torch.")
