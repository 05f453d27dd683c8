"""A VeRA method of what peft says in `adapter_config.json`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft.lora_files import OF_TRAINING, refuse_unknown_features
from vera_bridge.method import VeRA

if TYPE_CHECKING:
    import torch

_VECTOR = ".vera_lambda_b"
_A, _B = "base_model.vera_A", "base_model.vera_B"
_READ = {
    "d_initial",
    "exclude_modules",
    "fan_in_fan_out",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "projection_prng_key",
    "r",
    "save_projection",
    "target_modules",
    "vera_dropout",
}


def vera_from_hf(config: Mapping[str, Any], tensors: "dict[str, torch.Tensor]", adapter_name: str) -> VeRA:
    """The method of a file of peft. Its shared matrices, where it holds them, are compared and taken out of `tensors`.

    Args:
        config: `adapter_config.json`.
        tensors: of the file.
        adapter_name: of the adapters.

    Raises:
        BridgeError: a feature that cannot be represented, or matrices that do not follow from their seed.
    """
    refuse_unknown_features(config, OF_TRAINING | _READ)
    modules = sorted(name.removesuffix(_VECTOR) for name in tensors if name.endswith(_VECTOR))
    if not modules:
        raise BridgeError("the adapter's file holds no VeRA vectors (NAME.vera_lambda_b)")
    return VeRA(
        target_modules=modules,
        adapter_name=adapter_name,
        dim=config["r"],
        dropout=config.get("vera_dropout", 0.0),
        d_initial=config.get("d_initial", 0.1),
        seed=config["projection_prng_key"],
        projection_sizes=_proven_sizes(config, tensors),
    )


def _proven_sizes(config: Mapping[str, Any], tensors: "dict[str, torch.Tensor]") -> list[int] | None:
    """Inputs and outputs of the file's shared matrices; None where it has none."""
    from vera_bridge.projections import projections

    narrowing, expanding = tensors.pop(_A, None), tensors.pop(_B, None)
    if narrowing is None or expanding is None:
        return None
    sizes = [narrowing.shape[1], expanding.shape[0]]
    made = projections(config["r"], sizes[0], sizes[1], config["projection_prng_key"])
    if not all(each.to(held.dtype).equal(held) for each, held in zip(made, (narrowing, expanding), strict=True)):
        raise BridgeError(
            f"the adapter's shared matrices are not those that projection_prng_key={config['projection_prng_key']} "
            "gives, and here they are made from it; merge the adapter in peft (merge_and_unload) and convert the model"
        )
    return sizes
