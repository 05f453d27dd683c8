"""NVIDIA's distribution `megatron-bridge` owns the same import name; the two cannot be installed together."""

import importlib.metadata

from megatron.bridge.errors import BridgeError


def foreign_bridge_version() -> str | None:
    """The version of NVIDIA's `megatron-bridge` in this environment, or None."""
    try:
        return importlib.metadata.version("megatron-bridge")
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_foreign_bridge() -> None:
    """Refuse to work in an environment whose `megatron.bridge` files belong to two distributions.

    Raises:
        BridgeError: NVIDIA's distribution is installed too.
    """
    version = foreign_bridge_version()
    if version is not None:
        raise BridgeError(
            f"the distribution megatron-bridge {version} (NVIDIA) is installed beside megatron-bridge-conversion; both "
            "own the import name megatron.bridge and overwrite each other's files. Keep one: "
            "`uv pip uninstall megatron-bridge`, then reinstall megatron-bridge-conversion"
        )
