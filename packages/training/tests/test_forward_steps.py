"""A forward step is named in the configuration, or given; what is given comes first."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.t5_provider import T5ModelProvider
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.forward_steps import FORWARD_STEPS
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.overrides import apply_overrides
from megatron.bridge.training.pretrain import pretrain


def doubled(run: Any, data: Any, model: Any) -> Any:
    """The usual loss, twice."""
    output, loss = forward_step(run, data, model)

    def twice(losses: Any) -> Any:
        total, tokens, report = loss(losses)
        return 2 * total, tokens, {name: value * value.new_tensor([2, 1]) for name, value in report.items()}

    return output, twice


def test_the_forward_step_is_the_one_that_is_named_or_given(make_run: Callable[..., Any]) -> None:
    def work() -> list[float]:
        FORWARD_STEPS.register("doubled", doubled)
        usual, named, given = (make_run(train_iters=1) for _ in range(3))
        apply_overrides(named, ["train.forward_step=doubled"])
        apply_overrides(given, ["train.forward_step=doubled"])
        return [pretrain(usual).losses[1], pretrain(named).losses[1], pretrain(given, forward_step).losses[1]]

    usual, named, given = run_ranks(1, work, timeout=60)[0]
    assert named == pytest.approx(2 * usual, rel=1e-6)
    assert given == usual


def test_a_forward_step_that_nobody_offers_is_refused(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    cfg.train.forward_step = "gtp"
    with pytest.raises(BridgeError, match=r"train\.forward_step: no forward step is called 'gtp'; did you mean 'gpt'"):
        cfg.validate(1)


def test_a_model_that_the_usual_step_does_not_fit_is_refused(make_run: Callable[..., Any]) -> None:
    cfg = make_run({"num_labels": 1})
    with pytest.raises(BridgeError, match=r"train\.forward_step='gpt' .* model\.num_labels=1 is a head"):
        cfg.validate(1)
    cfg.model = T5ModelProvider(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=128, seq_length=16)
    with pytest.raises(BridgeError, match=r"train\.forward_step='gpt' .* a T5ModelProvider has an encoder too"):
        cfg.validate(1)
    cfg.train.forward_step = None
    cfg.validate(1)
    with pytest.raises(BridgeError, match="was given no function"):
        pretrain(cfg)
