"""The planner: shapes without torch, refusals, hardware, the search and its command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

from megatron.bridge import AutoBridge
from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.dense import DenseBridge
from megatron.bridge.testing import run_ranks
from megatron.bridge.training.flops import forward_flops_per_token
from megatron.bridge.training.planner.candidates import candidates, problems
from megatron.bridge.training.planner.command import plan
from megatron.bridge.training.planner.hardware import cluster
from megatron.bridge.training.planner.hf_reading import shape_of_hf
from megatron.bridge.training.planner.layout import Layout
from megatron.bridge.training.planner.memory import chunks_under_way
from megatron.bridge.training.planner.parameters import model_parameters, stage_parts
from megatron.bridge.training.planner.plan import Question, best, planned, step_operations
from megatron.bridge.training.planner.shape import ModelShape, shape_of
from megatron.bridge.training.planner.step_time import bubble_share

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8}
CONFIGS = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "Llama, biases, tied": transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "Mistral": transformers.MistralConfig(**SIZES),
    "Qwen2": transformers.Qwen2Config(**SIZES),
    "Qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "Qwen3-MoE": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=16, mlp_only_layers=[0]),
    "Mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "Gemma 2": transformers.Gemma2Config(**SIZES, head_dim=16),
    "Gemma 3": transformers.Gemma3TextConfig(**SIZES, head_dim=16),
    "Phi-2": transformers.PhiConfig(**SIZES),
    "OLMo 2": transformers.Olmo2Config(**SIZES, pad_token_id=1, eos_token_id=2),
    "Nemotron": transformers.NemotronConfig(**SIZES),
    "GPT-2": transformers.GPT2Config(vocab_size=131, n_embd=64, n_layer=4, n_head=4, n_positions=64),
    "GPT-NeoX": transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gpt-oss": transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "DeepSeek-V3": transformers.DeepseekV3Config(
        **SIZES, **EXPERTS, **LATENT, q_lora_rank=32, first_k_dense_replace=1, n_group=2, topk_group=1
    ),
}
LAYOUTS = (Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, expert=2))
H100 = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32}
LLAMA3_8B = ModelShape(
    **H100,
    num_query_groups=8,
    vocab_size=128256,
    seq_length=8192,
    normalization="RMSNorm",
    gated_linear_unit=True,
    add_bias_linear=False,
)


def written(name: str) -> dict[str, object]:
    """`config.json` of a case, with the architecture that transformers gives it."""
    config = CONFIGS[name]
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config.architectures = [names[config.model_type]]
    return json.loads(config.to_json_string(use_diff=False))


def count(names: list[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """Parameters of this rank, as built and as planned, at every layout that fits these ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron.bridge import platform

    platform.initialize_distributed()
    found = {}
    for layout in LAYOUTS:
        for name in names:
            config = written(name)
            provider = AutoBridge.from_hf_config(CONFIGS[name]).to_megatron_provider()
            if layout.ranks != dist.get_world_size() or (layout.expert > 1 and not provider.num_moe_experts):
                continue
            provider.layer_spec = "torch"
            for field, value in layout.sizes().items():
                setattr(provider, field, value)
            model = provider.provide_distributed_model(wrap_with_ddp=False)
            stage = parallel_state.get_pipeline_model_parallel_rank()
            own = sum(each.numel() for each in model[0].parameters())
            parts = stage_parts(layout.at(shape_of_hf(config)), stage)
            found[name, str(layout)] = (own, sum(part.count for part in parts))
        if parallel_state.is_initialized():
            platform.destroy_model_parallel()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_of_every_kind_of_decoder_are_exact_on_every_rank(ranks: int) -> None:
    for each in run_ranks(ranks, count, list(CONFIGS), timeout=280):
        assert len(each) >= len(CONFIGS) * ranks
        assert not {case: counts for case, counts in each.items() if counts[0] != counts[1]}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_read_without_torch_is_the_providers(name: str) -> None:
    config = written(name)
    provider = AutoBridge.from_hf_config(CONFIGS[name]).to_megatron_provider()
    read = shape_of_hf(config)
    assert read.replace(seq_length=1) == shape_of(provider).replace(seq_length=1)
    # What files leave out has the default of the class.
    left_out = ("tie_word_embeddings", "attention_bias", "rope_parameters")
    short = {key: value for key, value in config.items() if key not in left_out or "tied" in name}
    assert shape_of_hf(short) == read
    provider.finalize()
    flops = step_operations(Question(shape=shape_of(provider), cluster=cluster("1xH100"), global_batch=1))
    assert flops == 3 * (forward_flops_per_token(provider) or 0) * provider.seq_length


def test_the_class_of_a_text_model_is_found_beside_that_of_the_whole() -> None:
    """`emu3_text_model` stands in transformers' models/emu3; a family of somebody's package may be of such a kind."""
    MODEL_BRIDGES.register("Emu3ForCausalLM", DenseBridge)
    try:
        config = transformers.Emu3TextConfig(architectures=["Emu3ForCausalLM"])
        written = {"architectures": ["Emu3ForCausalLM"], "model_type": config.model_type}
        assert shape_of_hf(written) == shape_of(AutoBridge.from_hf_config(config).to_megatron_provider())
    finally:
        MODEL_BRIDGES.unregister("Emu3ForCausalLM")


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(BridgeError, match="MambaForCausalLM cannot be planned"):
        shape_of_hf({"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    with pytest.raises(BridgeError, match="did you mean 'LlamaForCausalLM'"):
        shape_of_hf({"architectures": ["LlamaForCausalLMs"], "model_type": "llama"})
    with pytest.raises(BridgeError, match="must name one architecture"):
        shape_of_hf({})
    with pytest.raises(BridgeError, match="layout 'TP2 XP4' has 'XP4'"):
        Layout.parse("TP2 XP4")


def test_a_layout_reads_as_it_is_written() -> None:
    layout = Layout(tensor=4, pipeline=8, virtual=5, context=2, expert=8, micro_batch=2, recompute="full")
    assert Layout.parse(str(layout)) == layout


def test_layouts_are_refused_in_the_words_of_those_who_would_refuse_them() -> None:
    def told(**sizes: int) -> str:
        return " ".join(problems(LLAMA3_8B, Layout(**sizes), 64, 128))

    assert told(tensor=8) == ""
    assert "tensor_model_parallel_size=3 does not divide num_attention_heads=32" in told(tensor=3)
    assert "needs a multiple of 128 ranks" in told(tensor=8, pipeline=16)
    assert "the model has no experts" in told(expert=2)
    assert "not a multiple of train.micro_batch_size=4 x 64" in told(micro_batch=4)


def test_memory_bubble_and_time_move_as_they_must() -> None:
    question = Question(shape=LLAMA3_8B, cluster=cluster("64xH100"), global_batch=512)
    plain, divided = planned(question, Layout(tensor=2)), planned(question, Layout(tensor=4))
    assert divided.memory.total < plain.memory.total
    assert divided.sent.tensor > plain.sent.tensor
    again = planned(question, Layout(tensor=2, recompute="full"))
    assert again.memory.activations < plain.memory.activations / 5
    assert again.time.compute > 1.2 * plain.time.compute
    assert planned(question, Layout(tensor=2, context=2)).memory.activations == plain.memory.activations / 2
    # 1F1B: the first stage holds as many micro-batches as there are stages; p - 1 of m + p - 1 slots are empty.
    assert [chunks_under_way(Layout(pipeline=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert bubble_share(Layout(pipeline=4), 9) == 3 / 12
    assert bubble_share(Layout(pipeline=4, virtual=3), 9) == 1 / 10


def test_the_best_fit_run_and_are_sorted() -> None:
    question = Question(shape=LLAMA3_8B, cluster=cluster("8xH100"), global_batch=128)
    plans = best(question, 5)
    assert len(plans) == 5
    assert [plan.time.total for plan in plans] == sorted(plan.time.total for plan in plans)
    for each in plans:
        assert each.memory.total <= 0.9 * 80e9
        assert not problems(LLAMA3_8B, each.layout, 8, 128)
        assert 0.2 < each.mfu < 0.8
    assert plans[0].time.total <= min(
        unfit.time.total
        for layout in candidates(LLAMA3_8B, cluster("8xH100"), 128)
        if (unfit := planned(question, layout)).memory.total <= 0.9 * 80e9
    )
    with pytest.raises(BridgeError, match="does not fit 1xH100: the smallest layout"):
        best(Question(shape=LLAMA3_8B, cluster=cluster("1xH100"), global_batch=128))
    assert model_parameters(LLAMA3_8B) == 8_030_261_248


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    table = tmp_path / "ours.yaml"
    table.write_text(
        "X9: {memory_gb: 64, memory_gbps: 1000, bf16_tflops: 500, node: 4, node_gbps: 100, network_gbps: 10}\n"
    )
    assert cluster("4xX9", table).device.bf16_tflops == 500
    with pytest.raises(BridgeError, match="no accelerator is called 'H10'; did you mean 'H100'"):
        cluster("4xH10", table)
    with pytest.raises(BridgeError, match="not of the form 64xH100"):
        cluster("H100")
    table.write_text("X9: {memory_gb: 64, memory_tb: 1}\n")
    with pytest.raises(BridgeError, match="no table of accelerators"):
        cluster("4xX9", table)


def test_the_command_needs_no_torch_and_no_second(tmp_path: Path) -> None:
    config = json.loads(transformers.LlamaConfig(num_key_value_heads=8).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    program = (
        "import sys; from megatron.bridge.cli.root import run; "
        f"code = run(['plan', '--hf', {str(tmp_path)!r}, '--gpus', '64xH100', '--json']); "
        "sys.exit(code or sorted({'torch', 'transformers', 'megatron.core'} & sys.modules.keys()) or 0)"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        after = os.times()
        assert ended.returncode == 0, ended.stderr
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 1
    found = json.loads(ended.stdout)
    assert found["parameters"] > 5e9
    assert len(found["plans"]) == 3
    assert found["plans"][0]["overrides"]["train.global_batch_size"] == found["global_batch_size"]


def test_the_command_looks_at_one_layout_and_refuses_what_cannot_run(tmp_path: Path) -> None:
    config = json.loads(transformers.LlamaConfig().to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    words = ["--hf", str(tmp_path), "--gpus", "8xH100", "--seq", "4096"]
    shown = CliRunner().invoke(plan, [*words, "--at", "TP8 MB1"], catch_exceptions=False).output
    assert "TP8 MB1, replicas 1" in shown
    assert "tensor parallelism: without it" in shown
    assert "model.tensor_model_parallel_size=8" in shown
    with pytest.raises(BridgeError, match="does not divide num_attention_heads=32"):
        CliRunner().invoke(plan, [*words, "--at", "TP3"], catch_exceptions=False)
    with pytest.raises(BridgeError, match="name one of --recipe and --hf"):
        CliRunner().invoke(plan, ["--gpus", "8xH100"], catch_exceptions=False)
