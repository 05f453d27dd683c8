"""The packages the doctor knows: what each is for, how to get it, and what its known failures mean. Data only."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that Megatron Bridge needs or can use.

    Attributes:
        name: its distribution.
        modules: imported in this order to prove that it works; where the first one is found, it is not absent.
        purpose: what it is for.
        get: the command, or the page, that gives it.
        also: other distributions that carry it.
        imports_torch: it is tried where torch has been imported already.
        slow: its import takes seconds even then, so it is tried last.
    """

    name: str
    modules: tuple[str, ...]
    purpose: str
    get: str
    also: tuple[str, ...] = ()
    imports_torch: bool = True
    slow: bool = False

    @property
    def distributions(self) -> tuple[str, ...]:
        """Every distribution that carries it."""
        return (self.name, *self.also)


TORCH = Package(
    name="torch",
    modules=("torch", "torch.distributed"),
    purpose="tensors, autograd and communication",
    get="uv pip install torch --torch-backend=auto",
)

REQUIRED: tuple[Package, ...] = (
    TORCH,
    Package(
        name="triton",
        modules=("triton",),
        purpose="megatron-core cannot be imported without it",
        get="uv pip install triton",
        imports_torch=False,
    ),
    Package(
        name="transformers",
        modules=("transformers",),
        purpose="Hugging Face configurations, tokenizers and the reference for proofs",
        get="uv pip install transformers",
        imports_torch=False,
    ),
    Package(
        name="safetensors",
        modules=("safetensors",),
        purpose="reading and writing weights",
        get="uv pip install safetensors",
        imports_torch=False,
    ),
)

# Proven by its files unless everything is to be imported: its import alone takes about ten seconds.
MEGATRON_CORE = Package(
    name="megatron-core",
    modules=("megatron.core",),
    purpose="the distributed engine",
    get="uv pip install megatron-core",
)

TRANSFORMER_ENGINE = Package(
    name="transformer-engine",
    modules=("transformer_engine", "transformer_engine.pytorch"),
    purpose="fused layers and FP8 on NVIDIA GPUs",
    get="uv pip install 'megatron-bridge-models[te]' (compiles; needs the CUDA toolkit)",
    also=("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13"),
)

OPTIONAL: tuple[Package, ...] = (
    TRANSFORMER_ENGINE,
    Package(
        name="apex",
        modules=("apex.optimizers", "apex.normalization"),
        purpose="fused optimizers and norms where Transformer Engine is absent",
        get="build https://github.com/NVIDIA/apex (PyPI's `apex` is an unrelated project)",
    ),
    Package(
        name="flash-attn",
        modules=("flash_attn",),
        purpose="attention kernels",
        get="uv pip install --no-build-isolation flash-attn (compiles; needs the CUDA toolkit)",
    ),
    Package(
        name="mamba-ssm",
        modules=("mamba_ssm",),
        purpose="state-space layers of hybrid models",
        get="uv pip install --no-build-isolation mamba-ssm (compiles; needs the CUDA toolkit)",
    ),
    Package(
        name="causal-conv1d",
        modules=("causal_conv1d",),
        purpose="convolution of state-space layers",
        get="uv pip install --no-build-isolation causal-conv1d (compiles; needs the CUDA toolkit)",
    ),
    Package(
        name="flash-linear-attention",
        modules=("fla",),
        purpose="linear attention, gated delta networks",
        get="uv pip install flash-linear-attention",
        also=("fla-core",),
        slow=True,
    ),
    Package(
        name="megatron-energon",
        modules=("megatron.energon",),
        purpose="multi-modal data loading",
        get="uv pip install megatron-energon",
    ),
    Package(
        name="nvidia-modelopt",
        modules=("modelopt.torch",),
        purpose="quantization, pruning and distillation",
        get="uv pip install nvidia-modelopt",
        slow=True,
    ),
    Package(
        name="nemo-run",
        modules=("nemo_run",),
        purpose="launching on clusters",
        get="uv pip install 'nemo-run>=0.5.0a0,<0.6.0', in an environment of its own: it pins old versions",
        slow=True,
    ),
    Package(
        name="nvidia-resiliency-ext",
        modules=("nvidia_resiliency_ext",),
        purpose="fault tolerance, straggler detection, asynchronous checkpoints",
        get="uv pip install nvidia-resiliency-ext",
    ),
    Package(
        name="tensorboard",
        modules=("tensorboard", "torch.utils.tensorboard"),
        purpose="logging metrics to files",
        get="uv pip install 'megatron-bridge-training[tensorboard]'",
    ),
    Package(
        name="wandb",
        modules=("wandb",),
        purpose="logging metrics to Weights & Biases",
        get="uv pip install wandb",
        imports_torch=False,
    ),
    Package(
        name="mlflow",
        modules=("mlflow",),
        purpose="logging metrics to MLflow",
        get="uv pip install mlflow",
        also=("mlflow-skinny",),
        imports_torch=False,
        slow=True,
    ),
    Package(
        name="datasets",
        modules=("datasets",),
        purpose="Hugging Face data sets",
        get="uv pip install datasets",
        imports_torch=False,
    ),
    Package(
        name="qwen-vl-utils",
        modules=("qwen_vl_utils",),
        purpose="image and video inputs of Qwen-VL",
        get="uv pip install qwen-vl-utils",
        slow=True,
    ),
    Package(
        name="timm",
        modules=("timm",),
        purpose="vision encoders",
        get="uv pip install timm",
        slow=True,
    ),
    Package(
        name="open-clip-torch",
        modules=("open_clip",),
        purpose="CLIP encoders",
        get="uv pip install 'open-clip-torch>=3.2.0'",
        slow=True,
    ),
    Package(
        name="bitstring",
        modules=("bitstring",),
        purpose="audio and video containers",
        get="uv pip install bitstring",
        imports_torch=False,
    ),
)


class KnownFailure(NamedTuple):
    """A failure that its users keep meeting: what it looks like, and what mends it.

    Attributes:
        package: whose failure, or None for any package.
        pattern: regular expression found in the reason.
    """

    package: str | None
    pattern: str
    remedy: str


KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "nvidia-modelopt",
        r"_type_utils",
        "this nvidia-modelopt is older than your torch, which dropped torch.onnx._type_utils: "
        "uv pip install -U nvidia-modelopt, or uninstall it if you do not quantize",
    ),
    KnownFailure(
        "transformer-engine",
        r"Could not find shared object|empty `transformer-engine`|No module named 'transformer_engine_torch'",
        "Transformer Engine is half installed: the extension for torch is missing. "
        "uv pip install 'megatron-bridge-models[te]', or uninstall every transformer-engine distribution",
    ),
    KnownFailure(
        "transformer-engine",
        r"version mismatch",
        "uv pip install --reinstall 'megatron-bridge-models[te]', so that its parts have one version",
    ),
    KnownFailure(
        "apex",
        r"pyramid|velruse|No module named 'apex\.",
        "this is PyPI's unrelated `apex`: uv pip uninstall apex, then build https://github.com/NVIDIA/apex",
    ),
    KnownFailure(
        None,
        r"undefined symbol",
        "it was compiled against another torch: reinstall it with --no-build-isolation --no-binary",
    ),
    KnownFailure(
        None,
        r"lib(cuda|nvidia-ml)\.so\.1",
        "the NVIDIA driver is not visible here: install it, or start the container with GPUs",
    ),
)
