"""`megatron-bridge new plugin`: every kind is written, built as a wheel, found, and passes its own tests."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Outcome, in_child
from new_family import write
from small_models import REPOSITORY

from megatron.bridge.cli.new.kinds import TEMPLATES
from megatron.bridge.cli.new.naming import Names, names_of
from megatron.bridge.cli.new.writing import write_plugin
from megatron.bridge.cli.root import run
from megatron.bridge.errors import BridgeError
from megatron.bridge.registry import refresh

OURS = ("dataset_format", "family", "peft", "recipe")
# The shortest and the longest that lines must hold, and what sorts before and behind everything else.
NAMES = {"dataset_format": "a1", "family": "zy-" + "x" * 21, "peft": "acme-norms", "recipe": "acme-small-model"}
type Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a plugin of each kind."""
    into = tmp_path_factory.mktemp("plugins")
    return {kind: write_plugin(TEMPLATES[kind], names_of(NAMES[kind]), into) for kind in OURS}


@pytest.fixture(scope="module")
def installed(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Their wheels, unpacked into a folder on `sys.path`."""
    uv = shutil.which("uv")
    assert uv, "uv is what runs this repository"
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    for folder in written.values():
        # uv builds its own backend's packages itself: nothing is downloaded.
        words = [uv, "build", "--offline", "--wheel", "-o", str(wheels), str(folder)]
        built = subprocess.run(words, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
    for file in wheels.glob("*.whl"):
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        refresh()
        yield site
    refresh()


def session(root: Path, *tests: str) -> int:
    """A session of pytest within this one, which it knows nothing of; its exit code."""
    apart = ["-q", "--import-mode=importlib", f"--rootdir={root}", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*apart, *tests]))


def test_every_kind_is_tried_here() -> None:
    offers = [offer for offer in TEMPLATES.offers() if offer.distribution.startswith("megatron-bridge-")]
    assert sorted(offer.name for offer in offers) == sorted(OURS)


def test_their_own_tests_pass(written: dict[str, Path], installed: Path, tmp_path: Path) -> None:
    folders = [str(folder / "tests") for folder in written.values()]
    ended = in_child(lambda: session(tmp_path, *folders), tmp_path, tmp_path / "outputs")
    assert ended.code == 0, ended.out + ended.err
    # Each kind has several tests, and none was passed over.
    assert "skipped" not in ended.out
    assert ended.out.count(".") >= 3 * len(OURS)


def test_they_are_found_under_their_names(installed: Path, tmp_path: Path, cli: Cli) -> None:
    listed = cli("plugins", folder=tmp_path).out
    for kind, name in NAMES.items():
        assert f"{name} 0.1.0" in listed, kind


@pytest.mark.parametrize("name", ["a1", "acme-norms", "zy-" + "x" * 21, "ab-cd-ef-gh-ij-kl-mn-op"])
def test_they_are_in_the_order_of_this_repository(name: str, tmp_path: Path) -> None:
    for kind in OURS:
        write_plugin(TEMPLATES[kind], Names(name), tmp_path / kind)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--no-cache", f"--config={REPOSITORY / 'pyproject.toml'}"]
    # What tests need not, which the configuration says of folders in this repository.
    tests = "--extend-per-file-ignores=" + ",".join(f"**/tests/**:{rule}" for rule in ("D", "ANN", "PLR", "RUF043"))
    for command in (["format", "--check"], ["check", tests]):
        ended = subprocess.run(
            [*ruff, *command, *config, "."], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout


def test_the_command_writes_and_tells_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new", "plugin", "Acme_Format", "--kind", "dataset_format"]) == 0
    assert "uv pip install -e acme-format pytest" in capfd.readouterr().out
    assert (tmp_path / "acme-format/src/acme_format/rows.py").exists()
    assert run(["new", "plugin", "acme-format", "--kind", "dataset_format"]) == 1
    assert "acme-format exists" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("acme", "famly", "no kind of plugin is called 'famly'; did you mean 'family'"),
        ("9acme", "family", "cannot be a plugin's name"),
        ("a" * 25, "family", "cannot be a plugin's name"),
        ("json", "family", "is Python's own"),
        ("torch", "family", "finds an installed package already"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, name: str, kind: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new", "plugin", name, "--kind", kind]) == 1
    assert why in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BridgeError, match="No space left on device"):
        write_plugin(TEMPLATES["family"], names_of("acme"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The models package without one of its families, whose layout is Llama's."""
    package = tmp_path / "models"
    (package / "src/megatron/bridge/models/families").mkdir(parents=True)
    (package / "tests").mkdir()
    text = (REPOSITORY / "packages/models/pyproject.toml").read_text("utf-8")
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith("MistralForCausalLM")]
    (package / "pyproject.toml").write_text("".join(kept), "utf-8")
    return package


def test_a_new_family_stands_in_its_place_and_passes_its_test(models: Path, tmp_path: Path) -> None:
    family, test, project = write("MistralForCausalLM", models)
    written = project.read_text("utf-8").replace("mistral:MistralBridge", "")
    ours = (REPOSITORY / "packages/models/pyproject.toml").read_text("utf-8").replace("mistral:MistralBridge", "")
    assert written == ours  # byte for byte where it was

    def passes() -> int:
        from zoo.exhibits import module_at

        from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES

        MODEL_BRIDGES.register("MistralForCausalLM", module_at(family).MistralBridge, replace=True)
        return session(tmp_path, str(test))

    ended = in_child(passes, tmp_path, tmp_path / "outputs")
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("LlamaForCausalLM", "is offered already"),
        ("LlamasForCausalLM", "did you mean 'LlamaForCausalLM'"),
        ("BartForCausalLM", "exists; add a class"),
    ],
)
def test_a_family_that_cannot_be_begun_is_refused(models: Path, architecture: str, why: str) -> None:
    (models / "tests/test_bart_families.py").touch()
    before = (models / "pyproject.toml").read_text("utf-8")
    with pytest.raises(BridgeError, match=why):
        write(architecture, models)
    assert (models / "pyproject.toml").read_text("utf-8") == before
    assert list((models / "src/megatron/bridge/models/families").iterdir()) == []
