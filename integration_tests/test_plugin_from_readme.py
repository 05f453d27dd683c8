"""The plugin that the README shows: built as a wheel from its text alone, and found without any import."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Outcome
from reader import build_and_unpack
from readme_blocks import README, blocks

from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import refresh
from megatron.bridge.testing import run_ranks, save_random_model

PLUGIN = "compass-plugin"
type Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's folder, as a reader would have typed it."""
    root = tmp_path_factory.mktemp("plugin")
    for block in blocks(README.read_text("utf-8")):
        if block.file and block.file.startswith(f"{PLUGIN}/"):
            (root / block.file).parent.mkdir(parents=True, exist_ok=True)
            (root / block.file).write_text(block.body, "utf-8")
    return root / PLUGIN


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plugin's wheel, unpacked into a folder on `sys.path`."""
    site = tmp_path_factory.mktemp("site")
    build_and_unpack(source, tmp_path_factory.mktemp("wheels"), site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        refresh()
        yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "compass_plugin"]:
        del sys.modules[name]
    refresh()


@pytest.fixture(scope="module")
def compass(source: Path) -> object:
    """The README's own test module of the plugin."""
    spec = importlib.util.spec_from_file_location("test_compass", source / "tests/test_compass.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(compass, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "compass"
    save_random_model(compass.CONFIG, folder)
    return folder


def test_without_it_the_family_is_unknown(model: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli("convert", "import", model, "out", folder=tmp_path)
    assert ended.code == 1
    assert "no model bridge is called 'CohereCompassForCausalLM'" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_it_is_found_without_an_import(installed: Path, tmp_path: Path, cli: Cli) -> None:
    assert "CohereCompassForCausalLM" in AutoBridge.list_supported_models()
    listed = cli("plugins", "--json", folder=tmp_path)
    offers = {(each["group"], each["name"]): each for each in json.loads(listed.out)}
    family = offers["megatron.bridge.model_bridges", "CohereCompassForCausalLM"]
    method = offers["megatron.bridge.peft", "norms"]
    assert family["distribution"] == method["distribution"] == PLUGIN
    assert family["target"] == "compass_plugin.family:CompassBridge"
    assert "compass_plugin" not in sys.modules


def test_every_offer_of_it_loads(installed: Path, tmp_path: Path) -> None:
    # In a process of its own, as a user's shell would: the check imports every plugin in a fresh interpreter.
    command = "import sys; from megatron.bridge.cli.root import main; main()"
    for group, name in (("model_bridges", "CohereCompassForCausalLM"), ("peft", "norms")):
        ended = subprocess.run(
            [sys.executable, "-c", command, "plugins", "--group", group, "--check", "--json"],
            env={"PYTHONPATH": str(installed), "PATH": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        states = {each["name"]: each["state"] for each in json.loads(ended.stdout)}
        assert states[name] == "works", ended.stdout
        assert ended.returncode == 0


def test_its_own_test_passes_as_the_readme_shows_it(installed: Path, compass, tmp_path: Path) -> None:
    compass.test_logits(tmp_path)


def test_the_windows_matter(installed: Path, compass, tmp_path: Path) -> None:
    """The comparison above would notice a family that forgot what distinguishes this one from Llama."""
    save_random_model(compass.CONFIG, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 4}))
    ours = run_ranks(2, compass.logits, tmp_path)[0]
    reference = compass.random_model(compass.CONFIG)(compass.TOKENS).logits
    assert (ours - reference).abs().max() > 1e-3 * reference.abs().max()


def test_the_command_line_converts_and_verifies_it(installed: Path, model: Path, tmp_path: Path, cli: Cli) -> None:
    for command in (
        ("convert", "import", model, "checkpoint", "--tp", "2"),
        ("verify", model, "--megatron", "checkpoint", "--tp", "2"),
        ("convert", "export", "checkpoint", "exported", "--pp", "2"),
        ("verify", "exported"),
    ):
        ended = cli(*command, folder=tmp_path)
        assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "exported/config.json").read_text())["architectures"] == ["CohereCompassForCausalLM"]


def tuned(folder: Path) -> dict[str, bool]:
    """In a rank: which parameters the README's method leaves trainable."""
    from megatron.bridge.peft import PEFT_METHODS

    method = PEFT_METHODS["norms"]()
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    chunks = provider.provide_distributed_model(
        wrap_with_ddp=False, pre_wrap_hook=lambda chunks: method(chunks, training=True)
    )
    return {name: parameter.requires_grad for chunk in chunks for name, parameter in chunk.named_parameters()}


def test_its_peft_method_is_found_in_every_rank(installed: Path, model: Path) -> None:
    for trainable in run_ranks(2, tuned, model):
        assert {name for name, on in trainable.items() if on} == {name for name in trainable if "norm" in name}
        assert sum(trainable.values()) == 4 + 1  # one norm in each of four layers, and the last one


def test_an_unknown_method_names_it_among_the_known(installed: Path) -> None:
    from megatron.bridge.peft import PEFT_METHODS

    with pytest.raises(BridgeError, match=r"no PEFT method is called 'norm'; did you mean 'norms'\?"):
        PEFT_METHODS["norm"]
