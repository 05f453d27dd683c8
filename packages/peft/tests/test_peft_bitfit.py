"""BitFit on Megatron-Core GPT models: biases learn what they would in full training, and nothing else moves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import PEFT_METHODS, BitFit
from megatron.bridge.testing import RankFailed, run_ranks

LAYOUTS = [
    pytest.param(1, {}, id="one rank"),
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP2"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP2"),
]
type MakeGPT = Callable[..., torch.nn.Module]


def _schedule(chunks: list[Any], batch: dict[str, torch.Tensor]) -> list[Any]:
    """One forward and backward pass with Megatron-Core's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Any, model: Any) -> Any:
        loss = model(**next(batches))
        return loss, lambda output: (output.mean(), {"loss": output.detach().mean()})

    sequences, length = batch["input_ids"].shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([batch] * 2),
        model=chunks,
        num_microbatches=2,
        seq_length=length,
        micro_batch_size=sequences,
        forward_only=False,
    )


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_losses_and_bias_gradients_are_those_of_full_training(
    ranks: int, layout: dict[str, Any], make_gpt: MakeGPT, gpt_batch: dict[str, torch.Tensor]
) -> None:
    def work() -> tuple[list[str], list[str]]:
        model = make_gpt(**layout)
        full_losses = _schedule([model], gpt_batch)
        full = {name: each.grad.clone() for name, each in model.named_parameters()}
        method = BitFit()
        (model,) = method([model])
        losses = _schedule([model], gpt_batch)
        torch.testing.assert_close(losses, full_losses)
        trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        for name, gradient in trained.items():
            assert gradient is not None, f"{name} gets no gradient"
            assert gradient.abs().max() > 0 or full[name].abs().max() == 0, name
            torch.testing.assert_close(gradient, full[name], msg=lambda text, name=name: f"{name}: {text}")
        reported = [name for binding in method.report.bindings for name in binding.trainable]
        assert sorted(reported) == sorted(trained)
        return sorted(trained), sorted(full)

    for trained, every in run_ranks(ranks, work, timeout=120):
        assert trained == [name for name in every if name.endswith("bias")]
        assert any("linear_qkv.bias" in name for name in trained)
        assert any("layernorm.bias" in name for name in trained)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_one_optimizer_step_changes_every_bias_and_nothing_else(
    ranks: int, layout: dict[str, Any], make_gpt: MakeGPT, gpt_batch: dict[str, torch.Tensor]
) -> None:
    def work() -> tuple[set[str], set[str]]:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        (bare,) = PEFT_METHODS["bitfit"]()([make_gpt(**layout)], training=True)
        before = {name: each.detach().clone() for name, each in bare.named_parameters()}
        bare.config.finalize_model_grads_func = finalize_model_grads
        model = DistributedDataParallel(bare.config, DistributedDataParallelConfig(), bare)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.0), [model])
        _schedule([model], gpt_batch)
        assert optimizer.step()[0]
        moved = {name for name, each in bare.named_parameters() if not torch.equal(each, before[name])}
        return moved, {name for name in before if name.endswith("bias")}

    for moved, biases in run_ranks(ranks, work, timeout=120):
        assert moved == biases
        assert len(biases) >= 6


def test_state_dict_keys_stay(make_gpt: MakeGPT) -> None:
    def work() -> tuple[list[str], list[str], list[str], list[str]]:
        model = make_gpt()
        plain, sharded = list(model.state_dict()), list(model.sharded_state_dict())
        BitFit()(model)
        return plain, list(model.state_dict()), sharded, list(model.sharded_state_dict())

    ((plain, plain_after, sharded, sharded_after),) = run_ranks(1, work, timeout=60)
    assert plain == plain_after
    assert sharded == sharded_after


def test_targets_choose_the_biases(make_gpt: MakeGPT) -> None:
    def work() -> tuple[set[str], str]:
        method = BitFit(target_modules=["linear_qkv", "*.layers.1.mlp.linear_fc2"])
        model = method(make_gpt())
        return {name for name, each in model.named_parameters() if each.requires_grad}, str(method.report)

    ((trainable, report),) = run_ranks(1, work, timeout=60)
    assert trainable == {
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "decoder.layers.1.mlp.linear_fc2.bias",
    }
    # 2 x 3 x 16 and 16, of the whole model.
    assert report.startswith("BitFit: 3 modules changed; 112 of ")


def test_a_target_on_another_pipeline_rank_is_enough(make_gpt: MakeGPT) -> None:
    def work() -> int:
        method = BitFit(target_modules=["final_layernorm"])
        method(make_gpt(pipeline_model_parallel_size=2))
        return len(method.report.bindings)

    assert run_ranks(2, work, timeout=60) == [0, 1]


def test_a_model_without_biases_is_refused_on_every_rank(make_gpt: MakeGPT) -> None:
    def work() -> str:
        model = make_gpt(pipeline_model_parallel_size=2, add_bias_linear=False, normalization="RMSNorm")
        for module in model.modules():
            if "bias" in module._parameters:
                module.register_parameter("bias", None)
        with pytest.raises(BridgeError) as refusal:
            BitFit()([model])
        return str(refusal.value)

    for message in run_ranks(2, work, timeout=60):
        assert message.startswith("BitFit changed no module of the model. BitFit trains biases")


def test_a_target_that_matches_nothing_is_refused(make_gpt: MakeGPT) -> None:
    with pytest.raises(RankFailed) as failure:
        run_ranks(1, partial(_apply_to, make_gpt, ["linear_qkv", "linear_f1"]), timeout=60)
    message = str(failure.value.__cause__)
    assert "target_modules=['linear_f1']; did you mean 'linear_fc1'" in message
    assert "linear_proj" in message


def _apply_to(make_gpt: MakeGPT, targets: list[str]) -> None:
    BitFit(target_modules=targets)(make_gpt())


def test_a_bias_that_could_not_learn_is_refused(make_gpt: MakeGPT) -> None:
    def work() -> str:
        model = make_gpt()
        model.decoder.layers[1].self_attention.linear_qkv.gather_output = True
        with pytest.raises(BridgeError) as refusal:
            BitFit()(model)
        return str(refusal.value)

    (message,) = run_ranks(1, work, timeout=60)
    assert "'decoder.layers.1.self_attention.linear_qkv'" in message
    assert "target_modules" in message
