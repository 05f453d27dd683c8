"""The half of a vision-language model that is transformers' own module: tower and projector."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.bridge.errors import BridgeError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Modality:
    """What a model sees besides text.

    Args:
        name: in messages.
        token: configuration field with the id of the token that stands for one feature.
        method: of transformers' model, from inputs to features.
        token_type: what `mm_token_type_ids` calls such tokens.
    """

    name: str
    token: str
    method: str
    token_type: int


IMAGE = Modality("image", "image_token_id", "get_image_features", 1)
VIDEO = Modality("video", "video_token_id", "get_video_features", 2)


@dataclass(frozen=True)
class Vision:
    """What a provider knows of its model's vision half.

    Args:
        hf_config: transformers' configuration of the whole model.
        language: the language model's name inside transformers' model.
        modalities: what the model sees.
        grid_positions: tokens have positions in time, height and width (M-RoPE, arXiv:2409.12191).
        image_blocks: tokens of an image attend to each other in both directions.
        deepstack: so many of the first layers have features of their own added to their output (arXiv:2406.04334).
    """

    hf_config: "PretrainedConfig"
    language: str = "language_model"
    modalities: tuple[Modality, ...] = (IMAGE,)
    grid_positions: bool = False
    image_blocks: bool = False
    deepstack: int = 0

    def token_id(self, modality: Modality) -> int:
        """The token that stands for a feature of this modality."""
        return int(getattr(self.hf_config, modality.token))

    def token_types(self, tokens: Tensor) -> Tensor:
        """0 for text, else the modality's `token_type`, of the shape of `tokens`."""
        types = torch.zeros_like(tokens)
        for modality in self.modalities:
            types.masked_fill_(tokens == self.token_id(modality), modality.token_type)
        return types

    @cached_property
    def model_class(self) -> Any:
        """transformers' class of the model without its output layer."""
        from transformers import MODEL_MAPPING

        return MODEL_MAPPING[type(self.hf_config)]

    def input_names(self, modality: Modality) -> list[str]:
        """What the modality's features are made from, as transformers calls it."""
        parameters = inspect.signature(getattr(self.model_class, modality.method)).parameters.values()
        return [each.name for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD]

    @cached_property
    def position_inputs(self) -> frozenset[str]:
        """What positions are worked out from besides the tokens, as transformers calls it."""
        if not self.grid_positions:
            return frozenset()
        return frozenset(inspect.signature(self.model_class.get_rope_index).parameters) - {"self", "input_ids"}

    def grids(self, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Positions [3, batch, sequence] in time, height and width, as transformers counts them."""
        build = self.model_class
        # Positions depend on the configuration only, and later pipeline stages have no tower.
        shell = build.__new__(build)
        nn.Module.__init__(shell)
        shell.config = self.hf_config
        sizes = {name: value for name, value in inputs.items() if name in self.position_inputs}
        positions: Tensor = shell.get_rope_index(tokens, **{**sizes, "mm_token_type_ids": self.token_types(tokens)})[0]
        return positions


def build_tower(vision: Vision, dtype: torch.dtype, *, initialized: bool) -> Any:
    """Tower and projector with transformers' names: its model of the configuration, without the language model.

    Args:
        vision: what to build.
        dtype: of the parameters.
        initialized: draw random weights; otherwise they hold anything until they are loaded.
    """
    import contextlib

    from transformers.initialization import no_init_weights

    config = copy.deepcopy(vision.hf_config)
    text = config.get_text_config()
    # The projector needs the language model's width and nothing else of it.
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    with contextlib.nullcontext() if initialized else no_init_weights():
        model = vision.model_class._from_config(config, dtype=dtype)
    delattr(model, vision.language)
    return model


@dataclass(frozen=True)
class Features:
    """What a tower made of one modality's inputs.

    Args:
        modality: of the inputs.
        images: per image (or video) its features [tokens, hidden].
        deepstack: per layer that takes them, features of all images one after another.
    """

    modality: Modality
    images: Sequence[Tensor]
    deepstack: Sequence[Tensor] = ()


def features(tower: Any, vision: Vision, inputs: Mapping[str, Any]) -> list[Features]:
    """Features of every modality that `inputs` has something of.

    Raises:
        BridgeError: an input that the model does not take.
    """
    left, found = dict(inputs), []
    dtype = next(tower.parameters()).dtype
    for modality in vision.modalities:
        names = vision.input_names(modality)
        given = {name: left.pop(name) for name in names if name in left}
        if names[0] in given:
            given[names[0]] = given[names[0]].to(dtype)
            output = getattr(tower, modality.method)(**given, return_dict=True)
            stacked = [torch.cat(tuple(layer)) for layer in getattr(output, "deepstack_features", None) or ()]
            found.append(Features(modality, tuple(output.pooler_output), stacked))
    known = [name for modality in vision.modalities for name in vision.input_names(modality)]
    for name in left.keys() - vision.position_inputs:
        raise BridgeError(f"the model takes no input {name!r}{did_you_mean(name, known)} (besides tokens: {known})")
    return found


def nothing_of(tower: nn.Module) -> Tensor:
    """Zero, made of every weight of the tower: overlapped gradient reduction waits for all, used or not."""
    firsts = [parameter.reshape(-1)[0] for parameter in tower.parameters() if parameter.requires_grad]
    return torch.stack(firsts).sum() * 0 if firsts else torch.zeros(())
