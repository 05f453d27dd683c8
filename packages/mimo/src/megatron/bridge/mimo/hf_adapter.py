"""The adapters of all modules of a MIMO model, as one folder of Hugging Face peft for transformers' whole model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge import platform
from megatron.bridge.conversion.hf_adapter import AdapterFiles, gathered_adapter
from megatron.bridge.conversion.joined_adapters import joined
from megatron.bridge.conversion.live_weights import ADAPTERS, is_adapter_weight
from megatron.bridge.conversion.peft_names import PeftNames
from megatron.bridge.conversion.rank_agreement import gather, on_every_rank
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.adapters import as_in_table
from megatron.bridge.mimo.conversion import language_half
from megatron.bridge.mimo.module_groups import LANGUAGE

if TYPE_CHECKING:
    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.mimo.model import BridgeMimoModel


def refuse_adapter_export(bridge: "AutoBridge | None", model: "BridgeMimoModel") -> None:
    """Refuse what peft's folder cannot hold: what is trained beside adapters, and adapters that differ too much.

    Collective over the world.

    Args:
        bridge: of the Hugging Face model; None where there is none.
        model: this rank's modules.

    Raises:
        BridgeError: names the module.
    """
    on_every_rank(lambda: _refuse_trained(model), "the adapter cannot be exported")
    if bridge is not None:
        _gathered(bridge, model)


def _refuse_trained(model: "BridgeMimoModel") -> None:
    for name, part in model.parts().items():
        if any(each.requires_grad and not is_adapter_weight(own) for own, each in part.named_parameters()):
            raise BridgeError(
                f"{_called(name)!r} is trained beside the adapters, and peft's folder has no place for it; export the "
                "merged model (save_hf_pretrained), or train the adapters alone"
            )


def save_hf_adapter(bridge: "AutoBridge", model: "BridgeMimoModel", path: Path, *, overwrite: bool = False) -> Path:
    """Write the adapters of all modules as one folder of peft. Collective over the world.

    Args:
        bridge: of the Hugging Face model.
        model: this rank's modules.
        path: the folder to make.
        overwrite: replace a folder of weights that is there.

    Raises:
        BridgeError: there is no adapter, peft cannot hold them, more was trained, or the target cannot be written.
    """
    refuse_adapter_export(None, model)
    files = _gathered(bridge, model)
    writes = platform.rank() == _writer(model)
    on_every_rank(
        lambda: files.write(path, overwrite=overwrite) if writes else None, f"export of the adapter to {path} failed"
    )
    return path


def _writer(model: "BridgeMimoModel") -> int:
    return int(model.module_groups[LANGUAGE].grid.rank_offset)


def _gathered(bridge: "AutoBridge", model: "BridgeMimoModel") -> Any:
    """The adapters of all modules together, on the rank that writes. Collective over the world."""
    what, parts = "export of the adapter failed", []
    for name in _adapted_modules(model):
        source = int(model.module_groups[name].grid.rank_offset)
        own = on_every_rank(partial(_of_module, bridge, model, name), what)
        parts.append((_called(name), _handed_on(own, source, _writer(model))))

    def join() -> Any:
        return joined(parts, PeftNames(bridge.hf_config)) if platform.rank() == _writer(model) else None

    return on_every_rank(join, what)


def _adapted_modules(model: "BridgeMimoModel") -> Sequence[str]:
    """The modules that have adapters on some rank, the language model first. Collective over the world.

    Raises:
        BridgeError: none has.
    """
    here = [name for name, part in model.parts().items() if any(ADAPTERS in each._modules for each in part.modules())]
    found = {name for held in gather(here) for name in held}
    if not found:
        raise BridgeError("the model has no adapters; apply a PEFT method to it first")
    return [LANGUAGE] * (LANGUAGE in found) + sorted(found - {LANGUAGE})


def _of_module(bridge: "AutoBridge", model: "BridgeMimoModel", name: str) -> AdapterFiles | None:
    """One module's adapter, with weights on its first rank; None on a rank without the module."""
    if name not in model.parts():
        return None
    keeps = platform.rank() == model.module_groups[name].grid.rank_offset
    if name == LANGUAGE:
        return gathered_adapter(bridge, language_half(model), None, None, keeps=keeps)
    encoder = as_in_table(model.encoders()[name], bridge)
    return gathered_adapter(encoder.bridge, encoder, None, None, keeps=keeps)


def _handed_on(files: Any, source: int, target: int) -> Any:
    """What the rank `source` has, on the rank `target`."""
    import torch.distributed as dist

    held = [files]
    if source != target and platform.rank() == source:
        dist.send_object_list(held, target)
    elif source != target and platform.rank() == target:
        dist.recv_object_list(held, source)
    return held[0]


def _called(name: str) -> str:
    return "language_model" if name == LANGUAGE else name
