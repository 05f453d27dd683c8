"""An encoder's sizes, from transformers' configuration of a vision tower. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.planner.hf_reading import read_config, with_defaults
from megatron.bridge.training.planner.parameters import model_parameters
from megatron.bridge.training.planner.shape import ModelShape

_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size"),
)


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """A tower of transformer layers over patches, and the MLP that leads to the language model.

    Attributes:
        tower: its layers; its sequence are the patches of one item, its embedding is left out.
        patch_weights: of what turns a patch into a vector.
        hidden_size: of the language model.
        items: in a sample.
        frozen: the tower is not trained; the MLP is.
    """

    tower: ModelShape
    patch_weights: int
    hidden_size: int
    items: float = 1.0
    frozen: bool = False

    @property
    def tower_parameters(self) -> int:
        """Weights of the tower."""
        return model_parameters(self.tower) + self.patch_weights

    @property
    def projector_parameters(self) -> int:
        """Weights of the MLP, without biases."""
        return self.tower.hidden_size * self.hidden_size + self.hidden_size**2

    @property
    def features(self) -> int:
        """That the language model is given of an item."""
        return self.tower.seq_length


def tower_shape(values: Mapping[str, Any], where: str) -> tuple[ModelShape, int]:
    """Layers and patch weights of a vision tower.

    Args:
        values: its configuration, or that of a model with a `vision_config`.
        where: it came from, for messages.

    Raises:
        BridgeError: it lacks sizes of a tower over patches.
    """
    config = with_defaults(values.get("vision_config", values))
    lacking = [name for name in _NEEDED if not isinstance(getattr(config, name, None), int)]
    if lacking:
        raise BridgeError(
            f"{where} is no vision tower over patches that can be planned: it lacks {', '.join(lacking)}; CLIP's and "
            "SigLIP's configurations have them"
        )
    patches = (config.image_size // config.patch_size) ** 2
    shape = ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=0,
        make_vocab_size_divisible_by=1,
        share_embeddings_and_output_weights=True,
        seq_length=patches,
        position_embedding_type="learned_absolute",
        max_position_embeddings=patches,
    )
    channels = getattr(config, "num_channels", 3)
    return shape, channels * config.patch_size**2 * config.hidden_size


def encoder_of_folder(folder: str, hidden_size: int, *, items: float, frozen: bool) -> EncoderShape:
    """The encoder that a Hugging Face folder or hub id describes.

    Raises:
        BridgeError: there is no configuration of a vision tower.
    """
    tower, patch_weights = tower_shape(read_config(folder), folder)
    return EncoderShape(tower=tower, patch_weights=patch_weights, hidden_size=hidden_size, items=items, frozen=frozen)
