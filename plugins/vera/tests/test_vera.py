"""The plugin's own tests, with nothing but public names of Megatron Bridge."""

import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3MoeConfig
from vera_bridge.method import VeRA

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import check_adapter, import_engine, random_model, run_ranks, save_random_model

README = Path(__file__).parents[1] / "README.md"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "float32",
}
LLAMA = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
EXPERTS = Qwen3MoeConfig(
    **SIZES,
    architectures=["Qwen3MoeForCausalLM"],
    head_dim=8,
    moe_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.0,
)


@pytest.fixture(scope="module", autouse=True)
def _engine():
    import_engine("megatron.bridge.models.gpt_provider", "vera_bridge.projections")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vera") / "base"
    save_random_model(LLAMA, folder)
    return folder


def test_a_mixture_of_experts():
    """Expert parallelism, k without vectors, and a file that holds the shared matrices, of a key of its own."""
    method = peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], projection_prng_key=7)
    check_adapter(EXPERTS, method, ["ep2"])


def test_the_example_of_the_readme():
    """Every linear layer of a Llama: one rank, tensor, sequence and pipeline parallelism."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(block, str(README), "exec"), names)
    names["test_vera"]()


def configured(base, folder, overrides, model):
    from megatron.bridge.data import MockGPTDatasetConfig
    from megatron.bridge.training import config as c
    from megatron.bridge.training.overrides import apply_overrides

    provider = AutoBridge.from_hf_pretrained(base).to_megatron_provider()
    provider.seq_length = 16
    for name, value in model.items():
        setattr(provider, name, value)
    cfg = c.ConfigContainer(
        model=provider,
        dataset=MockGPTDatasetConfig(sequence_length=16),
        tokenizer=c.TokenizerConfig(vocab_size=131),
        train=c.TrainingConfig(train_iters=4, global_batch_size=2),
        optimizer=c.OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-2, clip_grad=1.0),
        scheduler=c.SchedulerConfig(lr_decay_style="constant"),
        checkpoint=c.CheckpointConfig(save=str(folder)),
        logger=c.LoggerConfig(progress=False),
    )
    apply_overrides(cfg, overrides)
    return cfg


def test_a_run_by_name_keeps_vectors_alone_and_resumes(base, tmp_path):
    """`peft=vera` on one rank, and stopped half way at tensor parallelism, to go on with pipeline stages."""
    overrides = ["peft=vera", "peft.dim=8", "peft.dropout=0.0"]

    def run(folder, more, model):
        from megatron.bridge.training.gpt_step import forward_step
        from megatron.bridge.training.pretrain import pretrain

        return list(pretrain(configured(base, folder, [*overrides, *more], model), forward_step).losses.values())

    def held():
        from megatron.core.dist_checkpointing.serialization import load_plain_tensors

        from megatron.bridge.conversion import dist_checkpoint

        tensors = load_plain_tensors(str(dist_checkpoint.resolve(tmp_path / "whole")))
        return {
            name: value
            for name, value in tensors.items()
            if not name.startswith("optimizer.") and torch.is_tensor(value)
        }

    whole = run_ranks(1, run, tmp_path / "whole", [], {}, timeout=100)[0]
    begun, half = [], tmp_path / "half"
    begun += run_ranks(2, run, half, ["train.train_iters=2"], {"tensor_model_parallel_size": 2}, timeout=100)[0]
    begun += run_ranks(2, run, half, [f"checkpoint.load={half}"], {"pipeline_model_parallel_size": 2}, timeout=100)[1]
    assert begun == pytest.approx(whole, abs=1e-5)
    names = run_ranks(1, held, timeout=60)[0]
    assert all(re.search(r"\.adapters\.(\d+\.)?default\..*vera_lambda_[bd]$", name) for name in names)
    # 2 layers of 7 parts, each with both vectors: 8 numbers of d, and b as long as the part's outputs.
    assert sum(tensor.numel() for tensor in names.values()) == 2 * (7 * 8 + 32 + 16 + 16 + 32 + 64 + 64 + 32)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vera") / "adapter"
    method = peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"])
    peft.get_peft_model(random_model(LLAMA), method).save_pretrained(folder)
    return folder


def changed(adapter, folder, weights=lambda held: None, **config):
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


def test_what_cannot_be_is_refused_by_name(base, adapter, tmp_path):
    def other_matrix(held):
        held["base_model.vera_B"] += 1

    def larger_matrices(held):
        from vera_bridge.projections import projections

        held["base_model.vera_A"], held["base_model.vera_B"] = projections(4, 64, 64, 0)

    def nothing(held):
        for name in [name for name in held if "lambda" in name]:
            del held[name]

    folders = {
        "not those that projection_prng_key=0": changed(adapter, tmp_path / "other", other_matrix),
        r"for \[64, 64\] inputs and outputs, and .* have \[32, 32\]": changed(
            adapter, tmp_path / "large", larger_matrices
        ),
        "holds no VeRA vectors": changed(adapter, tmp_path / "nothing", nothing),
        "modules_to_save=": changed(adapter, tmp_path / "more", modules_to_save=["lm_head"]),
    }
    methods = {
        "dim=0 must be at least 1": VeRA(dim=0),
        "d_initial=0 never learns; |d_initial=0 never learns": VeRA(d_initial=0),
        "dropout=1 must lie": VeRA(dropout=1),
        "leave output_layer out by exclude_modules": VeRA(dim=4, target_modules=["lm_head"]),
    }

    def work():
        bridge = AutoBridge.from_hf_pretrained(base)
        model = bridge.to_megatron_model()
        told = []
        for refused in [lambda path=path: bridge.load_hf_adapter(model, path) for path in folders.values()] + [
            lambda method=method: method(model) for method in methods.values()
        ]:
            with pytest.raises(BridgeError) as refusal:
                refused()
            told.append(str(refusal.value))
        bridge.load_hf_adapter(model, adapter)  # as it is, it fits
        return told

    (told,) = run_ranks(1, work, timeout=100)
    for message, text in zip([*folders, *methods], told, strict=True):
        assert re.search(message, text), (message, text)


def test_experts_are_refused(tmp_path):
    save_random_model(EXPERTS, tmp_path / "experts")

    def work():
        with pytest.raises(BridgeError, match=r"leave .*experts.*linear_fc1 out by exclude_modules"):
            VeRA(dim=4)(AutoBridge.from_hf_pretrained(tmp_path / "experts").to_megatron_model())
        return True

    assert run_ranks(1, work, timeout=60) == [True]


def test_the_command_line_lists_it_with_its_origin():
    program = "import sys; from megatron.bridge.cli.root import run; sys.exit(run(sys.argv[1:]))"
    words = [sys.executable, "-c", program, "plugins", "--group", "peft"]
    listed = subprocess.check_output(words, text=True, timeout=120)
    assert re.search(r"vera +vera_bridge.method:VeRA +vera-bridge 0.1.0", listed)
