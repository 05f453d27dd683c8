"""The documented import path of MIMO, `megatron.bridge.models.mimo`."""

import subprocess
import sys

import pytest

import megatron.bridge.mimo
import megatron.bridge.models.mimo


def test_its_names_are_those_of_the_package() -> None:
    from megatron.bridge.models.mimo import MimoParallelismConfig, ModuleParallelismConfig

    assert MimoParallelismConfig is megatron.bridge.mimo.MimoParallelismConfig
    assert ModuleParallelismConfig is megatron.bridge.mimo.ModuleParallelismConfig
    assert set(megatron.bridge.mimo.__all__) <= set(dir(megatron.bridge.models.mimo))


def test_a_name_that_it_does_not_have_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="MimoConfig"):
        from megatron.bridge.models.mimo import MimoConfig  # noqa: F401


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['megatron.bridge.mimo'] = None\n"
        "from megatron.bridge.models.mimo import MimoParallelismConfig"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert "uv pip install megatron-bridge-mimo" in done.stderr
