"""Projectors compute what transformers' do with the same weights, and refuse what they cannot project."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.projector import PROJECTORS, projector_of
from megatron.bridge.mimo.projectors import MlpProjector, PixelShuffle, Resampler
from megatron.bridge.testing import run_ranks

WIDTH, HIDDEN = 12, 32


def items(*sizes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(size, WIDTH, generator=draw) for size in sizes]


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixels_are_shuffled_as_in_idefics3_and_internvl(factor: int) -> None:
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    (image,) = items(64)
    ours = PixelShuffle(factor=factor).shuffled(image)
    idefics = Idefics3Connector(Idefics3Config(vision_config={"hidden_size": WIDTH}))
    assert ours.equal(idefics.pixel_shuffle(image[None], factor)[0])
    theirs: Any = InternVLModel.pixel_shuffle(None, image.view(1, 8, 8, WIDTH), 1 / factor)
    assert ours.equal(theirs.flatten(1, 2)[0])
    assert PixelShuffle(factor=factor).tokens(64) == len(ours)


def projected(projector: Any, features: list[Tensor], weights: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a projector of these weights gives on this rank, and the gradients of the features for the sum of squares.

    `weights` are whole; a tensor-parallel rank takes its part.
    """
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge import platform

    platform.initialize_distributed()
    size = platform.world_size()
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=size, kv_channels=1, tensor_model_parallel_size=size
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1, tp_rank=platform.rank(), ep_rank=0, etp_rank=0)
    module = projector.build(config, WIDTH, HIDDEN, ProcessGroupCollection(tp=dist.group.WORLD))
    own = dict(module.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, each in own.items():
            whole = weights[name]
            for axis in (axis for axis in range(whole.dim()) if each.shape[axis] != whole.shape[axis]):
                whole = whole.chunk(size, axis)[platform.rank()]
            each.copy_(whole)
    leaves = [each.clone().requires_grad_() for each in features]
    found = projector.project(module, leaves, "images")
    sum(each.square().sum() for each in found).backward()
    return [each.detach() for each in found], [each.grad for each in leaves if each.grad is not None]


def expect_equal(found: tuple[list[Tensor], list[Tensor]], expected: list[Tensor], leaves: list[Tensor]) -> None:
    sum(each.square().sum() for each in expected).backward()
    for one, other in zip(found[0], expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-5)
    for one, leaf in zip(found[1], leaves, strict=True):
        torch.testing.assert_close(one, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_internvls_projector_at_tensor_parallelism(ranks: int) -> None:
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    torch.manual_seed(3)
    config = InternVLConfig(
        vision_config={"hidden_size": WIDTH}, text_config={"model_type": "llama", "hidden_size": HIDDEN}
    )
    reference: Any = InternVLMultiModalProjector(config)
    shuffle: Any = InternVLModel.pixel_shuffle
    ours = {"layer_norm": "norm", "linear_1": "follows.encoder.linear_fc1", "linear_2": "follows.encoder.linear_fc2"}
    weights = {
        f"{ours[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": each.detach()
        for name, each in reference.named_parameters()
    }
    features = items(16, 64)
    for found in run_ranks(ranks, lambda: projected(PixelShuffle(norm=True), features, weights), timeout=120):
        assert [len(each) for each in found[0]] == [4, 16]
        leaves = [each.clone().requires_grad_() for each in features]
        grids = [each.view(1, int(len(each) ** 0.5), -1, WIDTH) for each in leaves]
        expect_equal(found, [reference(shuffle(None, each, 0.5).flatten(1, 2))[0] for each in grids], leaves)


def test_a_resampler_gives_each_item_what_idefics2_gives_it_alone() -> None:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    resampler = Resampler(latents=5, depth=2, heads=4, head_dim=8, query_groups=2, intermediate_size=24)
    torch.manual_seed(3)
    reference = Idefics2Connector(resampler.hf_config(WIDTH, HIDDEN))
    torch.nn.init.normal_(reference.perceiver_resampler.latents)
    weights = {name: each.detach() for name, each in reference.named_parameters()}
    features = items(9, 16, 4)
    leaves = [each.clone().requires_grad_() for each in features]
    expected = [reference(each[None], torch.ones(1, len(each), dtype=torch.bool))[0] for each in leaves]
    found = run_ranks(1, lambda: projected(resampler, features, weights), timeout=120)[0]
    assert [each.shape for each in found[0]] == [(5, HIDDEN)] * 3
    expect_equal(found, expected, leaves)


def test_queries_begin_apart() -> None:
    def work() -> bool:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1, kv_channels=1)
        resampler = Resampler(latents=3, depth=1, heads=2, head_dim=4, query_groups=1)
        module: Any = resampler.build(config, WIDTH, HIDDEN, ProcessGroupCollection())
        first, second, _ = module(items(4)[0][None], torch.ones(1, 4, dtype=torch.bool))[0]
        return torch.allclose(first, second)

    assert run_ranks(1, work, timeout=120) == [False]


def test_projectors_are_found_by_name() -> None:
    assert {"mlp", "pixel_shuffle", "resampler"} <= set(PROJECTORS)
    assert projector_of("mlp") == MlpProjector()
    with pytest.raises(BridgeError, match="pixel_shuffel"):
        projector_of("pixel_shuffel")


@pytest.mark.parametrize(
    ("projector", "features", "told"),
    [
        (PixelShuffle(factor=3), 16, "16 features, which are no square with sides that PixelShuffle.factor=3 divides"),
        (PixelShuffle(), 15, "15 features, which are no square"),
        (PixelShuffle(factor=0), None, "factor=0 joins nothing"),
        (Resampler(latents=0), None, "Resampler.latents=0 must be at least 1"),
        (Resampler(heads=4, query_groups=3), None, "query_groups=3 does not divide heads=4"),
    ],
)
def test_what_cannot_be_projected_is_refused(projector: Any, features: int | None, told: str) -> None:
    assert any(told in problem for problem in projector.problems(features))


def test_an_image_that_cannot_be_shuffled_is_refused_by_its_modality() -> None:
    with pytest.raises(BridgeError, match="'images': its items have 6 features, which are no square"):
        PixelShuffle().project(torch.nn.Identity(), items(4, 6), "images")
