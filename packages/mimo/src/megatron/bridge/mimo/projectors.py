"""From an encoder's width to the language model's."""

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


def mlp_projector(
    config: TransformerConfig, width: int, hidden_size: int, groups: ProcessGroupCollection
) -> torch.nn.Module:
    """Two linear layers with GELU between them, as LLaVA's (arXiv:2310.03744); tensor parallelism divides them.

    Args:
        config: the encoder module's.
        width: of the features.
        hidden_size: of the language model.
        groups: of the encoder module.
    """
    import dataclasses

    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.init}
    sizes = {"hidden_size": hidden_size, "ffn_hidden_size": hidden_size, "kv_channels": 1}
    plain = {"add_bias_linear": True, "activation_func": torch.nn.functional.gelu, "gated_linear_unit": False}
    fusions = {"bias_activation_fusion": False, "gradient_accumulation_fusion": False}
    own = TransformerConfig(**{**values, **sizes, **plain, **fusions})
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    projector = MultimodalProjector(own, layers, "mlp", width, tp_group=groups.tp)
    tell_group(projector, groups)
    return projector


def tell_group(module: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Give their group to those of Megatron-Core's modules that keep none.

    They would ask Megatron-Core's parallel state for it when a checkpoint is made.
    """
    for part in module.modules():
        if isinstance(part, MegatronModule) and getattr(part, "tp_group", None) is None:
            part.tp_group = groups.tp
