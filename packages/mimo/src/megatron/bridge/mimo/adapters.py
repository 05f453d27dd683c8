"""PEFT of a MIMO model: a method adapts the language model, and all else stays but for the encoders that are named."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.conversion.hf_adapter import gathered_adapter
from megatron.bridge.conversion.rank_agreement import on_every_rank
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.conversion import language_half
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.mimo.module_settings import PROJECTOR

if TYPE_CHECKING:
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.mimo.model import BridgeMimoModel


def adapt_language(method: Any, model: "BridgeMimoModel", trained: Collection[str] = ()) -> None:
    """Apply a PEFT method to the language model, before modules are wrapped. Collective over its ranks.

    Args:
        method: a `megatron.bridge.peft.PEFT`.
        model: this rank's modules.
        trained: encoders that are trained beside the adapters, or their projectors (`images.projector`).

    Raises:
        BridgeError: the method is refused, or changed nothing.
    """
    for name, encoder in model.encoders().items():
        for own, weight in encoder.named_parameters():
            stays = name not in trained and not (encoder.is_projector(own) and name + PROJECTOR in trained)
            weight.requires_grad_(weight.requires_grad and not stays)
    half = language_half(model)
    if half is not None:
        half.bridge = getattr(model, "bridge", None)
        (bound,) = method([half], training=True)
        model.wrap({LANGUAGE: bound.inner})


def refuse_trained_encoders(model: "BridgeMimoModel") -> None:
    """Refuse to write an adapter of a model of which more was trained. Collective over the world.

    Raises:
        BridgeError: names the encoder.
    """

    def look() -> None:
        for name, encoder in model.encoders().items():
            if any(each.requires_grad for each in encoder.parameters()):
                raise BridgeError(
                    f"{name!r} is trained beside the adapters, and peft's folder has no place for it; export the "
                    "merged model (save_hf_pretrained), or train the adapters alone"
                )

    on_every_rank(look, "the adapter cannot be exported")


def save_hf_adapter(bridge: "AutoBridge", model: "BridgeMimoModel", path: Path, *, overwrite: bool = False) -> Path:
    """Write the language model's adapter as peft's folder, for transformers' whole model. Collective over the world.

    Args:
        bridge: of the Hugging Face model.
        model: this rank's modules.
        path: the folder to make.
        overwrite: replace a folder of weights that is there.

    Raises:
        BridgeError: there is no adapter, peft cannot hold it, encoders were trained too, or the target cannot be
            written.
    """
    what = f"export of the adapter to {path} failed"
    refuse_trained_encoders(model)
    writes = platform.rank() == model.module_groups[LANGUAGE].grid.rank_offset
    half = language_half(model)

    def gather() -> Any:
        return None if half is None else gathered_adapter(bridge, half, None, None, keeps=writes)

    files = on_every_rank(gather, what)
    on_every_rank(lambda: files.write(path, overwrite=overwrite) if writes else None, what)
    return path
