"""BitFit through a provider's pre-wrap hook: our own layers, sequence parallel, and Qwen2's lone QKV biases."""

from typing import Any

import pytest
import torch

from megatron.bridge.models import GPTModelProvider
from megatron.bridge.peft import PEFT_METHODS
from megatron.bridge.testing import import_engine, run_ranks

BATCH, LENGTH, VOCABULARY = 2, 8, 64


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    import_engine()
    import megatron.bridge.models.gpt_provider  # noqa: F401  forked ranks find it imported

    torch.set_num_threads(1)


def _provider(**changes: Any) -> GPTModelProvider:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 16,
        "seq_length": LENGTH,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return GPTModelProvider(**(values | changes))


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("spec", ["torch", "local"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ],
)
def test_bias_gradients_are_those_of_full_training(ranks: int, layout: dict[str, Any], spec: str) -> None:
    if spec == "local" and layout.get("sequence_parallel"):
        pytest.skip("Megatron-Core's local spec has no norm for sequence parallel without apex")

    def work() -> list[str]:
        provider = _provider(layer_spec=spec, **layout)
        (full,) = provider.provide_distributed_model(wrap_with_ddp=False, seed=5)
        expected = _gradients(full)
        method = PEFT_METHODS["bitfit"]()
        (model,) = provider.provide_distributed_model(
            wrap_with_ddp=False, seed=5, pre_wrap_hook=lambda chunks: method(chunks, training=True)
        )
        trained = _gradients(model)
        for name, gradient in trained.items():
            torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        return sorted(trained)

    for trained in run_ranks(ranks, work, timeout=120):
        assert trained == [f"decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in (0, 1)]
