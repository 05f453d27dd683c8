"""Checkpoints of Megatron-LM's own training: read, told apart by their arguments, exported or refused by name."""

import argparse
import dataclasses
import enum
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron.bridge import AutoBridge
from megatron.bridge.cli.root import run
from megatron.bridge.conversion.checkpoint_layout import CheckpointError, resolve
from megatron.bridge.conversion.megatron_checkpoint import model_state
from megatron.bridge.conversion.megatron_lm import derived_hf_config
from megatron.bridge.conversion.offline import export_checkpoint
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks, save_random_model

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-scaled-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=SCALED, head_dim=32),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, rms_norm_eps=1e-5),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=16, norm_topk_prob=True),
}


class AttnBackend(enum.Enum):
    """A class that the reader does not know."""

    auto = 1


def megatron_lm_args(config):
    """The command line of a Megatron-LM run that trains this model."""
    rope = config.rope_parameters
    experts = getattr(config, "num_local_experts", getattr(config, "num_experts", None))
    return argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        padded_vocab_size=256,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(rope["rope_theta"]),
        rotary_percent=1.0,
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=8.0,
        normalization="RMSNorm",
        norm_epsilon=config.rms_norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type.startswith("qwen3"),
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        num_experts=experts,
        moe_router_topk=getattr(config, "num_experts_per_tok", 2),
        moe_ffn_hidden_size=getattr(config, "moe_intermediate_size", None),
        moe_layer_freq=1,
        multi_latent_attention=False,
        bf16=True,
        fp16=False,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
    )


def save_as_megatron_lm(folders, root, layout, prefix):
    """In one rank: what Megatron-LM's `save_checkpoint` hands to Megatron-Core, for every model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron.bridge.conversion import checkpoint_save, sharded_state

    for name, folder in folders.items():
        bridge = AutoBridge.from_hf_pretrained(folder)
        state = model_state(bridge.to_megatron_model(**layout))
        weights = [shard for shard in sharded_state.expanded(state) if isinstance(shard, ShardedTensor)]
        if prefix:
            state = {
                "model": {
                    str(n): dataclasses.replace(shard, key=f"{prefix}{shard.key}") for n, shard in enumerate(weights)
                }
            }
        moments = {n: (f"optimizer.state.exp_avg.{shard.key}", shard.data.float()) for n, shard in enumerate(weights)}
        state["optimizer"] = {
            str(n): dataclasses.replace(weights[n], key=key, data=data, dtype=data.dtype)
            for n, (key, data) in moments.items()
        }
        state |= {"args": megatron_lm_args(CONFIGS[name]), "checkpoint_version": 3.0, "iteration": 7}
        target = root / name / "iter_0000007"
        target.mkdir(parents=True, exist_ok=True)
        strategy = checkpoint_save.save_strategy()()
        dist_checkpointing.save(state, str(target), strategy, validate_access_integrity=False)
        (root / name / "latest_checkpointed_iteration.txt").write_text("7")
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name -> weights, root of the Megatron-LM runs)"""
    root = tmp_path_factory.mktemp("megatron-lm")
    weights = {name: save_random_model(config, root / "hf" / name) for name, config in CONFIGS.items()}
    folders = {name: root / "hf" / name for name in CONFIGS}
    run_ranks(2, save_as_megatron_lm, folders, root / "runs", {PP: 2}, "")
    return weights, root / "runs"


def written(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_is_exported_with_nothing_but_itself(saved, tmp_path, name):
    weights, runs = saved
    export_checkpoint(runs / name, tmp_path / "hf")
    back = written(tmp_path / "hf")
    assert back.keys() == weights[name].keys()
    assert all(torch.equal(back[key], weights[name][key]) for key in back)
    config, made = AutoConfig.from_pretrained(tmp_path / "hf"), CONFIGS[name]
    assert config.architectures == [type(made).__name__.replace("Config", "ForCausalLM")]
    assert config.dtype == torch.bfloat16
    fields = (*(SIZES.keys() - {"dtype"}), "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    assert {f: getattr(config, f) for f in fields} == {f: getattr(made, f) for f in fields}


def test_keys_may_bear_the_prefix_of_the_model(saved, tmp_path):
    weights, _ = saved
    save_random_model(CONFIGS["qwen3"], tmp_path / "hf")
    run_ranks(2, save_as_megatron_lm, {"qwen3": tmp_path / "hf"}, tmp_path / "runs", {TP: 2}, "model.")
    assert run(["convert", "export", str(tmp_path / "runs" / "qwen3"), str(tmp_path / "back"), "--offline"]) == 0
    back = written(tmp_path / "back")
    assert back.keys() == weights["qwen3"].keys()
    assert all(torch.equal(back[key], weights["qwen3"][key]) for key in back)


def with_args(saved, tmp_path, name, **changes):
    """A copy of a run with other arguments, in the file of their own that older versions wrote."""
    checkpoint = shutil.copytree(saved[1] / name, tmp_path / "run")
    args = argparse.Namespace(**{**vars(megatron_lm_args(CONFIGS[name])), **changes})
    torch.save({"args": args, "iteration": 7}, resolve(checkpoint) / "common.pt")
    return checkpoint


def test_the_arguments_of_older_checkpoints_lie_in_a_file(saved, tmp_path):
    checkpoint = with_args(saved, tmp_path, "llama", norm_epsilon=0.25)
    assert derived_hf_config(checkpoint).rms_norm_eps == 0.25


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"vocab_size": None}, "vocab_size is not stated"),
        ({"normalization": "LayerNorm"}, r"normalization='LayerNorm' \(known here: 'RMSNorm'\)"),
        ({"swiglu": False, "add_bias_linear": True}, "swiglu=False.*\n.*add_bias_linear=True"),
        ({"position_embedding_type": AttnBackend.auto}, "position_embedding_type="),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"num_experts": 4, "add_qkv_bias": True}, "num_experts=4 with add_qkv_bias=True"),
    ],
)
def test_what_the_arguments_leave_open_is_refused_by_name(saved, tmp_path, capsys, changes, culprit):
    checkpoint = with_args(saved, tmp_path, "llama", **changes)
    with pytest.raises(CheckpointError, match=culprit) as caught:
        export_checkpoint(checkpoint, tmp_path / "hf")
    assert "--hf-config FOLDER" in str(caught.value)
    assert not (tmp_path / "hf").exists()
    # And is converted once the configuration is given.
    CONFIGS["llama"].architectures = ["LlamaForCausalLM"]
    CONFIGS["llama"].save_pretrained(tmp_path / "config")
    options = ["--offline", "--hf-config", str(tmp_path / "config")]
    assert run(["convert", "export", str(checkpoint), str(tmp_path / "hf"), *options]) == 0
    assert written(tmp_path / "hf").keys() == saved[0]["llama"].keys()


def test_arguments_of_another_model_than_the_weights_are_refused(saved, tmp_path):
    checkpoint = with_args(saved, tmp_path, "qwen2", add_qkv_bias=False)
    with pytest.raises(BridgeError, match=r"linear_qkv\.bias"):
        export_checkpoint(checkpoint, tmp_path / "hf")


class Poison:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_no_code_of_the_file_is_run(saved, tmp_path):
    checkpoint = with_args(saved, tmp_path, "llama", trap=Poison())
    assert derived_hf_config(checkpoint).architectures == ["LlamaForCausalLM"]
    (resolve(checkpoint) / "common.pt").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match=r"common\.pt cannot be read"):
        derived_hf_config(checkpoint)
