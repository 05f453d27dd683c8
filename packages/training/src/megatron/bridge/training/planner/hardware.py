"""Accelerators: what they can do at most, and how they are joined."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.training.peaks import peak_tflops

_TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of device, in the units of data sheets.

    Attributes:
        name: in `--gpus`.
        memory_gb, memory_gbps: size (GB, 10^9 bytes) and bandwidth (GB/s) of its memory.
        bf16_tflops, fp8_tflops: dense peaks; None where it has no products of 8 bits.
        node: how many share the fast network.
        node_gbps, network_gbps: GB/s per device and direction within a node and between nodes.
        source: of these values.
    """

    name: str
    memory_gb: float
    memory_gbps: float
    bf16_tflops: float
    fp8_tflops: float | None = None
    node: int
    node_gbps: float
    network_gbps: float
    source: str = "given"

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second that each of `ranks` neighbours sends."""
        return 1e9 * (self.node_gbps if ranks <= self.node else self.network_gbps)


@dataclass(frozen=True)
class Cluster:
    """So many of one device."""

    count: int
    device: Accelerator

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


def cluster(text: str, table: str | Path | None = None) -> Cluster:
    """`64xH100`.

    Args:
        text: number and name.
        table: YAML file of further devices, with the fields of `Accelerator`; they come before ours.

    Raises:
        BridgeError: it cannot be read, or no such device is known.
    """
    number, _, name = text.partition("x")
    if not number.isdigit() or int(number) < 1 or not name:
        raise BridgeError(f"--gpus {text!r} is not of the form 64xH100")
    known = {**_devices(_TABLE), **({} if table is None else _devices(Path(table)))}
    if name not in known:
        raise BridgeError(
            f"no accelerator is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}, and "
            "--hardware FILE adds others"
        )
    return Cluster(int(number), known[name])


def _devices(path: Path) -> dict[str, Accelerator]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        return {name: _device(name, dict(values)) for name, values in content.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Accelerator) if field.name != "name")
        raise BridgeError(
            f"{path} is no table of accelerators ({error}); its entries are NAME: {{{fields}}}"
        ) from error


def _device(name: str, values: Mapping[str, Any]) -> Accelerator:
    rest = {key: value for key, value in values.items() if key != "device"}
    rest.setdefault("bf16_tflops", peak_tflops(values.get("device"), "bfloat16"))
    if rest["bf16_tflops"] is None:
        raise ValueError(f"{name} lacks bf16_tflops")
    return Accelerator(name=name, **rest)
