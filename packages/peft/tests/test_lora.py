"""LoRA on Megatron-Core models, without Hugging Face: keys, layouts, initial values, several adapters, bad settings."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.peft import IA3, PEFT_METHODS, CanonicalLoRA, DoRA, LoRA
from megatron.bridge.testing import run_ranks

type MakeGPT = Callable[..., torch.nn.Module]


def _stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The adapters with no zeros in them, alike on every rank."""
    torch.manual_seed(17)
    for name, each in model.named_parameters():
        if ".adapters." in name:
            each.data.add_(0.3)
    return model


def test_the_base_keeps_its_keys_and_adapters_add_theirs(make_gpt: MakeGPT) -> None:
    def work() -> tuple[set[str], set[str], set[str], set[str]]:
        model = make_gpt()
        plain, sharded = set(model.state_dict()), set(model.sharded_state_dict())
        LoRA(dim=2)(model)
        return plain, set(model.state_dict()), sharded, set(model.sharded_state_dict())

    ((plain, plain_after, sharded, sharded_after),) = run_ranks(1, work, timeout=60)
    added = plain_after - plain
    assert not plain - plain_after
    assert len(added) == 2 * 4 * 2
    assert all(".adapters.default.lora_" in name for name in added)
    assert sharded_after == sharded | added


def test_the_same_seed_gives_the_same_adapter_at_any_layout(make_gpt: MakeGPT, gpt_batch: dict[str, Any]) -> None:
    def work(layout: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
        model = make_gpt(**layout)
        LoRA(dim=2, init_lora_weights=kind)(model)
        return {name: each.detach() for name, each in model.named_parameters() if name.endswith("lora_A")}

    for kind in ("kaiming", "gaussian", "orthogonal"):
        one = run_ranks(1, work, {}, kind, timeout=60)[0]
        two = run_ranks(2, work, {"tensor_model_parallel_size": 2}, kind, timeout=60)
        for name, whole in one.items():
            parts = [rank[name] for rank in two]
            joined = torch.cat(parts, 1) if parts[0].shape != whole.shape else parts[0]
            assert torch.equal(joined, whole), (kind, name)
        stages = run_ranks(2, work, {"pipeline_model_parallel_size": 2}, kind, timeout=60)
        # The second stage's layer 0 is the model's layer 1.
        for name, part in stages[1].items():
            assert torch.equal(part, one[name.replace("layers.0", "layers.1")])


@pytest.mark.parametrize("kind", ["pissa", "olora", "kaiming", "gaussian", "orthogonal"])
def test_an_adapter_begins_with_no_effect(kind: str, make_gpt: MakeGPT, gpt_batch: dict[str, Any]) -> None:
    def work() -> tuple[torch.Tensor, torch.Tensor, float, float]:
        model = make_gpt()
        plain = model(**gpt_batch)
        LoRA(dim=2, init_lora_weights=kind)(model)
        adapter = model.decoder.layers[0].mlp.linear_fc2.adapters["default"]
        weight = model.decoder.layers[0].mlp.linear_fc2.weight
        product = (adapter.lora_B @ adapter.lora_A) * adapter.scale
        best = torch.linalg.svdvals(weight.detach())[2:].norm()
        return plain, model(**gpt_batch), (weight - product).norm().item(), best.item()

    ((plain, adapted, rest, best),) = run_ranks(1, work, timeout=60)
    torch.testing.assert_close(adapted, plain, rtol=1e-5, atol=1e-5)
    if kind == "pissa":  # the best approximation of that rank leaves the smaller singular values
        assert rest == pytest.approx(best, rel=1e-4)


def test_dropout_acts_in_training_only_and_alike_on_every_rank(make_gpt: MakeGPT, gpt_batch: dict[str, Any]) -> None:
    def work() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model = make_gpt(tensor_model_parallel_size=2)
        LoRA(dim=2, dropout=0.5)(model)
        _stirred(model)
        trained = model(**gpt_batch)
        model.eval()
        return trained, model(**gpt_batch), model(**gpt_batch)

    first, second = run_ranks(2, work, timeout=60)
    for trained, once, again in (first, second):
        assert torch.equal(once, again)
        assert not torch.allclose(trained, once)
    torch.testing.assert_close(first[0], second[0])


def test_several_adapters_switch_merge_and_unmerge(make_gpt: MakeGPT, gpt_batch: dict[str, Any]) -> None:
    def work() -> dict[str, Any]:
        from megatron.bridge.peft.adapted_layer import merge_adapter, unmerge_adapter, use_adapter, without_adapters

        model = make_gpt(tensor_model_parallel_size=2)
        weights = {name: each.clone() for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}
        found: dict[str, Any] = {"plain": model(**gpt_batch)}
        LoRA(dim=2, adapter_name="first")(model)
        _stirred(model)
        found["first"] = model(**gpt_batch)
        DoRA(dim=3, adapter_name="second", target_modules=["linear_fc1", "linear_fc2"])(model)
        _stirred(model)
        found["second"] = model(**gpt_batch)
        use_adapter(model, "first")
        found["trains"] = sorted(
            {name.split(".adapters.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        )
        with without_adapters(model):
            found["without"] = model(**gpt_batch)
        use_adapter(model, "second")
        found["second again"] = model(**gpt_batch)
        merge_adapter(model)
        found["merged"] = model(**gpt_batch)
        with pytest.raises(BridgeError, match="'second' is merged"):
            use_adapter(model, "first")
        unmerge_adapter(model)
        found["unmerged"] = all(torch.equal(model.state_dict()[name], each) for name, each in weights.items())
        with pytest.raises(BridgeError, match="no adapter is called 'secnd'; did you mean 'second'"):
            use_adapter(model, "secnd")
        with pytest.raises(BridgeError, match="has an adapter named 'first' already"):
            LoRA(dim=2, adapter_name="first")(model)
        return found

    for found in run_ranks(2, work, timeout=100):
        assert not torch.allclose(found["plain"], found["first"], atol=1e-3)
        assert not torch.allclose(found["second"], found["first"], atol=1e-3)
        assert found["trains"] == ["first"]
        assert torch.equal(found["without"], found["plain"])
        assert torch.equal(found["second again"], found["second"])
        torch.testing.assert_close(found["merged"], found["second"], rtol=1e-5, atol=1e-5)
        assert found["unmerged"]


def test_factors_of_outputs_are_merged_into_biases_too(make_gpt: MakeGPT, gpt_batch: dict[str, Any]) -> None:
    def work() -> None:
        from megatron.bridge.peft.adapted_layer import merge_adapter, unmerge_adapter

        model = make_gpt(tensor_model_parallel_size=2)
        for name, each in model.named_parameters():
            if name.endswith("bias"):
                each.data.add_(0.2)
        biases = {name: each.clone() for name, each in model.named_parameters() if name.endswith("bias")}
        IA3(target_modules=["linear_qkv", "linear_proj", "linear_fc1"], feedforward_modules=[])(model)
        adapted = _stirred(model)(**gpt_batch)
        merge_adapter(model)
        torch.testing.assert_close(model(**gpt_batch), adapted, rtol=1e-5, atol=1e-5)
        named = dict(model.named_parameters())
        assert any(not named[name].equal(each) for name, each in biases.items())
        unmerge_adapter(model)
        assert all(named[name].equal(each) for name, each in biases.items())

    run_ranks(2, work, timeout=100)


def test_layers_and_exclusions(make_gpt: MakeGPT) -> None:
    def work() -> list[str]:
        method = LoRA(dim=2, layers_to_transform=[1], exclude_modules=["linear_fc1"])
        method(make_gpt(pipeline_model_parallel_size=2))
        return [binding.name for binding in method.report.bindings]

    first, second = run_ranks(2, work, timeout=60)
    assert first == []
    # The second stage's own layer 0 goes by its number in the model.
    assert sorted(second) == [
        "decoder.layers.1.mlp.linear_fc2",
        "decoder.layers.1.self_attention.linear_proj",
        "decoder.layers.1.self_attention.linear_qkv",
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(dim=0), r"dim=0 must be at least 1"),
        (LoRA(alpha=0, dropout_position="middle"), r"alpha=0 must be.*'middle' is neither"),
        (LoRA(init_lora_weights="eva"), r"init_lora_weights='eva' is not supported; there are kaiming"),
        (LoRA(target_modules=["linear_qkw"]), r"target_modules=\['linear_qkw'\]; did you mean 'linear_qkv'"),
        (LoRA(exclude_modules=["lm_head"]), r"exclude_modules=\['lm_head'\] matches nothing"),
        (LoRA(target_modules=["linear_qkv", "final_layernorm"]), r"target_modules=\['final_layernorm'\]"),
        (LoRA(rank_pattern={"linear_qkv": 0}), r"rank_pattern\['linear_qkv'\]=0 must be at least 1"),
        (DoRA(init_lora_weights="pissa"), r"'pissa' is not supported with DoRA"),
        (DoRA(target_modules=["word_embeddings"]), r"DoRA is for linear layers; leave embedding.word_embeddings out"),
        (CanonicalLoRA(), r"nothing tells which Hugging Face modules"),
        (IA3(), r"target_modules=\['k_proj', 'v_proj'\]"),
    ],
)
def test_what_cannot_be_is_refused(method: Any, message: str, make_gpt: MakeGPT) -> None:
    def work() -> str:
        with pytest.raises(BridgeError) as refusal:
            copy.deepcopy(method)(make_gpt())
        return str(refusal.value)

    (told,) = run_ranks(1, work, timeout=60)
    import re

    assert re.search(message, told, re.DOTALL), told


def test_the_methods_are_offered_by_name() -> None:
    assert {"lora": LoRA, "dora": DoRA, "ia3": IA3, "canonical_lora": CanonicalLoRA}.items() <= {
        name: PEFT_METHODS[name] for name in PEFT_METHODS
    }.items()


def test_other_names_of_settings() -> None:
    assert LoRA(lora_rank=4, lora_alpha=9, lora_dropout=0.1) == LoRA(dim=4, alpha=9, dropout=0.1)
