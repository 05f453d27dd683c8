"""What a device can do at most, for model FLOPs utilisation."""

# Dense bfloat16 TFLOP/s as NVIDIA's data sheets give them; the first name that occurs in the device's counts.
_BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "H800": 989.5,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A10": 125.0,
    "L4": 121.0,
}


def peak_tflops(device_name: str | None, dtype: str) -> float | None:
    """Dense TFLOP/s of a device in `dtype`; None where they are not known: other devices, other types.

    Args:
        device_name: as CUDA tells it; None for a CPU.
        dtype: of the parameters, e.g. `bfloat16`.
    """
    if device_name is None or dtype not in ("bfloat16", "float16"):
        return None
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in _BF16_TFLOPS.items() if {*name.split()} <= {*words}), None)
