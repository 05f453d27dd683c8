"""How the files of a Hugging Face folder are called, and which of them hold weights."""

import re
from pathlib import PurePath

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of the pickled checkpoints transformers wrote before safetensors.
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

SHARD_PATTERN = re.compile(r"model-\d+-of-\d+\.safetensors")

# Suffixes of weights, optimizer states and compiled engines in any framework's format.
WEIGHT_SUFFIXES = frozenset(
    (
        ".bin",
        ".caffemodel",
        ".ckpt",
        ".distcp",
        ".engine",
        ".ggml",
        ".gguf",
        ".h5",
        ".hdf5",
        ".keras",
        ".llamafile",
        ".mar",
        ".mlmodel",
        ".mlpackage",
        ".msgpack",
        ".nemo",
        ".npy",
        ".npz",
        ".onnx",
        ".onnx_data",
        ".ort",
        ".ot",
        ".params",
        ".partial",
        ".pb",
        ".pdiparams",
        ".pdmodel",
        ".pdparams",
        ".plan",
        ".pt",
        ".pth",
        ".safetensors",
        ".tflite",
        ".trt",
        ".weights",
        ".zarr",
    )
)


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` (from 1) of `count`: `model.safetensors` when it is the only one."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def holds_weights(path: PurePath) -> bool:
    """Whether the file is, by its name, weights in some format or the index of a sharded checkpoint."""
    return path.name.endswith(".index.json") or any(part.lower() in WEIGHT_SUFFIXES for part in path.suffixes)
