"""The plugin's own tests, with nothing but public names of Megatron Bridge."""

import subprocess
import sys

import pytest
from transformers import AriaTextConfig

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import check_family

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "float32",
}


def test_aria():
    check_family(AriaTextConfig(**SIZES))


def test_aria_with_attention_biases():
    check_family(AriaTextConfig(**SIZES, attention_bias=True, moe_topk=3), layouts=["single", "tp2ep2sp"])


def test_biases_that_megatron_cannot_keep_apart_are_refused():
    config = AriaTextConfig(**SIZES, mlp_bias=True, architectures=["AriaTextForCausalLM"])
    with pytest.raises(BridgeError, match="mlp_bias=True"):
        AutoBridge.from_hf_config(config).to_megatron_provider()


def test_it_is_known_without_being_imported():
    program = (
        "import sys; from megatron.bridge import AutoBridge;"
        "assert 'AriaTextForCausalLM' in AutoBridge.list_supported_models(); assert 'aria_bridge' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("command", [("plugins", "--group", "model_bridges"), ("models", "AriaText")])
def test_the_command_line_lists_it_with_its_origin(command):
    program = "from megatron.bridge.cli.root import main; main()"
    listed = subprocess.check_output([sys.executable, "-c", program, *command], text=True, timeout=120)
    assert "aria_bridge.family:AriaTextBridge" in listed
    assert "aria-bridge 0.1.0" in listed
