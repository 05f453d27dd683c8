"""Adapters on the modules of a MIMO model learn as Hugging Face peft's do, and come and go as files.

The matrix of placements is in `test_mimo_parity.py`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from mimo_parity.cases import Case
from mimo_parity.placed import provider_of
from mimo_parity.reference import batch, load, saved, train
from mimo_parity.reference import logits as logits_of
from mimo_parity.run import run_of, trained, weights_of
from mimo_parity.subjects import SUBJECTS, llava_config
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.dist_checkpoint import tensor_index
from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo import ModuleOptimizerConfig
from megatron.bridge.mimo.conversion import save_hf_pretrained
from megatron.bridge.mimo.hf_adapter import save_hf_adapter
from megatron.bridge.mimo.predict import logits
from megatron.bridge.peft import IA3, BitFit, CanonicalLoRA, DoRA, LoRA
from megatron.bridge.peft.adapted_layer import without_adapters
from megatron.bridge.testing import run_ranks, save_random_model
from megatron.bridge.training.overrides import apply_yaml
from megatron.bridge.training.run_config import to_yaml

STEPS = 4
ONE = Case("one rank", "homogeneous", (1, 1, 1), (1, 1, 1))
COLOCATED = Case("colocated", "colocated", (1, 1, 2), (2, 1, 1), settings=("sequence_parallel",))
APART = Case("apart", "heterogeneous", (1, 1, 1), (1, 2, 1))
PAIR = Case("pair", "heterogeneous", (1, 1, 1), (1, 1, 1))
PROJECTOR = ("images.projector",)
# On the tower, and on a layer of the projector, of LLaVA and of Qwen2.5-VL.
ON_IMAGES: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "fc2", "linear_1"]}
ON_GRIDS: dict[str, Any] = {"target_modules": ["re:.*visual.*[.](qkv|proj)", "*.merger.mlp.2"]}


def lora_run(case: Case, folder: Path, trained: tuple[str, ...] = (), on_images: Any = None, **checkpoint: Any) -> Any:
    """A run at a constant learning rate, as the reference's."""
    cfg = run_of(case, folder, **checkpoint)
    cfg.peft = CanonicalLoRA(dim=4, alpha=8, target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    cfg.model.trained_beside_adapters = trained
    cfg.model.adapters = {} if on_images is None else {"images": on_images}
    cfg.optimizer.adam_beta2, cfg.optimizer.weight_decay = 0.95, 0.01
    cfg.scheduler.lr_decay_style, cfg.scheduler.lr_warmup_iters = "constant", 0
    return cfg


def tuned(cfg: Any, start: Path | None = None, end: Path | None = None) -> tuple[dict[int, float], Any]:
    """Losses of a run, and the weights with the adapter merged; adapters before and after go to peft's folders.

    What is beneath the adapters must stay, bit for bit.
    """
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
        with without_adapters(run.model):
            beneath = weights_of(cfg, run.model)
        files = load_file(Path(cfg.model.bridge.source.path_or_id) / "model.safetensors")
        stays = [name for name in files if not (cfg.model.trained_beside_adapters and "projector" in name)]
        assert all(beneath[name].equal(files[name]) for name in stays)
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
    folder, tower = tmp_path / "hf", LoRA(dim=2, alpha=6, target_modules=["q_proj", "v_proj", "fc2"])
    save_random_model(llava_config(), folder)

    def work(case: Case, first: bool = False) -> Any:
        if first:
            tuned(lora_run(case, folder, on_images=tower), tmp_path / "start of both")
        alone = tuned(lora_run(case, folder), tmp_path / "start" if first else None, tmp_path / case.name)
        return alone, tuned(lora_run(case, folder, PROJECTOR, tower))

    by_case = {ONE.name: run_ranks(1, lambda: work(ONE, first=True), timeout=200)[0]}
    by_case |= {
        case.name: run_ranks(case.ranks, lambda case=case: work(case), timeout=300)[0] for case in (COLOCATED, APART)
    }
    for number, (start, beside) in enumerate({"start": (), "start of both": PROJECTOR}.items()):
        losses, weights, adapters = tuned_by_peft(folder, tmp_path / start, beside)
        for name, outcomes in by_case.items():
            found, merged = outcomes[number]
            assert [*found.values()] == pytest.approx(losses, abs=1e-5), name
            expect_equal(merged, weights)
            if not beside:
                expect_equal(load_file(tmp_path / name / "adapter_model.safetensors"), adapters)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(
    ("subject", "on_images"),
    [
        ("experts", None),
        ("Qwen2.5-VL", None),
        (
            "Qwen2.5-VL",
            LoRA(dim=4, alpha=8, use_rslora=True, rank_pattern={"proj": 2}, alpha_pattern={"qkv": 3}, **ON_GRIDS),
        ),
    ],
    ids=["experts", "Qwen2.5-VL", "Qwen2.5-VL, images too"],
)
def test_adapters_compute_in_peft_what_they_compute_here(subject: str, on_images: Any, tmp_path: Path) -> None:
    save_random_model(SUBJECTS[subject].config(), tmp_path / "hf")
    asked = batch(subject, 0, 4, uneven=True)

    def work() -> torch.Tensor:
        provider = provider_of(replace(ONE, subject=subject), tmp_path / "hf")
        provider.adapters = {} if on_images is None else {"images": on_images}
        root = {"use_rslora": True} if getattr(on_images, "use_rslora", False) else {}
        method = CanonicalLoRA(dim=4, alpha=8, target_modules=["linear_qkv", "linear_proj"], **root)

        def adapt(chunks: list[Any]) -> None:
            chunks[0].bridge = provider.bridge
            provider.engine.adapt(method, chunks)

        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=adapt)
        for name, each in model.saved_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(each, std=0.1)
        save_hf_adapter(provider.bridge, model, tmp_path / "adapter")
        save_hf_pretrained(provider.bridge, model, tmp_path / "merged")
        return logits(provider.engine.runtime, [asked])[0]

    found = run_ranks(1, work, timeout=200)[0]
    base = load(tmp_path / "hf")
    before = logits_of(base, asked)
    expected = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), asked)
    assert (expected - before).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-4
    assert (found - logits_of(load(tmp_path / "merged"), asked)).abs().max() < 1e-4

    def back() -> None:
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
        model = bridge.to_megatron_model()
        if on_images is not None:
            with pytest.raises(BridgeError, match="changed no module for target_modules=.*MimoProvider.adapters"):
                bridge.load_hf_adapter(model, tmp_path / "adapter")
            return
        bridge.load_hf_adapter(model, tmp_path / "adapter")
        bridge.save_hf_adapter(model, tmp_path / "again")

    run_ranks(1, back, timeout=200)
    if on_images is not None:
        return
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert one.keys() == other.keys()
    assert all(other[name].equal(each) for name, each in one.items())


VIT = ("vit",)
ON_VIT: dict[str, Any] = {"target_modules": ["linear_qkv", "linear_proj", "linear_fc2", "linear_1"]}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("here", "settings", "on_images"),
    [
        (COLOCATED, (), DoRA(dim=2, alpha=6, **ON_IMAGES)),
        (Case("divided", "colocated", (2, 1, 1), (1, 1, 2), settings=VIT), VIT, LoRA(dim=2, alpha=6, **ON_VIT)),
    ],
    ids=["transformers' tower", "divided tower"],
)
def test_a_checkpoint_holds_adapters_alone_and_goes_on_elsewhere(
    here: Case, settings: tuple[str, ...], on_images: Any, tmp_path: Path
) -> None:
    folder, place = tmp_path / "hf", str(tmp_path / "saved")
    save_random_model(llava_config(), folder)
    # peft holds no DoRA beside LoRA.
    exported = None if isinstance(on_images, DoRA) else tmp_path / "adapter"

    def first() -> Any:
        whole = tuned(lora_run(here, folder, on_images=on_images), end=exported)
        cfg = lora_run(here, folder, on_images=on_images, save=place)
        cfg.train.exit_interval = 2
        tuned(cfg)
        return whole, tuned(lora_run(here, folder, on_images=on_images, load=place))

    (losses, weights), (resumed, there) = run_ranks(2, first, timeout=300)[0]
    assert resumed == {step: loss for step, loss in losses.items() if step > 2}
    assert all(there[name].equal(each) for name, each in weights.items())
    kept = [name for name in tensor_index(place) if not name.startswith("optimizer.")]
    assert {name.partition(".")[0] for name in kept} == {"language_model", "modality_submodules"}
    assert all(".adapters." in name for name in kept)
    cfg = lora_run(replace(APART, settings=settings), folder, on_images=on_images, load=place)
    apart, elsewhere = run_ranks(3, lambda: tuned(cfg), timeout=300)[0]
    assert apart == pytest.approx(resumed, abs=1e-5)
    expect_equal(elsewhere, weights)
    if exported is not None:
        merged = peft.PeftModel.from_pretrained(load(folder), exported).merge_and_unload()
        expect_equal(weights, saved(merged, {name: each.detach() for name, each in merged.named_parameters()}))


def test_what_cannot_be_adapted_is_refused_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_random_model(llava_config(), folder)

    def refused(cfg: Any) -> str:
        with pytest.raises(BridgeError) as error:
            tuned(cfg)
        return str(error.value)

    def work() -> list[str]:
        cfg = lora_run(APART, folder)
        cfg.peft = LoRA(target_modules=["vision_model"])
        nowhere = lora_run(APART, folder, on_images=LoRA(target_modules=["q_projj"]))
        twice = lora_run(APART, folder, PROJECTOR, on_images=LoRA(**ON_IMAGES))
        return [*map(refused, (cfg, nowhere, twice))]

    for unbound, nowhere, twice in run_ranks(3, work, timeout=200):
        assert "LoRA changed no module for target_modules=['vision_model']" in unbound
        assert "adapters of encoders (on rank 0): LoRA changed no module for target_modules=['q_projj']; did" in nowhere
        assert "adapters['images'] is on the projector (encoders.tower.multi_modal_projector.linear_1" in twice
        assert "trained_beside_adapters has 'images.projector'; leave the projector's layers out" in twice


def test_settings_that_contradict_adapters_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")

    def refused(**changes: Any) -> str:
        cfg = lora_run(ONE, tmp_path / "hf")
        for name, value in changes.items():
            setattr(cfg if name == "peft" else cfg.model, name, value)
        with pytest.raises(BridgeError) as error:
            cfg.validate(1)
        return str(error.value)

    told = refused(trained_beside_adapters=("images.projektor",), frozen_language=True)
    assert "'images.projektor': no such encoder; did you mean 'images.projector'" in told
    assert "frozen_language=True: peft adapts the language model" in told

    method = LoRA(**ON_IMAGES)
    for name, other in {"image": "did you mean 'images'", "images.projector": "name the projector's layers in"}.items():
        assert f"adapters['{name}']: " in (told := refused(adapters={name: method}))
        assert other in told
    assert "that is the language model, whose method is the run's" in refused(adapters={"language_module": method})
    assert "adapters['images']='lora' is no PEFT method" in refused(adapters={"images": "lora"})
    assert "IA3 has no adapters for the layers of towers; use LoRA or DoRA" in refused(adapters={"images": IA3()})
    twice = refused(adapters={"images": method}, trained_beside_adapters=("images",))
    assert "adapters['images'] keeps the encoder's weights, and trained_beside_adapters trains them" in twice
    bad = refused(adapters={"images": LoRA(dim=0, dropout=2)}, peft=LoRA(dim=0))
    assert "peft: dim=0 must be at least 1" in bad
    assert "model.adapters['images']: dim=0 must be at least 1" in bad
    assert "model.adapters['images']: dropout=2 must lie in [0, 1)" in bad
    rates = {"images.projector": ModuleOptimizerConfig(lr=1e-4)}
    both = refused(adapters={"images": LoRA(lora_plus_ratio=4, **ON_IMAGES)}, optimizers=rates)
    assert "model.adapters['images'] gives some weights rates of their own, and so does model.optimizers" in both
    beside = refused(trained_beside_adapters=PROJECTOR, peft=None)
    assert "model.trained_beside_adapters=['images.projector'] is set, and peft is not" in beside

    cfg = lora_run(ONE, tmp_path / "hf", on_images=method)
    cfg.model.encoders["images"].frozen = True
    with pytest.raises(BridgeError, match="the encoder is frozen, and so would its adapters be; leave frozen out"):
        cfg.validate(1)
    cfg.model.encoders["images"].frozen, cfg.model.load_weights = False, False
    with pytest.raises(BridgeError, match="trains beside weights that stay as they are, and nothing gives them"):
        cfg.validate(1)


def test_what_is_no_adapter_of_pefts_is_refused_when_a_run_begins(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")

    def work() -> list[str]:
        from megatron.bridge.training.hf_export import ExportHF
        from megatron.bridge.training.setup import distributed, setup

        told = []
        for beside, language, on_images in (
            (PROJECTOR, LoRA(), None),
            ((), None, LoRA(**ON_IMAGES)),
            ((), LoRA(), BitFit()),
            ((), LoRA(target_modules=["linear_proj"]), DoRA(**ON_IMAGES)),
            ((), LoRA(use_rslora=True), LoRA(**ON_IMAGES)),
        ):
            cfg = lora_run(ONE, tmp_path / "hf", beside, on_images)
            cfg.peft = language
            with distributed(cfg):
                run = setup(cfg)
                (encoder,) = run.model[0].encoders().values()
                learning = {name.rpartition(".")[2] for name, each in encoder.named_parameters() if each.requires_grad}
                assert (learning == {"bias"}) == isinstance(on_images, BitFit)
                with pytest.raises(BridgeError) as refused:
                    ExportHF(tmp_path / "adapter", adapter=True).on_train_start(run)
            told.append(str(refused.value))
        return told

    projector, language, biases, lengths, roots = run_ranks(1, work, timeout=200)[0]
    assert "'images' is trained beside the adapters, and peft's folder has no place for it" in projector
    assert "'language_model' is trained beside the adapters" in language
    assert "'images' is trained beside the adapters" in biases
    assert "one use_dora for all modules, and here 'language_model' has False and 'images' has True" in lengths
    assert "one use_rslora for all modules, and here 'language_model' has True and 'images' has False" in roots
    assert not (tmp_path / "adapter").exists()


def test_an_encoder_has_adapters_without_the_language_model(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    place = str(tmp_path / "saved")

    def work() -> Any:
        from megatron.bridge.training.hf_export import ExportHF

        method = LoRA(dim=2, alpha=6, lora_plus_ratio=4, **ON_IMAGES)
        cfg = lora_run(PAIR, tmp_path / "hf", on_images=method, save=place)
        cfg.peft, cfg.model.frozen_language = None, True
        return trained(cfg, [ExportHF(tmp_path / "adapter", adapter=True), ExportHF(tmp_path / "merged")])

    run_ranks(2, work, timeout=300)
    kept = [name for name in tensor_index(place) if not name.startswith("optimizer.")]
    assert kept
    assert all(name.startswith("modality_submodules.images.") and ".adapters." in name for name in kept)
    asked = batch("plain", 0, 4, uneven=True)
    base = load(tmp_path / "hf")
    before = logits_of(base, asked)
    adapted = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), asked)
    assert (adapted - before).abs().max() > 1e-4
    assert (adapted - logits_of(load(tmp_path / "merged"), asked)).abs().max() < 1e-5


def test_a_configuration_with_adapters_goes_through_yaml(tmp_path: Path) -> None:
    save_random_model(llava_config(), tmp_path / "hf")
    cfg = lora_run(ONE, tmp_path / "hf", PROJECTOR, LoRA(dim=2, target_modules=["q_proj"]))
    written = to_yaml(cfg)
    (tmp_path / "run.yaml").write_text(written)
    apply_yaml(cfg, tmp_path / "run.yaml")
    assert to_yaml(cfg) == written
    assert "target_modules=['q_proj']" in yaml.safe_load(written)["model"]["adapters"]["images"]
