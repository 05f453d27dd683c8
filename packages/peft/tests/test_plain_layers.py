"""Linear layers of torch, in a tower that transformers wrote: what may be adapted there, and what is left alone."""

from typing import Any

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import IA3, CanonicalLoRA, DoRA, LoRA
from megatron.bridge.peft.adapted_layer import adapted_layers, merge_adapter
from megatron.bridge.peft.layer_method import TOWER


class Block(torch.nn.Module):
    """A linear layer beside attention, whose own one is read past any adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 12)
        self.out_proj = torch.nn.Linear(12, 8, bias=False)
        self.attention = torch.nn.MultiheadAttention(8, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out_proj(self.up(values).relu())
        return found


def tower(*, marked: bool = True) -> Any:
    torch.manual_seed(5)
    model = torch.nn.Sequential(Block(), Block())
    setattr(model, TOWER, marked)
    return model


@pytest.mark.parametrize("kind", [LoRA, CanonicalLoRA, DoRA])
def test_a_plain_layer_learns_beside_its_weight(kind: Any) -> None:
    model, values = tower(), torch.randn(3, 8)
    before = model(values)
    kind(dim=2, target_modules=["up", "out_proj"])(model)
    assert torch.allclose(model(values), before, atol=1e-6)  # B begins at zero
    assert [layer.adapters["default"].place.name for layer in adapted_layers(model)] == [
        f"{block}.{layer}" for block in (0, 1) for layer in ("up", "out_proj")
    ]
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained
    assert all(".adapters." in name for name in trained)
    for name, each in model.named_parameters():
        if name in trained:
            torch.nn.init.normal_(each, std=0.3)
    adapted = model(values)
    assert (adapted - before).abs().max() > 1e-2
    merge_adapter(model)
    assert torch.allclose(model(values), adapted, atol=1e-5)


def test_beside_a_language_model_plain_layers_are_left_alone() -> None:
    with pytest.raises(BridgeError, match=r"changed no module for target_modules=\['up'\].*MimoProvider.adapters"):
        LoRA(target_modules=["up"])(tower(marked=False))


def test_a_method_without_adapters_for_plain_layers_is_refused() -> None:
    with pytest.raises(BridgeError, match="IA3 has no adapters for the layers of towers; use LoRA or DoRA there"):
        IA3(target_modules=["up"], feedforward_modules=[])(tower())
