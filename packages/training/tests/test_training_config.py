"""Configuration: what is wrong is refused by name, all of it at once, and nothing is half applied."""

import copy
import itertools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnBackend

from megatron.bridge import platform
from megatron.bridge.models import GPTModelProvider
from megatron.bridge.training.cli import train
from megatron.bridge.training.config_origins import values_of
from megatron.bridge.training.field_types import parse_yaml
from megatron.bridge.training.overrides import apply_overrides, apply_yaml
from megatron.bridge.training.recipe_registry import RECIPES
from megatron.bridge.training.run_config import to_yaml
from megatron.bridge.training.scheduler import build_scheduler
from megatron.bridge.training.setup import setup
from megatron.bridge.training.validation import ConfigError


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.train_iters=7", lambda cfg: cfg.train.train_iters, 7),
        ("optimizer.lr=1e-4", lambda cfg: cfg.optimizer.lr, 1e-4),
        ("optimizer.lr=1", lambda cfg: cfg.optimizer.lr, 1.0),
        ("checkpoint.save=null", lambda cfg: cfg.checkpoint.save, None),
        ("checkpoint.save=123", lambda cfg: cfg.checkpoint.save, "123"),
        ("checkpoint.save=a=b", lambda cfg: cfg.checkpoint.save, "a=b"),
        ("checkpoint.save=on", lambda cfg: cfg.checkpoint.save, "on"),
        ("ddp.overlap_grad_reduce=true", lambda cfg: cfg.ddp.overlap_grad_reduce, True),
        ("dataset.data_paths=[a, b]", lambda cfg: cfg.dataset.data_paths, ["a", "b"]),
        ("dataset.split=9,1,0", lambda cfg: cfg.dataset.split, "9,1,0"),
        ("scheduler.lr_decay_style=linear", lambda cfg: cfg.scheduler.lr_decay_style, "linear"),
        ("model.tensor_model_parallel_size=2", lambda cfg: cfg.model.tensor_model_parallel_size, 2),
        ("model.params_dtype=bf16", lambda cfg: cfg.model.params_dtype, torch.bfloat16),
        ("model.activation_func=torch.tanh", lambda cfg: cfg.model.activation_func, torch.tanh),
        ("model.attention_backend=flash", lambda cfg: cfg.model.attention_backend, AttnBackend.flash),
        ("model.rope_parameters={rope_type: linear, factor: 2.0}", lambda cfg: cfg.model.rope_parameters,
         {"rope_type": "linear", "factor": 2.0}),
    ],
)  # fmt: skip
def test_overrides_are_read_as_their_fields_want_them(
    override: str, read: Callable[[Any], Any], value: Any, make_run: Callable[..., Any]
) -> None:
    cfg = make_run()
    apply_overrides(cfg, [override])
    assert read(cfg) == value
    assert type(read(cfg)) is type(value)


def test_all_bad_overrides_are_reported_and_none_is_applied(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    before = copy.deepcopy(cfg)
    wrong = {
        "train.train_iter=3": r"train \(TrainingConfig\) has no field 'train_iter'; did you mean 'train_iters'",
        "trian.train_iters=3": "the configuration has no field 'trian'; did you mean 'train'",
        "model.save_interval=3": "did you mean 'checkpoint.save_interval'",
        "train.train_iters=abc": "train.train_iters: expected int",
        "train.train_iters=1.5": "train.train_iters: expected int",
        "train.eval_iters=true": "train.eval_iters: expected int",
        "optimizer.lr=fast": r"optimizer.lr: expected float \| null",
        "ddp.overlap_grad_reduce=1": "ddp.overlap_grad_reduce: expected bool",
        "scheduler.lr_decay_style=cosin": "scheduler.lr_decay_style: expected .*'cosine'",
        "model.params_dtype=bf17": "'bf17' is no dtype",
        "model.activation_func=torch.nn.functional.sulu": "cannot be imported",
        "model.attention_backend=flesh": "'flesh' is none of flash",
        "train=3": "'train' is a section; set one of its fields, e.g. train.train_iters=...",
        "train.train_iters.more=3": "has no fields",
        "train.train_iters": "is no override; write key=value",
    }
    with pytest.raises(ConfigError) as caught:
        apply_overrides(cfg, ["train.train_iters=99", *wrong])
    message = str(caught.value)
    assert f"{len(wrong)} problems" in message
    for pattern in wrong.values():
        assert re.search(pattern, message), (pattern, message)
    assert cfg == before


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_writes_is_read_back(number: float) -> None:
    assert parse_yaml(repr(number)) == number


def test_a_yaml_file_sets_sections_and_must_be_of_the_same_classes(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  train_iters: 3\noptimizer:\n  lr: 1e-2\n")
    cfg = make_run()
    apply_yaml(cfg, file)
    assert (cfg.train.train_iters, cfg.optimizer.lr) == (3, 0.01)

    file.write_text(to_yaml(cfg).replace("GPTDatasetConfig", "OtherDataset") + "nonsense: 1\n")
    with pytest.raises(
        ConfigError, match=r"dataset is a .*GPTDatasetConfig here, the file was written for a .*Other"
    ) as caught:
        apply_yaml(cfg, file)
    assert "unknown key 'nonsense'" in str(caught.value)
    file.write_text("just text")
    with pytest.raises(ConfigError, match="holds no sections"):
        apply_yaml(cfg, file)
    with pytest.raises(ConfigError, match="cannot be read"):
        apply_yaml(cfg, tmp_path / "absent.yaml")


def test_a_configuration_written_and_read_is_the_same(make_run: Callable[..., Any], tmp_path: Path) -> None:
    cfg = make_run({"params_dtype": torch.bfloat16, "bf16": True, "attention_backend": AttnBackend.flash}, lr=1e-4)
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    again = make_run()
    apply_yaml(again, tmp_path / "run.yaml")
    assert again == cfg


@pytest.mark.parametrize(
    ("model", "settings", "world", "problem"),
    [
        ({"tensor_model_parallel_size": 2}, {}, 3, "needs a multiple of 2 ranks.*, and there are 3"),
        ({"tensor_model_parallel_size": 3}, {}, 3, "parallel_size=3 does not divide num_attention_heads=4"),
        ({}, {"global_batch_size": 9}, 2, "train.global_batch_size=9 is not a multiple of .* = 2; 8 would do"),
        ({}, {"train_iters": 0}, 1, "train.train_iters=0 must be greater than 0"),
        ({}, {"sequence_length": 32}, 1, "dataset.sequence_length=32 and model.seq_length=16 differ"),
        ({}, {"lr_warmup_iters": 40}, 1, "lr_warmup_iters=40 must be less than the 40 steps"),
        ({}, {"lr_warmup_fraction": 0.1}, 1, "both set; keep one"),
        ({}, {"min_lr": 1.0}, 1, "optimizer.min_lr=1.0 is greater than optimizer.lr"),
        ({}, {"lr": None}, 1, "optimizer.lr=None must be set"),
        ({}, {"optimizer": "sgd"}, 1, "'sgd' is not supported; 'adam'"),
        ({}, {"save_interval": 5}, 1, "checkpoint.save is not: there is no folder"),
        ({"bf16": True}, {}, 1, "model.bf16=True and model.params_dtype=float32 contradict"),
        ({}, {"bf16": True}, 1, "the model decides the precision"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 17}, {}, 2, "seq_length=17 is not"),
        ({"context_parallel_size": 2, "seq_length": 18}, {}, 2,
         "seq_length=18 is not divided by 2 x model.context_parallel_size=2; 16 would do"),
        ({"context_parallel_size": 2}, {}, 3, "x context_parallel_size=2 needs a multiple of 2 ranks"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {"global_batch_size": 3}, 2,
         "an interleaved pipeline needs the micro-batches per step"),
        ({"vocab_size": 100}, {"vocab_size": 128}, 1, "tokenizer.vocab_size=128 is larger than model.vocab_size=100"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_remedy(
    model: dict[str, Any], settings: dict[str, Any], world: int, problem: str, make_run: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_run(model, **settings).validate(world)


def test_the_two_optimizer_sections_must_agree(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    cfg.ddp.use_distributed_optimizer = True
    with pytest.raises(ConfigError, match=r"optimizer.use_distributed_optimizer=False and ddp.* differ"):
        cfg.validate(1)


def test_problems_are_reported_together(make_run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="3 problems"):
        make_run(micro_batch_size=-1, save_interval=2, optimizer="sgd").validate(1)


def test_the_command_trains_a_recipe_with_overrides(make_run: Callable[..., Any], tmp_path: Path) -> None:
    RECIPES.register("tiny_test_recipe", make_run)
    try:
        arguments = [
            "--recipe",
            "tiny_test_recipe",
            "--nproc",
            "2",
            "train.train_iters=2",
            f"checkpoint.save={tmp_path}",
        ]
        done = CliRunner().invoke(train, [*arguments, "model.tensor_model_parallel_size=2"], catch_exceptions=False)
        assert done.exit_code == 0
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
        with pytest.raises(ConfigError, match="needs a multiple of 4 ranks"):
            CliRunner().invoke(train, [*arguments, "model.tensor_model_parallel_size=4"], catch_exceptions=False)
    finally:
        RECIPES.unregister("tiny_test_recipe")


def test_ctrl_c_saves_and_the_command_succeeds(make_run: Callable[..., Any], tmp_path: Path) -> None:
    class Interrupting(torch.utils.data.Dataset[Any]):
        """Its sample 16, in the third step, presses Ctrl-C in the command's process and in one rank."""

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 16:
                os.kill(os.getppid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            text = torch.arange(17) + index % 100
            ones = torch.ones(16)
            return {"tokens": text[:-1], "labels": text[1:], "loss_mask": ones, "position_ids": torch.arange(16)}

    def recipe() -> Any:
        cfg = make_run(train_iters=50, save=str(tmp_path))
        cfg.dataset.build_train_valid_test_datasets = lambda context: (Interrupting(), None, None)
        return cfg

    handler = signal.getsignal(signal.SIGINT)
    RECIPES.register("interrupted_test_recipe", recipe)
    try:
        arguments = ["--recipe", "interrupted_test_recipe", "--nproc", "2"]
        done = CliRunner().invoke(train, arguments, catch_exceptions=False)
    finally:
        RECIPES.unregister("interrupted_test_recipe")
    assert done.exit_code == 0
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert signal.getsignal(signal.SIGINT) is handler


def _rates(cfg: Any, steps: int) -> tuple[list[float], list[float]]:
    """Learning rate and weight decay of the first steps."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "max_lr": cfg.optimizer.lr, "min_lr": cfg.optimizer.min_lr}])
    scheduler = build_scheduler(cfg, optimizer)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        found[0].append(optimizer.param_groups[0]["lr"])
        found[1].append(optimizer.param_groups[0]["weight_decay"])
        scheduler.step(cfg.train.global_batch_size)
    return found


def test_schedules_are_those_of_their_papers(make_run: Callable[..., Any]) -> None:
    shared = {"train_iters": 20, "lr_decay_iters": 20, "lr": 1.0, "min_lr": 0.1}
    cfg = make_run(
        lr_decay_style="WSD", lr_wsd_decay_iters=10, lr_wsd_decay_style="linear", lr_warmup_iters=2, **shared
    )
    expected = [0.0, 0.5, *[1.0] * 9, *(1 - 0.9 * step / 10 for step in range(1, 10))]
    assert _rates(cfg, 20)[0] == pytest.approx(expected)
    cfg = make_run(lr_decay_style="inverse-square-root", lr_warmup_iters=4, **shared)
    assert _rates(cfg, 17)[0][4:] == pytest.approx([(4 / step) ** 0.5 for step in range(4, 17)])
    cfg = make_run(
        lr_decay_style="constant", start_weight_decay=0.1, end_weight_decay=0.3, weight_decay_incr_style="linear",
        **shared,
    )  # fmt: skip
    assert _rates(cfg, 20)[1] == pytest.approx([0.1 + 0.2 * step / 20 for step in range(20)])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lr_decay_style": "WSD"}, "needs scheduler.lr_wsd_decay_iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 39}, "must lie between 1 and the 38 steps"),
        ({"lr_wsd_decay_iters": 5}, "belongs to lr_decay_style='WSD', and that is 'cosine'"),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 0}, "set lr_warmup_iters"),
        ({"end_weight_decay": 0.3}, "from 0.1 to 0.3, and scheduler.weight_decay_incr_style is 'constant'"),
        ({"end_weight_decay": 0.05, "weight_decay_incr_style": "linear"}, "must not be negative, nor fall"),
        ({"most_recent_k": 0, "save": "somewhere"}, "checkpoint.most_recent_k=0 must be greater than 0"),
        ({"most_recent_k": 2}, "checkpoint.most_recent_k is set, but checkpoint.save is not"),
        ({"async_save": True}, "checkpoint.async_save is set, but checkpoint.save is not"),
    ],
)
def test_schedules_and_retention_that_cannot_be_are_refused(
    settings: dict[str, Any], problem: str, make_run: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_run(**settings).validate(1)


def test_every_misspelled_key_is_refused_by_name(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    keys = [each.key for each in values_of(cfg)]
    assert len(keys) > 300
    known = set(keys)
    for key in keys:
        wrong = key[:-1] if key[:-1] not in known else f"{key}x"
        with pytest.raises(ConfigError, match=rf"unknown key '{re.escape(wrong)}'.*did you mean"):
            apply_overrides(cfg, [f"{wrong}=1"])


def test_every_value_of_another_type_is_refused_by_name(make_run: Callable[..., Any]) -> None:
    cfg = make_run()
    # A word is no number, flag or choice; a number is no list.
    wrong = {"int": "many", "float": "much", "bool": "perhaps", "Literal": "neither", "list": "1.5"}
    tried = 0
    for each in values_of(cfg):
        kinds = [part.strip() for part in each.kind.split("|")]
        named = [kind for kind in wrong if any(part.startswith(kind) for part in kinds)]
        # Any text will do where text is allowed.
        if not named or any(part.startswith(("str", "dict", "Any", "Callable", "collections")) for part in kinds):
            continue
        with pytest.raises(ConfigError, match=re.escape(each.key)):
            apply_overrides(cfg, [f"{each.key}={wrong[named[0]]}"])
        tried += 1
    assert tried > 200


# What is divided -> (by what, how: (size, parts) -> the model's fields, the settings and the ranks).
type Misfit = tuple[dict[str, Any], dict[str, Any], int]
EXPERTS = {"moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none"}


def _heads(count: int) -> dict[str, int]:
    return {"num_attention_heads": count, "num_query_groups": count, "hidden_size": 8 * count}


def _tensor(parts: int) -> dict[str, int]:
    return {"tensor_model_parallel_size": parts, "ffn_hidden_size": 8 * parts}


DIVIDED: dict[tuple[str, str], Callable[[int, int], Misfit]] = {
    ("num_attention_heads", "tensor_model_parallel_size"): lambda size, parts: (
        _heads(size) | _tensor(parts), {}, parts,
    ),
    ("num_query_groups", "tensor_model_parallel_size"): lambda size, parts: (
        _heads(size * parts) | _tensor(parts) | {"num_query_groups": size}, {}, parts,
    ),
    ("ffn_hidden_size", "tensor_model_parallel_size"): lambda size, parts: (
        _heads(parts) | _tensor(parts) | {"ffn_hidden_size": size}, {}, parts,
    ),
    ("seq_length", "tensor_model_parallel_size"): lambda size, parts: (
        _heads(parts) | _tensor(parts) | {"sequence_parallel": True, "seq_length": size},
        {"sequence_length": size}, parts,
    ),
    ("seq_length", "context_parallel_size"): lambda size, parts: (
        {"context_parallel_size": parts, "seq_length": size}, {"sequence_length": size}, parts,
    ),
    ("num_layers", "pipeline_model_parallel_size"): lambda size, parts: (
        {"pipeline_model_parallel_size": parts, "num_layers": size}, {}, parts,
    ),
    ("num_layers", "virtual_pipeline_model_parallel_size"): lambda size, parts: (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": parts, "num_layers": size}, {}, 2,
    ),
    ("num_moe_experts", "expert_model_parallel_size"): lambda size, parts: (
        {"num_moe_experts": size, "expert_model_parallel_size": parts, **EXPERTS}, {}, parts,
    ),
    ("moe_ffn_hidden_size", "expert_tensor_parallel_size"): lambda size, parts: (
        {"num_moe_experts": 8, "expert_tensor_parallel_size": parts, "moe_ffn_hidden_size": size, **EXPERTS}, {}, parts,
    ),
    ("train.global_batch_size", "data-parallel ranks"): lambda size, parts: ({}, {"global_batch_size": size}, parts),
    ("train.global_batch_size", "train.micro_batch_size"): lambda size, parts: (
        {}, {"global_batch_size": size, "micro_batch_size": parts}, 1,
    ),
    ("ranks", "tensor_model_parallel_size"): lambda size, parts: (
        _heads(parts) | _tensor(parts), {}, size,
    ),
}  # fmt: skip


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(GPTModelProvider, "provide", build)
    monkeypatch.setattr(GPTModelProvider, "initialize_model_parallel", build)


def test_every_size_that_is_not_divided_is_refused_by_name(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, nothing_is_built: None
) -> None:
    tried = 0
    for (divided, by), misfit in DIVIDED.items():
        for size, parts in itertools.product((12, 20, 28, 36, 44, 45, 49), range(2, 9)):
            if size % parts == 0:
                continue
            model, settings, ranks = misfit(size, parts)
            monkeypatch.setattr(platform, "world_size", lambda ranks=ranks: ranks)
            with pytest.raises(ConfigError) as caught:
                setup(make_run(model, **({"global_batch_size": 840} | settings)))
            assert divided in str(caught.value), (divided, by, size, parts, str(caught.value))
            assert by in str(caught.value), (divided, by, size, parts, str(caught.value))
            tried += 1
    assert tried >= 300


def test_sizes_that_are_divided_are_taken(make_run: Callable[..., Any]) -> None:
    for parts in (2, 4, 5):
        for misfit in DIVIDED.values():
            model, settings, ranks = misfit(40, parts)
            make_run(model, **({"global_batch_size": 840} | settings)).validate(ranks)
