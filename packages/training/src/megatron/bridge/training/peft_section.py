"""What `ConfigContainer.peft` changes in a run: how the model is built, what the optimizer sees, what is saved."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import PEFT
from megatron.bridge.training.engine import engine_of

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def peft_problems(cfg: "ConfigContainer") -> Iterator[str]:
    """What is wrong with the section, and with others because of it."""
    methods = engine_of(cfg).methods(cfg)
    for where, method in methods.items():
        if not isinstance(method, PEFT):
            yield f"{where}={method!r} is no PEFT method; give an object such as LoRA(), or a name: peft=lora"
            return
        method.settle()
        yield from (f"{where}: {problem}" for problem in method.problems())
    weights_given = getattr(cfg.model, "loads_weights", False)
    if methods and cfg.checkpoint.pretrained_checkpoint is None and not weights_given:
        yield (
            f"{next(iter(methods))} trains beside weights that stay as they are, and nothing gives them: build the "
            "model by AutoBridge.from_hf_pretrained(...).to_megatron_provider(), or set "
            "checkpoint.pretrained_checkpoint"
        )


def is_adapted(cfg: "ConfigContainer") -> bool:
    """Whether the run trains beside weights that stay as they are, which are then no part of its checkpoints."""
    return bool(engine_of(cfg).methods(cfg))


def apply_peft(cfg: "ConfigContainer", chunks: "list[Any]") -> "list[Any]":
    """Give bare chunks the weights they start from, then the method: what it makes of weights must see these."""
    from megatron.bridge.training.checkpoint import load_weights
    from megatron.bridge.training.hf_side import bridge_of, is_hf_folder, load_hf

    start = cfg.checkpoint.pretrained_checkpoint
    if start is not None and is_hf_folder(start):
        load_hf(cfg, chunks, None)
    elif start is not None:
        load_weights(chunks, None, start)
    # A provider that was written by hand, in a recipe, knows no Hugging Face names; what it starts from does.
    bridge = bridge_of(cfg)
    for chunk in chunks:
        if getattr(chunk, "bridge", None) is None:
            chunk.bridge = bridge
    return engine_of(cfg).adapt(cfg.peft, chunks)


def adapted_notices(cfg: "ConfigContainer") -> list[str]:
    """What each method changed on this rank, in one line; nothing where it had nothing to change."""
    applied = [each for each in engine_of(cfg).methods(cfg).values() if each.was_applied]
    return [str(method.report).splitlines()[0] for method in applied]


def optimizer_overrides(cfg: "ConfigContainer", settings: Any) -> Any:
    """Megatron-Core's overrides per parameter with those of the method; None where it has none.

    Args:
        settings: Megatron-Core's `OptimizerConfig` of the run.
    """
    return None if cfg.peft is None else method_overrides(cfg.peft, settings)


def method_overrides(method: PEFT, settings: Any) -> Any:
    """Megatron-Core's overrides per parameter with those of a method; None where it has none.

    Args:
        method: whose.
        settings: Megatron-Core's `OptimizerConfig` of the run.
    """
    wanted = method.optimizer_overrides(settings.lr, settings.min_lr or 0.0)
    if not wanted:
        return None
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides

    overrides = get_standard_config_overrides(settings)
    return overrides | {ParamKey(name=pattern): dict(values) for pattern, values in wanted.items()}


def trained_part(state: dict[str, Any], chunks: "Sequence[Any]", keys: Sequence[str]) -> dict[str, Any]:
    """A sharded state dict without what a method keeps as it was.

    Args:
        state: of all of the model, by the chunks' keys.
        chunks: unwrapped.
        keys: of the chunks in `state`.
    """
    from megatron.bridge.conversion.live_weights import is_adapter_weight

    kept = {}
    for key, chunk in zip(keys, chunks, strict=True):
        # A model that wraps its modules one by one says by what names they are saved.
        named = getattr(chunk, "saved_parameters", chunk.named_parameters)
        trained = {name for name, each in named() if each.requires_grad}
        kept[key] = {name: value for name, value in state[key].items() if name in trained or is_adapter_weight(name)}
    return state | kept


def fill_trained_part(chunks: "Sequence[Any]", loaded: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Put a loaded state dict of `trained_part` into chunks; the rest stays."""
    for key, chunk in zip(keys, chunks, strict=True):
        # A pipeline stage without adapters has nothing to load.
        outcome = chunk.load_state_dict(loaded.get(key, {}), strict=False)
        if outcome.unexpected_keys:
            raise BridgeError(f"the checkpoint has what the model lacks: {', '.join(outcome.unexpected_keys[:8])}")
