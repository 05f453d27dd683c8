"""Weights of a MIMO model, module by module, by the rules of the Hugging Face model that it was made of.

Each module is loaded and exported over its own groups by the executors of `megatron.bridge.conversion`; a rank opens
only what its modules need.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.bridge.conversion.live import WeightSource, load_weights
from megatron.bridge.conversion.live_export import Exporter
from megatron.bridge.conversion.live_weights import unwrap
from megatron.bridge.conversion.rank_agreement import on_every_rank
from megatron.bridge.conversion.save import save_export
from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.module_groups import LANGUAGE
from megatron.bridge.mimo.vit import with_vit_rules

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.bridge.conversion.auto_bridge import AutoBridge
    from megatron.bridge.conversion.transforms import Region, Shape
    from megatron.bridge.mimo.encoder_module import EncoderModule
    from megatron.bridge.mimo.model import BridgeMimoModel

# What the families of `megatron.bridge.models` call the two halves of a vision-language model.
_VISION, _LANGUAGE = "vision", "language_model"


class _Half(torch.nn.Module):
    """One module under the name that it has in the whole model; what is not its own is the module's."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, module)

    @property
    def inner(self) -> torch.nn.Module:
        """The module."""
        return self.get_submodule(self._name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self._name), name)


@dataclass(frozen=True)
class _Part:
    """A source's weights that belong to one module."""

    source: WeightSource
    belongs: Callable[[str], bool]

    @property
    def shapes(self) -> "Mapping[str, Shape]":
        return {name: shape for name, shape in self.source.shapes.items() if self.belongs(name)}

    def read(self, name: str, region: "Region") -> "Tensor":
        return self.source.read(name, region)


def load_hf_weights(
    bridge: "AutoBridge", model: "BridgeMimoModel", weights: "Mapping[str, Tensor] | None" = None
) -> None:
    """Fill every module with its part of a Hugging Face model. Collective over the world.

    Args:
        bridge: of the model.
        model: this rank's modules.
        weights: a state dict instead of the bridge's own files.

    Raises:
        BridgeError: some weight on either side is unaccounted for, on some rank; no module of that rank was touched.
    """
    source, what = bridge._weight_source(weights)
    table = bridge.weight_table(source.shapes)

    def fill() -> None:
        for name, half in _halves(model).items():
            part = _Part(source, _belongs(table, name == LANGUAGE))
            groups = model.module_groups[name].here
            rules = with_vit_rules(_rules(table, name == LANGUAGE), half)
            load_weights(half, rules, part, f"import of {what}, {name!r}", groups=groups)

    on_every_rank(fill, f"import of {what} failed")


class MimoExport:
    """An export of a MIMO model: every module's weights, the encoders' first. Made collectively, over the world.

    Args:
        bridge: of the Hugging Face model.
        model: this rank's modules.

    Attributes:
        hf_shapes, dtypes: of every Hugging Face weight, in order; the same on every rank.

    Raises:
        BridgeError: a weight of the model is unaccounted for.
    """

    def __init__(self, bridge: "AutoBridge", model: "BridgeMimoModel") -> None:
        self._model = model
        table, halves = bridge.weight_table(), _halves(model)
        self._exporters: dict[str, Exporter] = {}
        self._names: dict[str, list[str]] = {}
        self.hf_shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in [*(each for each in model.module_groups if each != LANGUAGE), LANGUAGE]:
            groups = model.module_groups[name].groups
            if name in halves:
                rules = with_vit_rules(_rules(table, name == LANGUAGE), halves[name])
                what = f"export of {name!r}"
                self._exporters[name] = Exporter(halves[name], rules, what, process_groups=groups)
            self._describe(name)

    def weights(self) -> "Iterator[tuple[str, Tensor]]":
        """The weights, whole, in order, on every rank; beside each at most the bytes of the largest. Collective."""
        for name, exporter in ((name, self._exporters.get(name)) for name in self._names):
            own = None if exporter is None else exporter.weights()
            for weight in self._names[name]:
                yield weight, self._handed_on(name, weight, None if own is None else next(own)[1])

    def stream(self, bucket_bytes: int) -> "Iterator[dict[str, Tensor]]":
        """The weights one by one, each as a bucket: modules hand them on singly, whatever `bucket_bytes` allows."""
        for name, weight in self.weights():
            yield {name: weight}

    @property
    def plan(self) -> Any:
        """Low-bit formats are made of one plan; a MIMO model has one for each module.

        Raises:
            BridgeError: always.
        """
        raise BridgeError("a MIMO model is exported in full precision; quantise the exported folder afterwards")

    def _describe(self, name: str) -> None:
        """Tell every rank what the module's first rank will hand on."""
        import torch.distributed as dist

        exporter = self._exporters.get(name)
        told: list[Any] = [None if exporter is None else (exporter.hf_shapes, exporter.dtypes)]
        dist.broadcast_object_list(told, self._model.module_groups[name].grid.rank_offset)
        shapes, dtypes = told[0]
        self._names[name] = list(shapes)
        self.hf_shapes |= shapes
        self.dtypes |= dtypes

    def _handed_on(self, name: str, weight: str, own: "Tensor | None") -> "Tensor":
        """One weight on every rank, from the module's first one where some do not have it."""
        import torch.distributed as dist

        from megatron.bridge.platform import device

        grid = self._model.module_groups[name].grid
        if own is not None and grid.size == dist.get_world_size():
            return own
        shape, dtype = self.hf_shapes[weight], self.dtypes[weight]
        tensor = torch.empty(shape, dtype=dtype, device=device()) if own is None else own.detach().contiguous()
        dist.broadcast(tensor, grid.rank_offset)
        return tensor


def export_hf_weights(bridge: "AutoBridge", model: "BridgeMimoModel") -> "Iterator[tuple[str, Tensor]]":
    """Yield every Hugging Face weight, whole, on every rank: the encoder's, then the language model's. Collective.

    Raises:
        BridgeError: a weight of the model is unaccounted for.
    """
    yield from MimoExport(bridge, model).weights()


def save_hf_pretrained(
    bridge: "AutoBridge", model: "BridgeMimoModel", path: "str | Path", *, overwrite: bool = False
) -> Path:
    """Write the whole model as a complete Hugging Face folder, whatever its placement. Collective.

    Args:
        bridge: of the Hugging Face model.
        model: this rank's modules.
        path: the folder to make.
        overwrite: replace a Hugging Face folder that is there.

    Raises:
        BridgeError: the folder exists or cannot be written, or a weight is unaccounted for; nothing is left behind.
    """
    return save_export(bridge, MimoExport(bridge, model), Path(path), overwrite=overwrite)


def _halves(model: "BridgeMimoModel") -> dict[str, torch.nn.Module]:
    """The modules on this rank as the table names them."""
    language = language_half(model)
    found: dict[str, torch.nn.Module] = {} if language is None else {LANGUAGE: language}
    return {name: encoder_half(each) for name, each in model.encoders().items()} | found


def language_half(model: "BridgeMimoModel") -> Any:
    """The language model, without what wraps it, by the name that it has in the whole model; None on other ranks."""
    return None if model.language_model is None else _Half(_LANGUAGE, unwrap(model.language_model))


def encoder_half(encoder: "EncoderModule") -> Any:
    """An encoder's tower, by the name that it has in the whole model."""
    return _Half(_VISION, encoder.tower)


def _rules(table: WeightTable, language: bool) -> WeightTable:
    """The rules of one half. Ties and ignored weights are the language model's business."""
    rules = tuple(rule for rule in table.rules if rule.megatron.startswith(f"{_LANGUAGE}.") == language)
    return replace(table, rules=rules) if language else replace(table, rules=rules, tied=())


def _belongs(table: WeightTable, language: bool) -> Callable[[str], bool]:
    """Whether a weight belongs to a half; one that nobody knows is the language model's, where it is refused."""
    vision = [rule for rule in table.rules if not rule.megatron.startswith(f"{_LANGUAGE}.")]

    def of_vision(name: str) -> bool:
        return any(rule.below(name, rule.hf_names[0]) is not None or name in rule.hf_names for rule in vision)

    return lambda name: of_vision(name) != language
