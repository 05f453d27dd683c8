"""PEFT by module: one method adapts the language model, others encoders; all else stays, but for what is named."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.live_weights import is_adapter_weight
from megatron.bridge.conversion.rank_agreement import on_every_rank
from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.mimo.module_settings import PROJECTOR
from megatron.bridge.peft import PEFT
from megatron.bridge.peft.layer_method import TOWER, LayerMethod

if TYPE_CHECKING:
    from megatron.bridge.conversion.table import WeightTable
    from megatron.bridge.mimo.encoder_module import EncoderModule
    from megatron.bridge.mimo.model import BridgeMimoModel
    from megatron.bridge.mimo.provider import MimoProvider


def encoder_adapter_problems(provider: "MimoProvider") -> Iterator[str]:
    """What is wrong with the adapters of encoders, apart from the methods' own settings."""
    for name, method in provider.adapters.items():
        where = f"adapters[{name!r}]"
        if name not in provider.encoders:
            yield f"{where}: {_no_encoder(provider, name)}"
        elif not isinstance(method, PEFT):
            yield f"{where}={method!r} is no PEFT method; give an object such as LoRA()"
        elif isinstance(method, LayerMethod) and not method.serves_plain_layers:
            yield f"{where}: {type(method).__name__} has no adapters for the layers of towers; use LoRA or DoRA there"
        elif provider.encoders[name].frozen:
            yield f"{where}: the encoder is frozen, and so would its adapters be; leave frozen out"
        if name in provider.trained_beside_adapters:
            yield (
                f"{where} keeps the encoder's weights, and trained_beside_adapters trains them; keep one of both, or "
                f"name {name + PROJECTOR!r} there"
            )


def _no_encoder(provider: "MimoProvider", name: str) -> str:
    encoder = name.removesuffix(PROJECTOR)
    if name == provider.placement.llm_module_name:
        return "that is the language model, whose method is the run's (peft)"
    if encoder in provider.encoders:
        return f"name the projector's layers in target_modules of adapters[{encoder!r}]"
    return f"no such encoder{did_you_mean(name, provider.encoders)}; there are {', '.join(provider.encoders)}"


def adapt_language(method: Any, model: "BridgeMimoModel", trained: Collection[str] = ()) -> None:
    """Apply a PEFT method to the language model, before modules are wrapped. Collective over its ranks.

    Args:
        method: a `megatron.bridge.peft.PEFT`.
        model: this rank's modules.
        trained: encoders that are trained beside the adapters, or their projectors (`images.projector`).

    Raises:
        BridgeError: the method is refused, or changed nothing.
    """
    from megatron.bridge.mimo.conversion import language_half
    from megatron.bridge.mimo.module_groups import LANGUAGE

    for name, encoder in model.encoders().items():
        for own, weight in encoder.named_parameters():
            stays = name not in trained and not (encoder.is_projector(own) and name + PROJECTOR in trained)
            weight.requires_grad_(weight.requires_grad and not stays)
    half = language_half(model)
    if half is not None:
        half.bridge = getattr(model, "bridge", None)
        (bound,) = method([half], training=True)
        model.wrap({LANGUAGE: bound.inner})


def adapt_encoders(
    methods: Mapping[str, Any], model: "BridgeMimoModel", bridge: Any, trained: Collection[str] = ()
) -> None:
    """Apply a PEFT method to each encoder that has one, before modules are wrapped. Collective over the world.

    Args:
        methods: a `megatron.bridge.peft.PEFT` for each encoder by name.
        model: this rank's modules.
        bridge: of the Hugging Face model that they are of; None for parts put together.
        trained: as of `MimoProvider.trained_beside_adapters`; an adapted encoder's projector may be among them.

    Raises:
        BridgeError: a method is refused or changed nothing, or a projector is adapted and trained.
    """

    def adapt() -> None:
        for name, encoder in model.encoders().items():
            if name in methods:
                _adapt(methods[name], encoder, bridge, trained=name + PROJECTOR in trained)

    on_every_rank(adapt, "adapters of encoders")


def _adapt(method: Any, encoder: "EncoderModule", bridge: Any, *, trained: bool) -> None:
    method([as_in_table(encoder, bridge)], training=True)
    projector = {name: each for name, each in encoder.named_parameters() if encoder.is_projector(name)}
    adapted = [name for name in projector if is_adapter_weight(name)]
    if adapted and (trained or encoder.encoder.frozen_projector):
        other = f"trained_beside_adapters has {encoder.name + PROJECTOR!r}" if trained else "frozen_projector is set"
        raise BridgeError(
            f"adapters[{encoder.name!r}] is on the projector ({adapted[0]}), and {other}; leave the projector's layers "
            "out (exclude_modules), or the other setting"
        )
    for each in projector.values() if trained else ():
        each.requires_grad_(True)


def as_in_table(encoder: "EncoderModule", bridge: Any) -> Any:
    """An encoder as methods and exports take it: by the names of its bridge's weight table, where it has one."""
    from megatron.bridge.mimo.conversion import encoder_half

    chunk: Any = encoder if bridge is None else encoder_half(encoder)
    chunk.bridge = None if bridge is None else _BridgeOfTower(bridge, chunk)
    chunk.pg_collection = encoder.pg_collection
    setattr(chunk, TOWER, True)
    return chunk


class _BridgeOfTower:
    """A bridge whose table knows the layers of a tower that is Megatron-Core's; all else is the bridge's own.

    Args:
        bridge: of the whole model.
        half: the encoder, by the table's names.
    """

    def __init__(self, bridge: Any, half: Any) -> None:
        from megatron.bridge.mimo.vit import with_vit_rules

        self._bridge, self._table = bridge, with_vit_rules(bridge.weight_table(), half)

    def weight_table(self) -> "WeightTable":
        """Of the whole model."""
        return self._table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bridge, name)
