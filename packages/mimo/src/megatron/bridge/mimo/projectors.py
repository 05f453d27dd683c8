"""Projectors: an MLP, neighbours joined before an MLP (pixel shuffle), and learned queries (a resampler)."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.projector import Projector


@dataclass(kw_only=True)
class MlpProjector(Projector):
    """Two linear layers with GELU between them, as LLaVA's (arXiv:2310.03744); tensor parallelism divides them."""

    def build(
        self, config: TransformerConfig, width: int, hidden_size: int, groups: ProcessGroupCollection
    ) -> torch.nn.Module:
        return _mlp(config, width, hidden_size, groups)

    def project(self, module: torch.nn.Module, features: Sequence[Tensor], name: str) -> Sequence[Tensor]:
        return _together(module, features)


@dataclass(kw_only=True)
class PixelShuffle(Projector):
    """Neighbours of a square image become one token that is as much wider; an MLP follows.

    [height x width, c] -> [height/r x width/r, c r^2], as in Idefics3 (arXiv:2408.12637) and InternVL
    (arXiv:2404.16821); the latter has a norm before the MLP.

    Attributes:
        factor: r, how many neighbours are joined along each side.
        norm: a LayerNorm stands before the MLP.
    """

    factor: int = 2
    norm: bool = False

    def build(
        self, config: TransformerConfig, width: int, hidden_size: int, groups: ProcessGroupCollection
    ) -> torch.nn.Module:
        width *= self.factor**2
        mlp = _mlp(config, width, hidden_size, groups)
        return _tell_group(_Normed(config, width, mlp), groups) if self.norm else mlp

    def project(self, module: torch.nn.Module, features: Sequence[Tensor], name: str) -> Sequence[Tensor]:
        for problem in (text for each in features for text in self.problems(len(each))):
            raise BridgeError(f"{name!r}: {problem}")
        return _together(module, [self.shuffled(each) for each in features])

    def shuffled(self, features: Tensor) -> Tensor:
        """[height x width, c] -> [height/r x width/r, c r^2], rows of the image one after another."""
        side = math.isqrt(len(features)) // self.factor
        grid = features.view(side, self.factor, side, self.factor, -1)
        return grid.transpose(1, 2).reshape(side * side, -1)

    def tokens(self, features: int) -> int:
        return features // self.factor**2

    def problems(self, features: int | None) -> Iterator[str]:
        if self.factor < 1:
            yield f"PixelShuffle.factor={self.factor} joins nothing; set it to 1 or more"
        elif features is not None and (math.isqrt(features) ** 2 != features or math.isqrt(features) % self.factor):
            yield (
                f"its items have {features} features, which are no square with sides that PixelShuffle.factor="
                f"{self.factor} divides; choose another factor, or images of another size"
            )


@dataclass(kw_only=True)
class Resampler(Projector):
    """Any number of features become `latents` tokens: learned queries that attend to them.

    The module is transformers' connector of Idefics2 (arXiv:2405.02246), a gated MLP and a perceiver resampler. It is
    whole on every tensor-parallel rank.

    Attributes:
        latents: tokens of an item.
        depth: layers of cross attention.
        heads, head_dim, query_groups: of each.
        intermediate_size: of the MLP before them; None for four times the language model's width.
    """

    latents: int = 64
    depth: int = 3
    heads: int = 16
    head_dim: int = 96
    query_groups: int = 4
    intermediate_size: int | None = None

    def build(
        self, config: TransformerConfig, width: int, hidden_size: int, groups: ProcessGroupCollection
    ) -> torch.nn.Module:
        from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

        module: Any = Idefics2Connector(self.hf_config(width, hidden_size))
        # transformers begins with equal queries, which would stay equal: they see the same and learn the same.
        torch.nn.init.normal_(module.perceiver_resampler.latents, std=0.02)
        found: torch.nn.Module = module.to(config.params_dtype)
        return found

    def hf_config(self, width: int, hidden_size: int) -> Any:
        """transformers' configuration of a model with this connector."""
        from transformers import Idefics2Config

        inner = 4 * hidden_size if self.intermediate_size is None else self.intermediate_size
        return Idefics2Config(
            vision_config={"hidden_size": width},
            text_config={"model_type": "mistral", "hidden_size": hidden_size, "intermediate_size": inner},
            perceiver_config={
                "hidden_size": hidden_size,
                "resampler_n_latents": self.latents,
                "resampler_depth": self.depth,
                "resampler_n_heads": self.heads,
                "resampler_head_dim": self.head_dim,
                "num_key_value_heads": self.query_groups,
            },
        )

    def project(self, module: torch.nn.Module, features: Sequence[Tensor], name: str) -> Sequence[Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        sizes = torch.tensor([len(each) for each in features], device=padded.device)
        seen = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
        return list(module(padded, attention_mask=seen))

    def tokens(self, features: int) -> int:
        return self.latents

    def problems(self, features: int | None) -> Iterator[str]:
        sizes = {"latents": self.latents, "depth": self.depth, "heads": self.heads, "head_dim": self.head_dim}
        yield from (f"Resampler.{field}={size} must be at least 1" for field, size in sizes.items() if size < 1)
        if self.query_groups < 1 or self.heads % self.query_groups:
            yield f"Resampler.query_groups={self.query_groups} does not divide heads={self.heads}; choose a divisor"


class _Normed(MegatronModule):
    """A LayerNorm and what follows it."""

    def __init__(self, config: TransformerConfig, width: int, follows: torch.nn.Module) -> None:
        super().__init__(config)
        self.norm = torch.nn.LayerNorm(width, dtype=config.params_dtype)
        self.follows = follows

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.follows(self.norm(rows))
        return found


def _together(module: torch.nn.Module, features: Sequence[Tensor]) -> Sequence[Tensor]:
    """All items' rows through the module at once."""
    return module(torch.cat(tuple(features))).split([len(each) for each in features])


def _mlp(
    config: TransformerConfig, width: int, hidden_size: int, groups: ProcessGroupCollection
) -> MultimodalProjector:
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.init}
    sizes = {"hidden_size": hidden_size, "ffn_hidden_size": hidden_size, "kv_channels": 1}
    plain = {"add_bias_linear": True, "activation_func": torch.nn.functional.gelu, "gated_linear_unit": False}
    fusions = {"bias_activation_fusion": False, "gradient_accumulation_fusion": False}
    own = TransformerConfig(**{**values, **sizes, **plain, **fusions})
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return _tell_group(MultimodalProjector(own, layers, "mlp", width, tp_group=groups.tp), groups)


def _tell_group[Module: torch.nn.Module](module: Module, groups: ProcessGroupCollection) -> Module:
    tell_group(module, groups)
    return module


def tell_group(module: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Give their group to those of Megatron-Core's modules that keep none.

    They would ask Megatron-Core's parallel state for it when a checkpoint is made.
    """
    for part in module.modules():
        if isinstance(part, MegatronModule) and getattr(part, "tp_group", None) is None:
            part.tp_group = groups.tp
