"""Megatron-LM's arguments become a configuration that means the same; its own parser is the judge."""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.bridge.cli.root import run
from megatron.bridge.errors import BridgeError
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.migration.arguments import ARGUMENTS, OLDER, rule_of
from megatron.bridge.training.migration.patterns import pattern
from megatron.bridge.training.migration.recipe import megatron_lm
from megatron.bridge.training.migration.script import launched_by
from megatron.bridge.training.migration.translation import Translation, translate
from megatron.bridge.training.overrides import apply_yaml

SCRIPTS = Path(__file__).parent / "megatron_lm"
# Script, its parameters, and the Hugging Face tokenizer that takes its own's place.
CASES = {
    "llama3_8b": ([], None),
    "mixtral_8x7b": (["checkpoints", "tokenizer.model", "data/text"], "mistralai/Mixtral-8x7B-v0.1"),
    "gpt3_175b": (["checkpoints", "vocab.json", "merges.txt", "data/text"], "gpt2"),
}
SMALL = [
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--max-position-embeddings", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3"),
    *("--train-iters", "10", "--vocab-size", "128", "--mock-data", "--tokenizer-type", "NullTokenizer"),
]


def of_script(name: str) -> tuple[tuple[str, ...], int | None, Translation]:
    """The arguments of a script, its ranks, and their translation."""
    parameters, tokenizer = CASES[name]
    launched = launched_by(SCRIPTS / f"{name}.sh", parameters)
    translation = translate(launched.words, world_size=launched.world_size, tokenizer=tokenizer)
    return launched.words, launched.world_size, translation


def configured(translation: Translation, folder: Path) -> ConfigContainer:
    file = folder / "translated.yaml"
    file.write_text(translation.to_yaml())
    cfg = megatron_lm()
    apply_yaml(cfg, file)
    return cfg


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Megatron-LM's own."""
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def arguments_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    found = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}
    return {name: action for name, action in found.items() if name not in ("help", "-h")}


def test_every_argument_of_megatron_lm_has_an_entry_and_no_other(parser: argparse.ArgumentParser) -> None:
    theirs = arguments_of(parser)
    assert len(theirs) > 800
    assert sorted(name for name in theirs if rule_of(name) is None) == []
    assert sorted(ARGUMENTS.keys() - theirs.keys()) == sorted(OLDER)


def test_each_takes_as_many_words(parser: argparse.ArgumentParser) -> None:
    theirs = arguments_of(parser)
    for name, rule in ARGUMENTS.items():
        if rule.arity is not None and name in theirs:
            words = {0: "none", None: "one"}.get(theirs[name].nargs, "many")
            assert rule.arity == words, name


# Where our default differs on purpose, and why.
OTHERWISE = {
    "exit-signal-handler": "a run here always stops gracefully",
    "dataloader-type": "None is single",
    "profile-ranks": "rank 0 here",
    "mock-data": "given or not, the file says where data come from",
    "micro-batch-size": "asked for",
    "global-batch-size": "asked for, or computed",
    "split": "Megatron-LM sets 969, 30, 1 later",
    "distributed-backend": "None is what the machine has",
    "save-interval": "None on both sides",
    "moe-layer-freq": "1 on both sides",
}


def test_what_is_not_given_is_as_in_megatron_lm(parser: argparse.ArgumentParser) -> None:
    cfg, theirs, compared = megatron_lm(), arguments_of(parser), {}
    needed = {"num-layers", "hidden-size", "num-attention-heads", "seq-length", "encoder-seq-length"}
    for name, rule in ARGUMENTS.items():
        if name not in theirs or not rule.fields or name in needed or name in OTHERWISE:
            continue
        ours = held(cfg, rule.fields[0])
        default = theirs[name].default
        if rule.arity == "none":
            default = not rule.value
        elif isinstance(default, str | int | float) and rule.read is not None:
            default = rule.read(str(default))
        compared[name] = (ours, default)
    assert {name: pair for name, pair in compared.items() if not same(*pair)} == {}
    assert len(compared) > 150


def held(cfg: ConfigContainer, key: str) -> Any:
    section, _, field = key.partition(".")
    return getattr(getattr(cfg, section), field)


def is_dtype(value: Any) -> bool:
    return type(value).__name__ == "dtype"


def same(ours: Any, theirs: Any) -> bool:
    """Equal, or both nothing: an empty list, zero samples."""
    ours, theirs = (str(each).removeprefix("torch.") if is_dtype(each) else each for each in (ours, theirs))
    return ours == theirs or (not ours and not theirs)


def of_megatron_lm(words: Sequence[str], world_size: int | None, patch: pytest.MonkeyPatch) -> Any:
    """The configuration that Megatron-LM itself makes of its arguments."""
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    patch.setattr(sys, "argv", ["pretrain_gpt.py", *words, "--no-rope-fusion"])  # without Transformer Engine
    patch.setenv("WORLD_SIZE", str(world_size))
    patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    patch.setattr(arguments, "_print_args", lambda title, args: None)
    patch.setattr(arguments, "get_device_arch_version", lambda: 9)
    args = arguments.validate_args(arguments.parse_args())
    return args, core_transformer_config_from_args(args)


# Fields in which the two differ, none of which changes what is computed: kernels, and what follows from others.
SAME_RESULT = {
    "add_qkv_bias",  # follows add_bias_linear
    "cp_comm_type",  # None is p2p
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
    "use_cpu_initialization",  # None is False
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "deallocate_pipeline_outputs",
    "inference_sampling_seed",
    "rotary_percent",
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_that_megatron_lm_makes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, world_size, translation = of_script(name)
    args, theirs = of_megatron_lm(words, world_size, monkeypatch)
    cfg = configured(translation, tmp_path)
    ours = cfg.model.transformer_config()
    differing = {
        field.name: (getattr(ours, field.name), getattr(theirs, field.name))
        for field in dataclasses.fields(theirs)
        if field.name not in SAME_RESULT and not alike(getattr(ours, field.name), getattr(theirs, field.name))
    }
    assert differing == {}
    assert cfg.model.rotary_base == args.rotary_base
    assert cfg.model.position_embedding_type == args.position_embedding_type
    assert cfg.model.share_embeddings_and_output_weights == (not args.untie_embeddings_and_output_weights)
    assert cfg.ddp.grad_reduce_in_fp32 == args.accumulate_allreduce_grads_in_fp32
    keys = {key for rule in ARGUMENTS.values() for key in rule.fields if key.startswith(("opt", "sched", "train"))}
    pairs = {key: (held(cfg, key), getattr(args, key.partition(".")[2], None)) for key in keys - MADE_LATER}
    assert {key: pair for key, pair in pairs.items() if not same(*pair)} == {}


# Megatron-LM fills these in from others; here that happens when the run starts. And a run here always stops gracefully.
MADE_LATER = {"scheduler.start_weight_decay", "scheduler.end_weight_decay", "train.exit_signal_handler"}


def alike(ours: Any, theirs: Any) -> bool:
    """Equal, or functions of the same make."""
    if callable(ours) and callable(theirs):
        return getattr(ours, "__qualname__", "") == getattr(theirs, "__qualname__", "")
    return bool(ours == theirs)


def test_fields_of_the_scripts() -> None:
    _, ranks, llama = of_script("llama3_8b")
    assert ranks == 16
    assert llama.run_folder == "checkpoints/llama3_8b"
    assert llama.values["model.num_query_groups"] == 8
    assert llama.values["dataset.sequence_length"] == llama.values["model.seq_length"] == 8192
    assert llama.values["dist.timeout_seconds"] == 3600.0
    assert "model.sequence_parallel" not in llama.values
    _, ranks, mixtral = of_script("mixtral_8x7b")
    assert ranks == 32
    assert mixtral.values["model.virtual_pipeline_model_parallel_size"] == 2
    assert mixtral.values["tokenizer.tokenizer_model"] == "mistralai/Mixtral-8x7B-v0.1"
    _, _, gpt = of_script("gpt3_175b")
    assert gpt.values["checkpoint.pretrained_checkpoint"] == "checkpoints/old"
    assert gpt.values["train.rampup_batch_size"] == [16, 16, 5859375]


@pytest.mark.parametrize("name", CASES)
def test_the_command_writes_what_config_show_accepts(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parameters, tokenizer = CASES[name]
    words = ["migrate", "megatron-lm", "--script", str(SCRIPTS / f"{name}.sh"), "-o", str(tmp_path / "made.yaml")]
    words += ["--tokenizer", tokenizer] if tokenizer else []
    assert run([*words, "--", *parameters]) == 0
    assert f"megatron-bridge train --recipe megatron_lm --config {tmp_path}/made.yaml" in capfd.readouterr().out
    assert run(["config", "show", "--recipe", "megatron_lm", "--config", str(tmp_path / "made.yaml")]) == 0
    shown = yaml.safe_load(capfd.readouterr().out)
    made = yaml.safe_load((tmp_path / "made.yaml").read_text())
    assert shown["model"]["num_layers"] == made["model"]["num_layers"]
    assert run([*words, "--", *parameters]) == 1
    assert "exists; choose another file" in capfd.readouterr().err


def test_checked_arguments_could_run(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["migrate", "megatron-lm", "--check", "--world-size", "4"]
    assert run([*command, "--", *SMALL, "--tensor-model-parallel-size", "2", "--sequence-parallel"]) == 0
    capfd.readouterr()
    assert run([*command, "--", *SMALL, "--pipeline-model-parallel-size", "3"]) == 1
    assert "pipeline_model_parallel_size" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--num-layer", "2"], "--num-layer is no argument of Megatron-LM; did you mean 'num-layers'"),
        (["--multi-latent-attention"], "--multi-latent-attention: begin from the model's Hugging Face configuration"),
        (["--rl-profile"], "--rl-profile: it is about reinforcement learning"),
        (["--bf16", "yes"], "--bf16 is followed by 'yes', and takes nothing"),
        (["--clip-grad"], "--clip-grad takes one word, not 0"),
        (["--clip-grad", "1", "2"], "--clip-grad takes one word, not 2: 1 2"),
        (["--rampup-batch-size"], "--rampup-batch-size takes one word or more"),
        (["--bf16", "--fp16"], "--bf16 and --fp16 are both given"),
        (["--swiglu", "--squared-relu"], "--swiglu and --squared-relu are both given"),
        (["--num-query-groups", "2"], "without --group-query-attention"),
        (["--position-embedding-type", "yarn"], "--position-embedding-type yarn is not supported"),
        (["--no-position-embedding"], "write --position-embedding-type none"),
        (["--num-layers-per-virtual-pipeline-stage", "3"], "4 layers are not divided by 3"),
        (["--transformer-impl", "inference_optimized"], "inference_optimized is not for training"),
        (["--data-path", "text"], "--mock-data and --data-path are both given"),
        (["--tokenizer-type", "TikTokenizer"], "name the Hugging Face folder of the same tokenizer"),
        (["--ckpt-format", "torch"], "--ckpt-format torch is not written here"),
        (["--moe-layer-freq", "[1]*x"], "'[1]*x' is neither a number nor a pattern"),
        (["--window-size", "128"], "'128' is no window"),
        (["--use-rope-scaling", "--rotary-seq-len-interpolation-factor", "2"], "are both given; keep one"),
        (["lonely"], "--lonely is no argument"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(words: list[str], why: str) -> None:
    with pytest.raises(BridgeError) as refusal:
        translate([*words, *SMALL] if words == ["lonely"] else [*SMALL, *words])
    assert why in str(refusal.value)


def test_all_that_is_missing_is_told_at_once() -> None:
    with pytest.raises(BridgeError) as refusal:
        translate(["--num-layers", "2"])
    told = str(refusal.value)
    for name in (
        "hidden-size",
        "num-attention-heads",
        "seq-length",
        "max-position-embeddings",
        "micro-batch-size",
        "lr",
    ):
        assert f"--{name} is missing" in told
    assert "--global-batch-size is not given" in told


def test_values_that_follow_from_several() -> None:
    def values(*words: str, **more: Any) -> dict[str, Any]:
        return translate([*SMALL, *words], **more).values

    assert values("--swiglu")["model.ffn_hidden_size"] == 128
    assert values("--bf16")["ddp.grad_reduce_in_fp32"] is True
    assert "ddp.grad_reduce_in_fp32" not in values("--bf16", "--grad-reduce-in-bf16")
    assert "ddp.grad_reduce_in_fp32" not in values("--fp16")
    assert values("--moe-layer-freq", "([0]*1+[1]*3)")["model.moe_layer_freq"] == [0, 1, 1, 1]
    assert values("--window-size", "(8,0)")["model.window_size"] == [8, 0]
    assert values("--cp-comm-type", "a2a")["model.cp_comm_type"] == "a2a"
    assert values("--moe-aux-loss-coeff=1e-2")["model.moe_aux_loss_coeff"] == 0.01
    assert values("--recompute_activations")["model.recompute_granularity"] == "selective"
    assert values("--distributed-timeout-minutes", "2")["dist.timeout_seconds"] == 120.0
    assert values("--exp-avg-dtype", "bf16")["optimizer.exp_avg_dtype"] == "bfloat16"
    scaled = values("--position-embedding-type", "rope", "--use-rope-scaling")["model.rope_parameters"]
    assert (scaled["rope_type"], scaled["factor"], scaled["rope_theta"]) == ("llama3", 8.0, 10000.0)
    place = SMALL.index("--global-batch-size")
    assert translate([*SMALL[:place], *SMALL[place + 2 :]], world_size=6).values["train.global_batch_size"] == 6


@pytest.mark.parametrize("text", ["([0]*99999)*99999", "__import__('os')", "[1]*-1.5", "[[1]]", "(" * 300])
def test_patterns_are_not_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        pattern(text)


def test_a_script_starts_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.sh"
    attempts = [
        "echo x > made",
        "/usr/bin/touch made",
        "touch made",
        "command -p touch made",
        "cd /",
        "PATH=/usr/bin touch made",
    ]
    attempts += ["export PATH=/usr/bin", "touch made", "hash -p /usr/bin/touch t; t made", "set +r; echo x > made"]
    attempts += ['python - <<< \'open("made", "w")\'', "torchrun train.py --num-layers 3"]
    script.write_text("\n".join(attempts))
    assert launched_by(script).words == ("--num-layers", "3")
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo nothing", "starts 0 trainings"),
        ("torchrun a.py --num-layers 1; torchrun b.py --num-layers 2", "starts 2 trainings"),
        ("if then", "bash cannot read"),
        (None, "there is no file"),
    ],
)
def test_a_script_that_starts_no_training_is_refused(text: str | None, why: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    if text is not None:
        script.write_text(text)
    with pytest.raises(BridgeError, match=why):
        launched_by(script)


def test_translating_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from megatron.bridge.cli.root import run; code = run(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = ["migrate", "megatron-lm", "--script", str(SCRIPTS / "llama3_8b.sh")]
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["model"]["num_layers"] == 32
