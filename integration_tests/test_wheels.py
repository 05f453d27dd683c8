"""The wheels: disjoint, typed, described; two of them alone in a clean environment, where conversion works."""

import email
import os
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from small_models import REPOSITORY, save_small_llama

PACKAGES = {
    f"megatron-bridge-{part}" for part in ("conversion", "models", "peft", "data", "training", "mimo", "recipes")
}
CONVERSION = ("megatron-bridge-conversion", "megatron-bridge-models")


def uv(*arguments: str | Path, **environment: str) -> str:
    program = shutil.which("uv")
    assert program, "uv is what runs this repository"
    ended = subprocess.run(
        [program, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution -> its wheel."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--all-packages", "--wheel", "-o", folder)
    return {file.name.partition("-")[0].replace("_", "-"): file for file in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def bin_folder(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a clean environment: the locked dependencies of the models package, and the two wheels."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    lock_only = ("--frozen", "--exact", "--no-dev", "--no-install-workspace")
    uv("sync", *lock_only, "--package", "megatron-bridge-models", UV_PROJECT_ENVIRONMENT=str(place))
    uv("pip", "install", "--python", place, "--no-deps", "--no-index", *(wheels[name] for name in CONVERSION))
    uv("pip", "check", "--python", place)  # what the wheels declare is there
    return place / "bin"


def in_clean(bin_folder: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(bin_folder / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_package_is_a_wheel(wheels: dict[str, Path]) -> None:
    assert wheels.keys() == PACKAGES | {"internlm2-bridge", "primus-bridge", "vera-bridge"}


def test_no_two_wheels_ship_the_same_file(wheels: dict[str, Path]) -> None:
    names = [name for file in wheels.values() for name in zipfile.ZipFile(file).namelist() if not name.endswith("/")]
    shipped = Counter(names)
    assert {name for name, count in shipped.items() if count > 1} == set()
    assert "megatron/__init__.py" not in shipped, "it would hide megatron.core"


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_wheel_is_typed_licensed_and_described(wheels: dict[str, Path], name: str) -> None:
    with zipfile.ZipFile(wheels[name]) as wheel:
        files = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(file for file in files if file.endswith("/METADATA"))))
    part = name.removeprefix("megatron-bridge-")
    home = "megatron/bridge" if part == "conversion" else f"megatron/bridge/{part}"
    assert f"{home}/py.typed" in files
    own = [file for file in files if "/plugin_templates/" not in file]  # which have tests for those who begin with them
    assert not [file for file in own if "/tests/" in file or file.endswith(".pyc")]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = str(metadata.get_payload())
    assert description.startswith(f"# {name}\n")
    assert len(description) > 300


CONVERT = """
from pathlib import Path
from megatron.bridge import AutoBridge
from megatron.bridge.conversion.verify import verify

bridge = AutoBridge.from_hf_pretrained("model")
model = bridge.to_megatron_model()
bridge.save_megatron_model(model, "checkpoint")
bridge.save_hf_pretrained(model, "exported")
certificate = verify(Path("exported"), megatron_path=Path("checkpoint"))
assert certificate.passed, certificate
print(certificate.weights_compared)
"""

ABSENT = """
import megatron.bridge
try:
    import megatron.bridge.training
except ModuleNotFoundError as error:
    assert error.name == "megatron.bridge.training"
else:
    raise SystemExit("training is there")
print(megatron.bridge.training)
"""


def test_conversion_works_with_two_wheels(bin_folder: Path, tmp_path: Path) -> None:
    save_small_llama(tmp_path / "model")
    ended = in_clean(bin_folder, tmp_path, "python", "-W", "ignore", "-c", CONVERT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "20"


def test_what_is_absent_says_what_to_install(bin_folder: Path, tmp_path: Path) -> None:
    asked = in_clean(bin_folder, tmp_path, "python", "-c", ABSENT)
    assert asked.returncode == 1
    assert "megatron.bridge.training is not installed" in asked.stderr
    assert "uv pip install megatron-bridge-training" in asked.stderr
    for command in ("train", "quickstart"):
        ended = in_clean(bin_folder, tmp_path, "megatron-bridge", command)
        assert ended.returncode == 2
        assert "it comes with the package 'megatron-bridge-training'" in ended.stderr
    listed = in_clean(bin_folder, tmp_path, "megatron-bridge", "plugins")
    assert "megatron-bridge-models 0" in listed.stdout
    assert "megatron-bridge-training" not in listed.stdout
