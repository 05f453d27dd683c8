"""Finding the bridge of a model, and refusing what has none."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from megatron.bridge import AutoBridge
from megatron.bridge.conversion import MegatronModelBridge, WeightRule, WeightTable
from megatron.bridge.conversion.hf_config import read_config, rope
from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES
from megatron.bridge.errors import BridgeError


class ToyBridge(MegatronModelBridge):
    def provider_bridge(self):
        raise NotImplementedError

    def mapping_registry(self):
        return WeightTable((WeightRule("a", "b"),))


@pytest.fixture
def toy():
    MegatronModelBridge.register_bridge(source="ToyForCausalLM")(ToyBridge)
    yield
    MODEL_BRIDGES.unregister("ToyForCausalLM")


def write_config(folder, **values):
    config = {"model_type": "llama", "architectures": ["ToyForCausalLM"], "vocab_size": 10} | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.usefixtures("toy")
def test_a_registered_family_is_found_by_its_architecture(tmp_path):
    bridge = AutoBridge.from_hf_pretrained(write_config(tmp_path))
    assert isinstance(bridge.model_bridge, ToyBridge)
    assert AutoBridge.can_handle(tmp_path)
    assert AutoBridge.supports(bridge.hf_config)
    assert "ToyForCausalLM" in AutoBridge.list_supported_models()


@pytest.mark.usefixtures("toy")
def test_an_unknown_architecture_is_refused_with_near_matches(tmp_path):
    write_config(tmp_path, architectures=["Toy2ForCausalLM"])
    assert not AutoBridge.can_handle(tmp_path)
    with pytest.raises(BridgeError, match=r"'Toy2ForCausalLM'.*did you mean 'ToyForCausalLM'"):
        AutoBridge.from_hf_pretrained(tmp_path)


@pytest.mark.usefixtures("toy")
def test_inheriting_from_a_supported_model_does_not_make_one_supported():
    class ChangedConfig(LlamaConfig):
        pass

    assert not AutoBridge.supports(ChangedConfig(architectures=["ChangedToyForCausalLM"]))


@pytest.mark.parametrize("names", [None, [], ["A", "B"]])
def test_an_architecture_must_be_stated_once(tmp_path, names):
    with pytest.raises(BridgeError, match="must name one architecture"):
        AutoBridge.from_hf_pretrained(write_config(tmp_path, architectures=names))


def test_what_is_no_model_folder_is_refused(tmp_path):
    with pytest.raises(BridgeError, match="no config.json"):
        AutoBridge.from_hf_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(BridgeError, match=r"config\.json"):
        AutoBridge.from_hf_pretrained(tmp_path)
    with pytest.raises(BridgeError, match="there is no folder"):
        AutoBridge.from_hf_pretrained(tmp_path / "absent")


@pytest.mark.usefixtures("toy")
def test_a_bridge_without_weights_says_so():
    bridge = AutoBridge.from_hf_config(LlamaConfig(architectures=["ToyForCausalLM"]))
    with pytest.raises(BridgeError, match="has no weights; pass a folder or a state dict"):
        bridge.load_hf_weights([])


@pytest.mark.parametrize(
    ("values", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 9.0, {"linear", 2.0}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}}, 9.0, {"linear", 2.0}),
    ],
)
def test_rotary_settings_are_read_as_every_version_of_transformers_wrote_them(tmp_path, values, theta, scaling):
    found = rope(read_config(write_config(tmp_path, **values)))
    assert found.theta == theta
    assert (found.scaling is None) == (scaling is None)
    if scaling:
        assert {found.scaling["rope_type"], found.scaling["factor"]} == scaling
        assert found.scaling["rope_theta"] == theta


def test_importing_the_namespace_loads_nothing_heavy():
    code = "import sys, megatron.bridge; print(sorted({'torch', 'transformers', 'megatron.core'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_an_absent_part_says_what_to_install():
    import megatron.bridge

    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        megatron.bridge.nonsense  # noqa: B018
    code = (
        "import sys; sys.modules['megatron.bridge.mimo'] = None\n"
        "import megatron.bridge\n"
        "try: megatron.bridge.mimo\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "megatron-bridge-mimo" in done.stdout
