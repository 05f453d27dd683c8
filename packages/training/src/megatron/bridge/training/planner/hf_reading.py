"""A model's sizes from `config.json`, through its family's bridge, without importing transformers or torch.

What `config.json` leaves out has the default of transformers' configuration class, which is read from its source.
"""

import ast
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.training.planner.shape import ModelShape, shape_of


def shape_of_hf(values: Mapping[str, Any]) -> ModelShape:
    """The sizes of the model that `config.json` describes.

    Raises:
        BridgeError: no bridge serves it, or it is not a decoder that can be planned.
    """
    names = values.get("architectures") or []
    if len(names) != 1:
        raise BridgeError(f"config.json must name one architecture; it names {names}")
    family = MODEL_BRIDGES[names[0]]
    if not _is_plain_decoder(family):
        raise BridgeError(
            f"{names[0]} cannot be planned: GPT models can, dense and with experts; leave the planner out"
        )
    light = type(f"Light{family.__name__}", (_Light, family), {})
    try:
        return shape_of(light(_Config(values)).provider_bridge())
    except AttributeError as error:
        raise BridgeError(
            f"config.json of {names[0]} lacks {error.name!r}; add it, as transformers saves it"
        ) from error


def _is_plain_decoder(family: type) -> bool:
    """Whether its provider is made as `DenseBridge` makes it: its fields are then all there is to know."""
    if not issubclass(family, DenseBridge) or family.language_prefix:
        return False
    maker = next(each for each in family.__mro__ if "provider_bridge" in vars(each))
    return maker.__module__.removeprefix("megatron.bridge.models.families.") in ("dense", "moe", "prediction")


def with_defaults(values: Mapping[str, Any]) -> Any:
    """`config.json`, or a part of it, as an object that has the defaults of its class too."""
    return _Config(values)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a local folder, or of a hub id.

    Raises:
        BridgeError: there is none.
    """
    path = Path(folder) / "config.json" if Path(folder).is_dir() else _from_hub(str(folder))
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BridgeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BridgeError(f"{path} is no model configuration")
    return content


def _from_hub(name: str) -> Path:
    from megatron.bridge.conversion.hf import HFSource

    return Path(HFSource(name).folder) / "config.json"


class ProviderFields:
    """Stands for a provider where only its fields are asked for."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def replace(self, **changes: Any) -> "ProviderFields":
        """The same with some fields changed, as providers have it."""
        return ProviderFields(**{**vars(self), **changes})


class _Light:
    """A family's bridge that leaves out what has no size, and makes fields instead of a provider."""

    hf_config: Any

    def provider_class(self) -> Any:
        from megatron.bridge.models.families.latent import LatentAttentionBridge

        latent = isinstance(self, LatentAttentionBridge)
        return functools.partial(ProviderFields, multi_latent_attention=latent)

    def activation_function(self) -> Any:
        return None

    def rope_fields(self) -> dict[str, Any]:
        # Learned positions are weights. How rotary ones turn is not, and files may leave it out.
        try:
            fields = super().rope_fields()  # type: ignore[misc]
        except (BridgeError, AttributeError):
            return {}
        return {name: value for name, value in fields.items() if name == "position_embedding_type"}

    def windows(self) -> list[Any]:
        return []


class _Config:
    """`config.json` with the defaults of its class, and the other names that the class has for its fields."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        defaults, self._other_names = _class_defaults(str(values.get("model_type")))
        # Files and classes may have either of two names of a field.
        for each in (defaults, values):
            vars(self).update({self._other_names.get(name, name): value for name, value in each.items()})

    def __getattr__(self, name: str) -> Any:
        other = vars(self).get("_other_names", {}).get(name)
        if other is None:
            raise AttributeError(name, name=name, obj=self)
        return getattr(self, other)


@functools.cache
def _class_defaults(model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What transformers' configuration class of this type has by default, and its `attribute_map`."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise BridgeError("transformers is not installed, and what config.json leaves out is written there")
    models = Path(spec.submodule_search_locations[0]) / "models"
    words = model_type.split("_")  # of `emu3_text_model` the class stands beside that of `emu3`
    for folder in ("_".join(words[:count]) for count in range(len(words), 0, -1)):
        source = models / folder / f"configuration_{folder}.py"
        if source.is_file():
            for node in ast.parse(source.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef) and _plain_values(node).get("model_type") == model_type:
                    values = _plain_values(node)
                    return values, values.pop("attribute_map", {})
    return {}, {}


def _plain_values(node: ast.ClassDef) -> dict[str, Any]:
    """The class attributes whose values are written out."""
    found = {"tie_word_embeddings": True}
    for each in node.body:
        target = (
            each.target
            if isinstance(each, ast.AnnAssign)
            else each.targets[0]
            if isinstance(each, ast.Assign)
            else None
        )
        value = getattr(each, "value", None)
        if isinstance(target, ast.Name) and value is not None:
            try:
                found[target.id] = ast.literal_eval(_default(value))
            except ValueError:
                continue
    return found


def _default(value: ast.expr) -> ast.expr:
    """`interval(min=0)(default=0.02)` is 0.02."""
    keywords = value.keywords if isinstance(value, ast.Call) else ()
    return next((each.value for each in keywords if each.arg == "default"), value)
