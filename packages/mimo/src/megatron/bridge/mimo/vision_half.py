"""The encoder of a Hugging Face vision-language model: its tower and projector, as transformers wrote them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.encoders import Encoder, Inputs
from megatron.bridge.mimo.vit_settings import MEGATRON, TRANSFORMERS, implementation_problems, vit_problems
from megatron.bridge.models.vision_half import Vision, build_tower, features

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.conversion.auto_bridge import AutoBridge

# Where models like LLaVA say which hidden states of the tower are its features.
_FEATURE_LAYER = "vision_feature_layer"
# In the names of what transformers' models have between tower and language model.
_PROJECTORS = ("projector", "connector", ".merger.")
# What images do to the language model besides giving it features, by the fields of `Vision`.
_TIED = {
    "deepstack": "features that are added between layers",
    "image_blocks": "attention that images decide",
}


@dataclass(kw_only=True)
class VisionHalf(Encoder):
    """Tower and projector of a model of `AutoBridge`; the features have the language model's width.

    Attributes:
        vision: what `megatron.bridge.models` knows of them.
        probe: inputs of one image.
        implementation: of CLIP's and SigLIP's towers: `transformers`, whole on each tensor-parallel rank; or
            `megatron`, Megatron-Core's ViT, which they divide, with checkpoints of its own. The projector is
            transformers' and whole.
    """

    vision: Vision = field(repr=False)
    probe: Mapping[str, Tensor] = field(repr=False)
    implementation: str = TRANSFORMERS

    @classmethod
    def of(cls, bridge: "AutoBridge", *, implementation: str = TRANSFORMERS) -> "VisionHalf":
        """The vision half of a bridge's model.

        Args:
            bridge: of the model.
            implementation: of its tower.

        Raises:
            BridgeError: the model has none, or one that gives the language model more than features at its first layer.
        """
        family: Any = bridge.model_bridge
        architecture = bridge.hf_config.architectures[0]
        if not hasattr(family, "vision"):
            raise BridgeError(f"{architecture} has no vision half; give MimoProvider an encoder of its own")
        vision: Vision = family.vision()
        for what in (text for name, text in _TIED.items() if getattr(vision, name)):
            raise BridgeError(
                f"{architecture} has {what}, which modules of their own layouts cannot hand over; train it as one "
                "model (AutoBridge.to_megatron_provider)"
            )
        probe = family.probe_images(1, torch.Generator().manual_seed(0))
        token = vision.token_id(vision.modalities[0])
        return cls(token_id=token, vision=vision, probe=probe, implementation=implementation)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.vision.input_names(self.vision.modalities[0]))

    @property
    def width(self) -> int:
        return int(self.vision.hf_config.get_text_config().hidden_size)

    @property
    def projects(self) -> bool:
        return True

    def build(self, config: "TransformerConfig", *, initialized: bool) -> torch.nn.Module:
        module: torch.nn.Module = build_tower(self.vision, config.params_dtype, initialized=initialized)
        return module

    def problems(self, tensor_parallel: int) -> Iterator[str]:
        yield from implementation_problems(self.implementation)
        if self.implementation == MEGATRON:
            whole = self.vision.hf_config
            layer = getattr(whole, _FEATURE_LAYER, None)
            yield from vit_problems(whole.vision_config, layer, tensor_parallel)

    def build_on(
        self, config: "TransformerConfig", groups: "ProcessGroupCollection", *, initialized: bool
    ) -> torch.nn.Module:
        if self.implementation == TRANSFORMERS:
            return super().build_on(config, groups, initialized=initialized)
        from megatron.bridge.mimo.vit import build_vit

        whole = self.vision.hf_config
        around = copy.deepcopy(whole)
        around.vision_config.num_hidden_layers = 0
        module: Any = build_tower(replace(self.vision, hf_config=around), config.params_dtype, initialized=initialized)
        layer = getattr(whole, _FEATURE_LAYER)
        module.vision_tower = build_vit(whole.vision_config, layer, config, groups, initialized=initialized)
        return module

    def encode(self, module: torch.nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        (found,) = features(module, self.vision, inputs)
        return found.images

    @property
    def _grid(self) -> str | None:
        """The input that has the sizes of every image [images, 3], where an image's patches are rows of the others."""
        return next((name for name in self.input_names if name.endswith("_grid_thw")), None)

    def count(self, inputs: Inputs) -> int:
        return super().count(inputs) if self._grid is None else len(inputs.get(self._grid, ()))

    def take(self, inputs: Inputs, start: int, stop: int) -> Inputs:
        grid = self._grid
        if grid is None:
            return super().take(inputs, start, stop)
        patches = inputs[grid].prod(1)
        rows = slice(int(patches[:start].sum()), int(patches[:stop].sum()))
        return {name: value[start:stop] if name == grid else value[rows] for name, value in inputs.items()}

    @property
    def decides_positions(self) -> bool:
        return self.vision.grid_positions

    def sizes(self, inputs: Inputs) -> Sequence[int] | None:
        if self._grid is None or not self.count(inputs):
            return None
        merged = int(self.vision.hf_config.vision_config.spatial_merge_size) ** 2
        return [int(patches) // merged for patches in inputs[self._grid].prod(1)]

    def positions(self, tokens: Tensor, inputs: Inputs) -> Tensor:
        """In time, height and width, as transformers counts them.

        Raises:
            BridgeError: there are tokens of what this encoder does not take.
        """
        for other in self.vision.modalities[1:]:
            for sample in (tokens == self.vision.token_id(other)).any(1).nonzero()[:1]:
                raise BridgeError(
                    f"sample {int(sample)} has {other.name} tokens (id {self.vision.token_id(other)}), and modules of "
                    f"their own layouts take {self.vision.modalities[0].name}s alone; train on {other.name}s with one "
                    "model (AutoBridge.to_megatron_provider)"
                )
        if not self.count(inputs):
            return torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
        return self.vision.grids(tokens, inputs)

    def is_projector(self, name: str) -> bool:
        return any(each in name for each in _PROJECTORS)

    def ghost(self) -> Inputs:
        return self.probe
