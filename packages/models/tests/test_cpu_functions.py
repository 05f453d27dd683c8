"""What the layer spec `torch` computes by functions of its own on a CPU equals PyTorch's and Megatron-Core's."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from megatron.bridge.models import GPTModelProvider
from megatron.bridge.models.layer_specs.gated_mlp import _Gated
from megatron.bridge.models.layer_specs.rms_norm_cpu import RMSNorm
from megatron.bridge.models.layer_specs.rotary_cpu import rotate
from megatron.bridge.testing import run_ranks


def random(*shape: int, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_(grad)


def agree(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients, to 2e-6 of their largest."""
    gradient = random(*ours.shape, grad=False)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    all_ours, all_expected = (
        (output.detach(), *torch.autograd.grad(output, leaves, gradient)) for output in (ours, expected)
    )
    for mine, theirs in zip(all_ours, all_expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def functions(output: Tensor) -> set[str]:
    """Names of the functions behind a tensor."""

    def walk() -> Iterator[str]:
        seen, pending = set(), [output.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in seen:
                seen.add(node)
                yield node.name()
                pending += [parent for parent, _ in node.next_functions]

    return set(walk())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5, None])
def test_rms_norm(epsilon: float | None, frozen: bool) -> None:
    norm = RMSNorm(48, eps=epsilon)
    with torch.no_grad():
        norm.weight.copy_(random(48, grad=False))
    norm.weight.requires_grad_(not frozen)
    # As queries lie in memory: a part of a wider tensor.
    wide = random(7, 2, 96)
    x = wide[..., 16:64]
    ours = norm(x)
    assert "_RMSNormBackward" in functions(ours)
    agree(ours, torch.nn.functional.rms_norm(x, (48,), norm.weight, epsilon), [wide, norm.weight])


def test_rms_norm_of_half_precision_and_without_a_weight_is_pytorchs() -> None:
    x = random(5, 48)
    assert "_RMSNormBackward" not in functions(RMSNorm(48).bfloat16()(x.bfloat16()))
    bare = RMSNorm(48, elementwise_affine=False)
    assert torch.equal(bare(x), torch.nn.functional.rms_norm(x, (48,)))


@pytest.mark.parametrize("batch_of_angles", [1, 3])
def test_rotation(batch_of_angles: int) -> None:
    states, angles = random(9, 3, 4, 16), random(9, batch_of_angles, 1, 8, grad=False)
    angles = torch.cat((angles, angles), -1)
    ours = rotate(states, angles.cos() * 1.5, angles.sin() * 1.5)
    agree(ours, _apply_rotary_pos_emb_bshd(states, angles, mscale=1.5), [states])


@pytest.mark.parametrize("activation", [silu, gelu, relu, lambda gate: gate], ids=["silu", "gelu", "relu", "none"])
def test_gated_activation(activation: Callable[[Tensor], Tensor]) -> None:
    both = random(5, 2, 24)

    def expected() -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return activation(gate) * up

    agree(_Gated(activation)(both), expected(), [both])
    agree(_Gated(activation).of_parts(*both.chunk(2, dim=-1)), expected(), [both])


def model_functions(**changes: Any) -> set[str]:
    """Names of the functions behind the logits of a tiny Llama."""

    def run() -> set[str]:
        settings = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False} | changes
        model = GPTModelProvider(
            num_layers=1,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            activation_func=silu,
            vocab_size=64,
            seq_length=8,
            layer_spec="torch",
            **settings,
        ).provide_distributed_model(wrap_with_ddp=False)[0]
        return functions(model(torch.arange(8).view(1, 8), torch.arange(8).view(1, 8), None))

    return run_ranks(1, run, timeout=120)[0]


OWN = {"_RMSNormBackward", "_RotationBackward", "_GateAndUpBackward", "_GatedActivationOfPartsBackward"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a model is on the GPU where there is one")
@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, set()),
        ({"rotary_percent": 0.5}, {"_RotationBackward"}),
        ({"rotary_interleaved": True}, {"_RotationBackward"}),
        ({"add_bias_linear": True}, {"_GateAndUpBackward", "_GatedActivationOfPartsBackward"}),
        ({"normalization": "LayerNorm"}, {"_RMSNormBackward"}),
    ],
    ids=["plain", "half rotated", "interleaved", "biases", "LayerNorm"],
)
def test_models_use_them_where_they_apply(changes: dict[str, Any], missing: set[str]) -> None:
    assert OWN - model_functions(**changes) == missing
