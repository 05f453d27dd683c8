"""Every recipe builds offline, is right for its model, and its values are those of the model that it names."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.bridge.recipes.llama import llama32_1b, llama32_1b_pretrain_config
from megatron.bridge.training.recipe_registry import RECIPES
from megatron.bridge.training.validation import ConfigError


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_builds_and_is_valid(name: str) -> None:
    for world in (1, 2, 8):
        RECIPES[name]().validate(world)


def test_both_names_of_the_recipe_are_the_same() -> None:
    assert llama32_1b_pretrain_config is llama32_1b.pretrain_config
    assert llama32_1b.pretrain_config() == RECIPES["llama32_1b_pretrain_config"]()


def test_a_short_run_of_the_recipe_is_valid() -> None:
    cfg = llama32_1b.pretrain_config()
    cfg.train.train_iters = 10
    cfg.validate(1)


def test_settings_reach_their_sections() -> None:
    cfg = llama32_1b_pretrain_config(seq_length=4096, tensor_model_parallel_size=2, sequence_parallel=True, lr=1e-4)
    assert (cfg.model.seq_length, cfg.dataset.sequence_length) == (4096, 4096)
    assert (cfg.model.tensor_model_parallel_size, cfg.model.sequence_parallel, cfg.optimizer.lr) == (2, True, 1e-4)
    with pytest.raises(ConfigError, match="needs a multiple of 2 ranks"):
        cfg.validate(1)
    with pytest.raises(TypeError, match="train_iter"):
        llama32_1b_pretrain_config(train_iter=3)


def test_the_model_has_as_many_parameters_as_transformers_says() -> None:
    """Counted from shapes on the meta device: 1,235,814,400 in the published model."""
    model = llama32_1b.model()
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
    )
    with torch.device("meta"):
        assert LlamaForCausalLM(config).num_parameters() == 1_235_814_400
