"""The plugin's own tests, with nothing but public names of Megatron Bridge."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from internlm2_bridge.config import InternLM2Config

from megatron.bridge.testing import check_family, save_random_model

README = Path(__file__).parents[1] / "README.md"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "float32",
}
COMMAND_LINE = "import sys; from megatron.bridge.cli.root import run; sys.exit(run(sys.argv[1:]))"


def test_the_example_of_the_readme():
    """At every layout."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(block, str(README), "exec"), names)
    names["test_internlm2"]()


def test_internlm2_with_biases_and_scaled_positions():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    config = InternLM2Config(**SIZES, bias=True, max_position_embeddings=8, rope_parameters=scaled)
    check_family(config, layouts=["single", "tp2pp2"])


def run(program, *arguments):
    """What a fresh interpreter prints: one that has imported nothing of this plugin."""
    return subprocess.check_output([sys.executable, "-c", program, *map(str, arguments)], text=True, timeout=120)


def test_a_published_configuration_is_read_though_nobody_imports_the_plugin(tmp_path):
    save_random_model(InternLM2Config(**SIZES), tmp_path)
    published = {
        **json.loads((tmp_path / "config.json").read_text()),
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},  # code that is not there
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    del published["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    program = (
        "import sys; from megatron.bridge import AutoBridge;"
        "assert 'InternLM2ForCausalLM' in AutoBridge.list_supported_models();"
        "assert 'internlm2_bridge' not in sys.modules;"
        "print(AutoBridge.from_hf_pretrained(sys.argv[1]).to_megatron_provider().rope_parameters)"
    )
    assert "'rope_theta': 1000000.0" in run(program, tmp_path)


@pytest.mark.parametrize("command", [("plugins", "--group", "model_bridges"), ("models", "InternLM2")])
def test_the_command_line_lists_it_with_its_origin(command):
    listed = run(COMMAND_LINE, *command)
    assert "internlm2_bridge.family:InternLM2Bridge" in listed
    assert "internlm2-bridge 0.1.0" in listed
