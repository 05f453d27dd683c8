"""Block variants train and are saved as they compute: gradients like transformers', checkpoints that change layout."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.bridge import AutoBridge
from megatron.bridge.testing import RankFailed, random_model, run_ranks
from megatron.bridge.testing.families import LAYOUTS, expect_same_weights, family_case

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # transformers gives the padding token's embedding no gradient
    "dtype": "float32",
}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 2.0}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
}
SHARED_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 2, "moe_intermediate_size": 32}
# Each has variants that the others lack.
CASES = {
    "olmo3": {"sliding_window": 5, "rope_parameters": TWO_ROPES},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 5.0, "tie_word_embeddings": True},
    "cohere": {"use_qk_norm": True},
    "hyperclovax": {**SCALED, "head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "phi": {},
    "apertus": {},
    "bloom": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
MIXTURES = {
    "gpt_oss": {"head_dim": 16, "sliding_window": 5, "num_local_experts": 8, "num_experts_per_tok": 3},
    "llama4_text": {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 7},
    "afmoe": {**SHARED_EXPERTS, "head_dim": 16, "sliding_window": 5, "num_dense_layers": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    configs = {name: CONFIG_MAPPING[name](**SIZES, **changes) for name, changes in {**CASES, **MIXTURES}.items()}
    return {name: family_case(config, root / name, name) for name, config in configs.items()}


WHOLE_EXPERTS = {name: {**LAYOUTS[name], "expert_tensor_parallel_size": 1} for name in ("tp2", "pp2", "vpp2")}
DIVIDED_EXPERTS = {**LAYOUTS["sp2"], "expert_tensor_parallel_size": 2}
# They choose experts, and have no gradient.
SELECTION_BIASES = ("expert_bias", "e_score_correction_bias")


def loss_of(logits, tokens):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum")


def gradients_of_transformers(case, folder):
    """By the names that a checkpoint's files have."""
    model = random_model(AutoBridge.from_hf_pretrained(case.folder).hf_config)
    loss_of(model(case.tokens).logits, case.tokens).backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(folder)
    gradients = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in gradients.items() if not name.endswith(SELECTION_BIASES)}


def gradients_of_megatron(cases, layout):
    """In one rank: the gradients by Hugging Face name, taken through the family's own table."""
    from megatron.core.distributed import finalize_model_grads

    found = {}
    for name, case in cases.items():
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        (model,) = bridge.to_megatron_model(**layout, layer_spec="torch", wrap_with_ddp=True)
        model.eval()
        positions = torch.arange(case.tokens.shape[1]).expand_as(case.tokens)
        model(case.tokens, positions, None, labels=case.tokens.roll(-1, 1)).sum().backward()
        finalize_model_grads([model])
        for parameter in model.parameters():
            parameter.data = parameter.main_grad.clone()
        found[name] = {key: tensor.clone() for key, tensor in bridge.export_hf_weights([model])}
    return found


@pytest.mark.parametrize(
    "layout",
    [{}, LAYOUTS["tp2"], {**WHOLE_EXPERTS["tp2"], "sequence_parallel": True}, DIVIDED_EXPERTS, LAYOUTS["tp4"]],
    ids=["single", "tp2", "tp2+sp", "tp2+sp, experts divided", "tp4"],
)
def test_gradients_are_those_of_transformers(cases, tmp_path, layout):
    ranks = layout.get("tensor_model_parallel_size", 1)
    if ranks > 1 and "sequence_parallel" not in layout:
        # Megatron-Core trains mixtures of experts with sequence parallelism only.
        cases = {name: case for name, case in cases.items() if name not in MIXTURES}
    found = run_ranks(ranks, gradients_of_megatron, cases, layout, timeout=120)[0]
    for name, case in cases.items():
        wanted = gradients_of_transformers(case, tmp_path / name)
        assert wanted.keys() <= found[name].keys()
        for key, gradient in wanted.items():
            # A bias of keys that are not turned changes no output: its gradient is nothing but rounding.
            allowed = max(1e-4 * float(gradient.abs().max()), 1e-5)
            assert float((found[name][key] - gradient).abs().max()) < allowed, f"{name}: {key}"


def save(cases, root, layout):
    for name, case in cases.items():
        bridge = AutoBridge.from_hf_pretrained(case.folder)
        bridge.save_megatron_model(bridge.to_megatron_model(**layout, layer_spec="torch"), root / name)


def load(cases, root, layout):
    for name, case in cases.items():
        bridge = AutoBridge.from_megatron_checkpoint(root / name)
        expect_same_weights(case, bridge.export_hf_weights(bridge.load_megatron_model(root / name, **layout)))


@pytest.mark.parametrize(("written", "read"), [("tp2", "pp2"), ("vpp2", "tp2")])
def test_a_checkpoint_written_at_one_layout_exports_at_another(cases, tmp_path, written, read):
    run_ranks(2, save, cases, tmp_path, WHOLE_EXPERTS[written], timeout=120)
    run_ranks(2, load, cases, tmp_path, WHOLE_EXPERTS[read], timeout=120)


def test_a_parallel_block_refuses_selective_recomputation(cases):
    def build():
        options = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
        AutoBridge.from_hf_pretrained(cases["phi"].folder).to_megatron_model(layer_spec="torch", **options)

    with pytest.raises(RankFailed, match="set recompute_granularity to 'full'"):
        run_ranks(1, build)
