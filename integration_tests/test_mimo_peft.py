"""Adapters on the language model of a MIMO model learn as Hugging Face peft's do, wherever the modules stand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mimo_parity.cases import Case
from mimo_parity.placed import provider_of
from mimo_parity.reference import batch, load, saved, train
from mimo_parity.reference import logits as logits_of
from mimo_parity.run import run_of, weights_of
from mimo_parity.subjects import SUBJECTS, llava_config
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.dist_checkpoint import tensor_index
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.adapters import save_hf_adapter
from megatron.bridge.mimo.predict import logits
from megatron.bridge.peft import LoRA
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.testing import run_ranks, save_random_model

STEPS = 4
ONE = Case("one rank", "homogeneous", (1, 1, 1), (1, 1, 1))
COLOCATED = Case("colocated", "colocated", (1, 1, 2), (2, 1, 1), settings=("sequence_parallel",))
APART = Case("apart", "heterogeneous", (1, 1, 1), (1, 2, 1))
PROJECTOR = ("images.projector",)


def lora_run(case: Case, folder: Path, trained: tuple[str, ...] = (), **checkpoint: Any) -> Any:
    """A run at a constant learning rate, as the reference's."""
    cfg = run_of(case, folder, **checkpoint)
    cfg.peft = CanonicalLoRA(dim=4, alpha=8, target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    cfg.model.trained_beside_adapters = trained
    cfg.optimizer.adam_beta2, cfg.optimizer.weight_decay = 0.95, 0.01
    cfg.scheduler.lr_decay_style, cfg.scheduler.lr_warmup_iters = "constant", 0
    return cfg


def tuned(cfg: Any, start: Path | None = None, end: Path | None = None) -> tuple[dict[int, float], Any]:
    """Losses of a run, and the weights with the adapter merged; adapters before and after go to peft's folders."""
    from megatron.bridge.mimo.mimo_step import forward_step
    from megatron.bridge.training.setup import distributed, setup
    from megatron.bridge.training.train import train as train_run

    with distributed(cfg):
        run = setup(cfg)
        if start is not None:
            run.engine.save_hf_adapter(cfg.model.bridge, run.model, start)
        losses = train_run(run, forward_step).losses
        if end is not None:
            run.engine.save_hf_adapter(cfg.model.bridge, run.model, end)
        return losses, weights_of(cfg, run.model)


def tuned_by_peft(folder: Path, adapter: Path, trained: tuple[str, ...] = ()) -> tuple[list[float], Any, Any]:
    """Losses, merged weights and adapter weights of the same steps in transformers and peft."""
    model = peft.PeftModel.from_pretrained(load(folder), adapter, is_trainable=True)
    for name, each in model.named_parameters():
        if trained and "multi_modal_projector" in name:
            each.requires_grad_(True)
    steps = [[batch("plain", 8 * step + each, 1, uneven=True) for each in range(8)] for step in range(STEPS)]
    losses, _, _ = train(model, steps)
    adapters = {name: each.clone() for name, each in peft.get_peft_model_state_dict(model).items()}
    whole = model.merge_and_unload()
    return losses, saved(whole, {name: each.detach() for name, each in whole.named_parameters()}), adapters


def expect_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        most = max(float(each.abs().max()), 1e-3)
        assert float((found[name] - each).abs().max()) < 1e-4 * most, name


@pytest.mark.timeout(600)
def test_adapters_learn_as_peft_teaches_them(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_random_model(llava_config(), folder)

    def work(case: Case, first: bool = False) -> Any:
        alone = tuned(lora_run(case, folder), tmp_path / "start" if first else None, tmp_path / case.name)
        return alone, tuned(lora_run(case, folder, PROJECTOR))

    by_case = {ONE.name: run_ranks(1, lambda: work(ONE, first=True), timeout=200)[0]}
    by_case |= {
        case.name: run_ranks(case.ranks, lambda case=case: work(case), timeout=300)[0] for case in (COLOCATED, APART)
    }
    for number, trained in enumerate(((), PROJECTOR)):
        losses, weights, adapters = tuned_by_peft(folder, tmp_path / "start", trained)
        for name, outcomes in by_case.items():
            found, merged = outcomes[number]
            assert [*found.values()] == pytest.approx(losses, abs=1e-5), name
            expect_equal(merged, weights)
            if not trained:
                expect_equal(load_file(tmp_path / name / "adapter_model.safetensors"), adapters)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("subject", ["experts", "Qwen2.5-VL"])
def test_adapters_of_other_models_compute_in_peft_what_they_compute_here(subject: str, tmp_path: Path) -> None:
    save_random_model(SUBJECTS[subject].config(), tmp_path / "hf")
    asked = batch(subject, 0, 4, uneven=True)

    def work() -> torch.Tensor:
        provider = provider_of(replace(ONE, subject=subject), tmp_path / "hf")
        method = CanonicalLoRA(dim=4, alpha=8, target_modules=["linear_qkv", "linear_proj"])

        def adapt(chunks: list[Any]) -> None:
            chunks[0].bridge = provider.bridge
            provider.engine.adapt(method, chunks)

        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=adapt)
        for name, each in model.saved_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(each, std=0.1)
        save_hf_adapter(provider.bridge, model, tmp_path / "adapter")
        return logits(provider.engine.runtime, [asked])[0]

    found = run_ranks(1, work, timeout=200)[0]
    base = load(tmp_path / "hf")
    before = logits_of(base, asked)
    expected = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), asked)
    assert (expected - before).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-4

    def back() -> None:
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
        model = bridge.to_megatron_model()
        bridge.load_hf_adapter(model, tmp_path / "adapter")
        bridge.save_hf_adapter(model, tmp_path / "again")

    run_ranks(1, back, timeout=200)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert one.keys() == other.keys()
    assert all(other[name].equal(each) for name, each in one.items())


@pytest.mark.timeout(600)
def test_a_checkpoint_holds_adapters_alone_and_goes_on_elsewhere(tmp_path: Path) -> None:
    folder, place = tmp_path / "hf", str(tmp_path / "saved")
    save_random_model(llava_config(), folder)

    def first() -> Any:
        whole = tuned(lora_run(COLOCATED, folder))
        cfg = lora_run(COLOCATED, folder, save=place)
        cfg.train.exit_interval = 2
        tuned(cfg)
        return whole, tuned(lora_run(COLOCATED, folder, load=place))

    (losses, weights), (resumed, there) = run_ranks(2, first, timeout=300)[0]
    assert resumed == {step: loss for step, loss in losses.items() if step > 2}
    assert all(there[name].equal(each) for name, each in weights.items())
    kept = [name for name in tensor_index(place) if not name.startswith("optimizer.")]
    assert kept
    assert all(name.startswith("language_model.") and ".adapters." in name for name in kept)
    apart, elsewhere = run_ranks(3, lambda: tuned(lora_run(APART, folder, load=place)), timeout=300)[0]
    assert apart == pytest.approx(resumed, abs=1e-5)
    expect_equal(elsewhere, weights)


def test_what_cannot_be_adapted_is_refused_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_random_model(llava_config(), folder)

    def work() -> list[str]:
        cfg = lora_run(APART, folder)
        cfg.peft = LoRA(target_modules=["vision_model"])
        with pytest.raises(BridgeError) as unbound:
            tuned(cfg)
        return [str(unbound.value)]

    for (unbound,) in run_ranks(3, work, timeout=200):
        assert "LoRA changed no module for target_modules=['vision_model']" in unbound


def test_settings_that_contradict_adapters_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    cfg = lora_run(ONE, tmp_path / "hf", ("images.projektor",))
    cfg.model.frozen_language = True
    with pytest.raises(BridgeError) as refused:
        cfg.validate(1)
    assert "'images.projektor': no such encoder; did you mean 'images.projector'" in str(refused.value)
    assert "frozen_language=True: peft adapts the language model" in str(refused.value)


def test_an_adapter_beside_a_trained_projector_is_no_adapter_of_pefts(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")

    def work() -> str:
        from megatron.bridge.training.hf_export import ExportHF
        from megatron.bridge.training.setup import distributed, setup

        cfg = lora_run(ONE, tmp_path / "hf", PROJECTOR)
        with distributed(cfg):
            run = setup(cfg)
            with pytest.raises(BridgeError) as refused:
                ExportHF(tmp_path / "adapter", adapter=True).on_train_start(run)
        return str(refused.value)

    assert "'images' is trained beside the adapters, and peft's folder has no place for it" in run_ranks(1, work)[0]
    assert not (tmp_path / "adapter").exists()
