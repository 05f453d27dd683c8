"""A GPT model that sees: transformers' tower and projector before Megatron-Core's language model."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.gpt_model import BridgeGPTModel
from megatron.bridge.models.vision_half import Features, Vision, build_tower, features, nothing_of

_OF_THE_LANGUAGE_MODEL = frozenset(inspect.signature(GPTModel.forward).parameters)
# What transformers' processors tell about the kinds of tokens; it follows from the tokens.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


class VisionLanguageModel(MegatronModule):
    """Tower -> projector -> language model.

    The first pipeline stage holds tower and projector (`vision`), alike on every tensor-parallel rank. The rest is
    `language_model`, at any layout; whatever is asked of this module and is not its own is asked of that one.

    Args:
        language_model: this stage's.
        vision: what the tower is.
        initialized: draw the tower's random weights.
    """

    def __init__(self, language_model: BridgeGPTModel, vision: Vision, *, initialized: bool) -> None:
        super().__init__(config=language_model.config)
        self.language_model = language_model
        self.seen = vision
        self._added: list[Tensor] = []
        if self.pre_process:
            device = next(language_model.parameters()).device
            with device:
                self.vision = build_tower(vision, self.config.params_dtype, initialized=initialized)
            for index in range(vision.deepstack):
                layer = self.decoder.layers[index]
                layer.register_forward_hook(functools.partial(self._add_deepstack, index))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("language_model"), name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As `nn.Module`; what a tower computes from its configuration (rotary frequencies) keeps its precision."""
        kept = {(module, name): module._buffers[name] for module in self.modules() for name in _computed(module)}
        super()._apply(fn, recurse)
        for (module, name), buffer in kept.items():
            moved = module._buffers[name]
            if moved is not None and buffer is not None and moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return self

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states of the stage before, as Megatron-Core's schedules hand them over."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **inputs: Any) -> Tensor:
        """As `GPTModel.forward`, with images.

        Args:
            input_ids: token ids [batch, sequence], on every pipeline stage, with a token of the image's per feature.
            position_ids: [batch, sequence]; where positions are in time, height and width, [3, batch, sequence] is
                taken as it is and the rest is worked out here.
            attention_mask: as the language model's.
            inputs: `GPTModel.forward`'s, and the tower's by transformers' names (`pixel_values`, ...). The tower's are
                those of the whole batch, in its order.

        Raises:
            BridgeError: images and their places in the tokens do not correspond; the sample is named.
        """
        own = {name: inputs.pop(name) for name in list(inputs) if name in _OF_THE_LANGUAGE_MODEL}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        self._check_token_types(input_ids, inputs)
        self._refuse_packing(own.get("packed_seq_params"))
        self._added = []
        if self.pre_process and own.get("decoder_input") is None:
            own["decoder_input"] = self._embed(input_ids, position_ids, inputs)
        if self.seen.grid_positions and position_ids.dim() == 2:
            position_ids = self._grid_positions(input_ids, position_ids, inputs)
        if self.seen.image_blocks:
            if attention_mask is not None:
                raise BridgeError("this model makes its own attention mask from the image tokens; pass None")
            attention_mask = _blocks(input_ids == self.seen.token_id(self.seen.modalities[0]))
        output: Tensor = self.language_model(input_ids, position_ids, attention_mask, **own)
        return output

    def _check_token_types(self, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        for name in _TOKEN_TYPES:
            given = inputs.pop(name, None)
            if given is not None and not torch.equal(given.long(), self.seen.token_types(input_ids)):
                raise BridgeError(
                    f"{name} disagrees with the tokens: types are those of the placeholder tokens "
                    f"({self._placeholders()}); leave {name} out"
                )

    def _refuse_packing(self, packed: Any) -> None:
        if packed is not None and (self.seen.grid_positions or self.seen.image_blocks):
            raise BridgeError(
                "packed documents are not supported where images give tokens their positions or their attention; "
                "train this model with one document per row"
            )

    def _placeholders(self) -> str:
        return ", ".join(f"{each.name} {self.seen.token_id(each)}" for each in self.seen.modalities)

    def _grid_positions(self, input_ids: Tensor, position_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if not any(name.endswith("_grid_thw") for name in inputs):
            return position_ids.expand(3, *input_ids.shape)
        return self.seen.grids(input_ids, inputs)

    def _embed(self, input_ids: Tensor, position_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The decoder's input [sequence, batch, hidden], with features in the places of their tokens."""
        found = features(self.vision, self.seen, inputs)
        types = self.seen.token_types(input_ids)
        _refuse_misplaced(found, types, self.seen)
        # Placeholders may lie outside the vocabulary, and what they embed to is written over.
        embedded = self.language_model.embedding(input_ids.masked_fill(types > 0, 0), position_ids)
        rows = embedded.transpose(0, 1)
        for each in found:
            places = types == each.modality.token_type
            rows = rows.masked_scatter(places[..., None], torch.cat(tuple(each.images)).to(rows.dtype))
        if self.training and torch.is_grad_enabled():
            rows = rows + nothing_of(self.vision).to(rows.dtype)
        self._added = [self._scattered(layer) for layer in self._deepstack(found, types, rows)]
        return self._scattered(rows.transpose(0, 1))

    def _deepstack(self, found: list[Features], types: Tensor, like: Tensor) -> list[Tensor]:
        """Per layer, what is added to its output [sequence, batch, hidden]: zero but for the images' tokens."""
        layers = []
        for index in range(self.seen.deepstack if found else 0):
            added = torch.zeros_like(like)
            for each in found:
                places = types == each.modality.token_type
                added = added.masked_scatter(places[..., None], each.deepstack[index].to(like.dtype))
            layers.append(added.transpose(0, 1))
        return layers

    def _add_deepstack(self, index: int, layer: Any, inputs: Any, output: Any) -> Any:
        if not self._added:
            return output
        hidden, *rest = output
        return (hidden + self._added[index], *rest)

    def _scattered(self, hidden: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return hidden.contiguous()
        return scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)


def _computed(module: torch.nn.Module) -> list[str]:
    """Floating-point buffers that no checkpoint holds."""
    return [
        name
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None and buffer.is_floating_point()
    ]


def _blocks(is_image: Tensor) -> Tensor:
    """[batch, 1, 1, sequence]: which run of image tokens a token belongs to, counted from 0; -1 for text."""
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    numbers = starts.long().cumsum(1) - 1
    return numbers.masked_fill(~is_image, -1)[:, None, None]


def _refuse_misplaced(found: list[Features], types: Tensor, vision: Vision) -> None:
    """Refuse unless every sample has as many placeholder tokens as its images have features."""
    by_modality = {each.modality: [image.shape[0] for image in each.images] for each in found}
    for modality in vision.modalities:
        sizes = by_modality.get(modality, [])
        for sample, places in enumerate((types == modality.token_type).sum(1).tolist()):
            taken = 0
            while taken < places and sizes:
                taken += sizes.pop(0)
            if taken != places:
                raise BridgeError(
                    f"sample {sample} has {places} {modality.name} tokens (id {vision.token_id(modality)}), and its "
                    f"{modality.name}s have {taken} features; the processor that made the tokens must be this model's, "
                    f"and {modality.name}s come in the order of the samples"
                )
        if sizes:
            raise BridgeError(
                f"{len(sizes)} {modality.name}s belong to no sample: the batch has no {modality.name} token "
                f"(id {vision.token_id(modality)}) left for their {sum(sizes)} features"
            )
