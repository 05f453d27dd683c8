"""Scaled rotary position embeddings, with the formulas of `transformers.modeling_rope_utils`.

Sources: linear (kaiokendev, 2023), dynamic NTK (bloc97, 2023), YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753) and
Llama 3.1's frequency bands (arXiv:2407.21783).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron.bridge.errors import BridgeError, did_you_mean

# Scalings whose frequencies depend on the length of the sequence at hand.
_BY_LENGTH = ("dynamic", "longrope")


def apply_rope_parameters(model: Any, rope_parameters: dict[str, Any], max_position_embeddings: int) -> None:
    """Replace a model's plain RoPE frequencies by scaled ones.

    Args:
        model: a GPT model chunk that uses RoPE.
        rope_parameters: Hugging Face's dictionary: `rope_type`, `rope_theta`, and the scaling's own values.
        max_position_embeddings: positions the Hugging Face configuration states.

    Raises:
        BridgeError: transformers does not know the scaling, or a value it needs is missing.
    """
    rotary = _ScaledFrequencies(
        rope_parameters, max_position_embeddings, model.config.kv_channels, model.rotary_percent
    )
    plain: RotaryEmbedding = model.rotary_pos_emb
    model.rotary_pos_emb = _ScaledRotaryEmbedding(plain, rotary)
    for module in model.modules():
        if hasattr(module, "_yarn_concentration_factor"):
            # Megatron-Core multiplies cosine and sine by this value, whichever scaling it came from.
            module._yarn_concentration_factor = rotary.attention_factor


def apply_layer_rope_parameters(
    model: Any,
    layer_parameters: list[dict[str, Any]],
    max_position_embeddings: int,
    head_sizes: Sequence[int] | None = None,
) -> None:
    """Give every layer of a model its own rotary embedding; layers with equal parameters and head sizes share one.

    Args:
        model: a GPT model chunk that uses RoPE, of `VariantLayer`s.
        layer_parameters: `rope_parameters` of every layer of the whole model.
        max_position_embeddings: positions the Hugging Face configuration states.
        head_sizes: channels per head of every layer of the whole model; None: all as the model's config says.

    Raises:
        BridgeError: as `apply_rope_parameters`.
    """
    sizes = head_sizes or [model.config.kv_channels] * len(layer_parameters)
    layers = list(zip(layer_parameters, sizes, strict=True))
    kinds = [kind for index, kind in enumerate(layers) if kind not in layers[:index]]
    percent = model.rotary_percent
    frequencies = [_ScaledFrequencies(kind, max_position_embeddings, size, percent) for kind, size in kinds]
    plain: RotaryEmbedding = model.rotary_pos_emb
    model.rotary_pos_emb = _RotaryEmbeddingByKind(plain, [_ScaledRotaryEmbedding(plain, each) for each in frequencies])
    for layer in model.decoder.layers:
        layer.rope_kind = kinds.index(layers[layer.layer_number - 1])
        layer.rope_size = 2 * len(frequencies[layer.rope_kind].for_length(None)[0])
        layer.self_attention._yarn_concentration_factor = frequencies[layer.rope_kind].attention_factor


def apply_multimodal_rope(
    model: Any, rope_parameters: dict[str, Any], max_position_embeddings: int, *, interleaved: bool
) -> None:
    """Replace the frequencies of a model whose positions are in time, height and width.

    Args:
        model: a GPT model chunk with `position_embedding_type="mrope"`.
        rope_parameters, max_position_embeddings: as for `apply_rope_parameters`.
        interleaved: time, height and width take turns along the channels, instead of one section after another.
    """
    size, percent = model.config.kv_channels, model.rotary_percent
    frequencies = _ScaledFrequencies(rope_parameters, max_position_embeddings, size, percent)
    if frequencies.rope_type in _BY_LENGTH:
        raise BridgeError(f"rope_type {frequencies.rope_type!r} does not go with positions in time, height and width")
    model.rotary_pos_emb = _MultimodalRotaryEmbedding(model.rotary_pos_emb, frequencies, interleaved)
    for module in model.modules():
        if hasattr(module, "_yarn_concentration_factor"):
            module._yarn_concentration_factor = frequencies.attention_factor


def apply_latent_rope_parameters(model: Any, rope_parameters: dict[str, Any], max_position_embeddings: int) -> None:
    """Give the multi-latent attention of every layer scaled frequencies, all layers the same.

    Args:
        model: a GPT model chunk whose config says `rope_type="yarn"`, so that cosine and sine come with a factor.
        rope_parameters: as for `apply_rope_parameters`.
        max_position_embeddings: positions the Hugging Face configuration states.

    Raises:
        BridgeError: as `apply_rope_parameters`.
    """
    size = model.config.qk_pos_emb_head_dim
    frequencies = _ScaledFrequencies(rope_parameters, max_position_embeddings, size, 1.0)
    rotary = None
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            rotary = rotary or _RotaryEmbeddingWithFactor(module.rotary_pos_emb, frequencies)
            module.rotary_pos_emb = rotary


def _plain_frequencies(config: Any, device: torch.device, seq_len: int | None = None) -> tuple[Tensor, float]:
    """RoPE as first described (arXiv:2104.09864)."""
    turned = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    exponents = torch.arange(0, turned, 2, dtype=torch.float32, device=device) / turned
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0


class _ScaledFrequencies:
    """inv_freq [rotary dimension / 2] for a sequence length, and the factor on cosine and sine."""

    def __init__(self, rope_parameters: dict[str, Any], positions: int, head_dim: int, rotary_percent: float) -> None:
        from transformers import PretrainedConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        self.rope_type = str(rope_parameters.get("rope_type"))
        functions: dict[str, Any] = {**ROPE_INIT_FUNCTIONS, "default": _plain_frequencies}
        if self.rope_type not in functions:
            raise BridgeError(
                f"rope_parameters: rope_type {self.rope_type!r} is unknown"
                f"{did_you_mean(self.rope_type, functions)} (known: {', '.join(sorted(functions))})"
            )
        self._function: Callable[..., tuple[Tensor, float]] = functions[self.rope_type]
        self._config = PretrainedConfig()
        self._config.rope_parameters = {"partial_rotary_factor": rotary_percent, **rope_parameters}
        # One head of the right size is all that the formulas ask of the model.
        self._config.hidden_size, self._config.num_attention_heads, self._config.head_dim = head_dim, 1, head_dim
        self._config.max_position_embeddings = positions
        self.attention_factor = self.for_length(None)[1]

    def for_length(self, length: int | None) -> tuple[Tensor, float]:
        try:
            return self._function(self._config, torch.device("cpu"), seq_len=length)
        except KeyError as error:
            raise BridgeError(
                f"rope_parameters: rope_type {self.rope_type!r} needs {error} (given: {self._config.rope_parameters})"
            ) from error


class _ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron-Core's rotary embedding over scaled frequencies."""

    def __init__(self, plain: RotaryEmbedding, frequencies: _ScaledFrequencies) -> None:
        nn.Module.__init__(self)
        self.rotary_interleaved = plain.rotary_interleaved
        self.seq_len_interpolation_factor = None
        self.cp_group = plain.cp_group
        self._frequencies = frequencies
        self.inv_freq = frequencies.for_length(None)[0].to(plain.inv_freq.device)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        if self._frequencies.rope_type in _BY_LENGTH:
            self.inv_freq = self._frequencies.for_length(max_seq_len)[0].to(self.inv_freq.device)
        return super().get_emb(max_seq_len, offset)


class _MultimodalRotaryEmbedding(MultimodalRotaryEmbedding):
    """Megatron-Core's, over any frequencies, its sections side by side or interleaved."""

    def __init__(self, plain: MultimodalRotaryEmbedding, frequencies: _ScaledFrequencies, interleaved: bool) -> None:
        nn.Module.__init__(self)
        self.rotary_interleaved, self.seq_len_interpolation_factor = plain.rotary_interleaved, None
        self.cp_group = plain.cp_group
        self.inv_freq = frequencies.for_length(None)[0].to(plain.inv_freq.device)
        self.interleaved = interleaved

    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """`[sequence, batch, 1, size]` of positions `[3, batch, sequence]`."""
        angles = position_ids[..., None].to(self.inv_freq) * self.inv_freq
        mixed = (_taking_turns if self.interleaved else _in_sections)(angles, mrope_section)
        # Channels that turn together stand next to each other, or half a head apart.
        both = mixed.repeat_interleave(2, -1) if self.rotary_interleaved else torch.cat((mixed, mixed), -1)
        return both.transpose(0, 1)[:, :, None]


def _taking_turns(angles: Tensor, sections: list[int]) -> Tensor:
    mixed = angles[0].clone()
    for axis in (1, 2):
        turn = slice(axis, 3 * sections[axis], 3)
        mixed[..., turn] = angles[axis][..., turn]
    return mixed


def _in_sections(angles: Tensor, sections: list[int]) -> Tensor:
    return torch.cat([part[index % 3] for index, part in enumerate(angles.split(sections, -1))], -1)


class _RotaryEmbeddingWithFactor(_ScaledRotaryEmbedding):
    """A scaled rotary embedding that gives the factor on cosine and sine too, as multi-latent attention expects it."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        return super().forward(*args, **kwargs), self._frequencies.attention_factor


class _RotaryEmbeddingByKind(RotaryEmbedding):
    """Several rotary embeddings, stacked as `[kinds, sequence, 1, 1, size]`; `size` is the largest one's."""

    def __init__(self, plain: RotaryEmbedding, kinds: list[_ScaledRotaryEmbedding]) -> None:
        nn.Module.__init__(self)
        self.cp_group = plain.cp_group
        self.inv_freq = plain.inv_freq
        self.kinds = nn.ModuleList(kinds)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        angles = [kind(*args, **kwargs) for kind in self.kinds]
        size = max(each.shape[-1] for each in angles)
        return torch.stack([nn.functional.pad(each, (0, size - each.shape[-1])) for each in angles])
