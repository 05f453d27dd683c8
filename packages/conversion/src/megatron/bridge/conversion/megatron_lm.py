"""Which Hugging Face model a checkpoint of Megatron-LM's own training is, told from the arguments it carries.

Megatron-LM saves the run's command line, an `argparse.Namespace`, beside the weights. It is read without running any
code that the file names, and decides the model only where it leaves no doubt; the weights must then fit, one and all.
"""

import argparse
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.checkpoint_layout import CheckpointError, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_COMMON_FILE = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"
_REMEDY = "say which model it is: --hf-config FOLDER (hf_model=...), a folder with its config.json"

# Arguments that change what the model computes, with the values that every model told apart here has.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "attention_output_gate": (False, None),
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False, None),
    "experimental_attention_variant": (None,),
    "heterogeneous_layers_config_path": (None,),
    "moe_layer_freq": (1, None),
    "moe_latent_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_num_groups": (None,),
    "moe_router_pre_softmax": (False, None),
    "moe_router_score_function": ("softmax", None),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_intermediate_size": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False, None),
    "no_rope_freq": (None,),
    "quick_geglu": (False, None),
    "rotary_interleaved": (False, None),
    "rotary_percent": (1.0, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla", None),
    "squared_relu": (False, None),
    "window_size": (None,),
}
# Without these no configuration can be written; older versions of Megatron-LM had all of them too.
_NEEDED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "rotary_base",
    "norm_epsilon",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "add_bias_linear",
)
# What Megatron-LM's --use-rope-scaling stands for.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def derived_hf_config(path: str | Path) -> "PretrainedConfig | None":
    """The Hugging Face configuration that a Megatron-LM checkpoint's arguments mean; None where it carries none.

    Raises:
        CheckpointError: no checkpoint, or arguments that do not determine a model; every such argument is named.
    """
    folder = resolve(path)
    args = read_args(folder)
    if args is None:
        return None
    problems = [f"{name} is not stated" for name in _NEEDED if getattr(args, name, None) is None]
    problems += [
        f"{name}={getattr(args, name)!r} (known here: {' or '.join(map(repr, values))})"
        for name, values in _NEUTRAL.items()
        if getattr(args, name, values[-1]) not in values
    ]
    if problems:
        raise CheckpointError(
            f"the arguments in {folder} do not tell which Hugging Face model it is:\n  "
            + "\n  ".join(problems)
            + f"\n{_REMEDY}"
        )
    from transformers import CONFIG_MAPPING

    kind, architecture, values = _family(args, folder)
    config: PretrainedConfig = CONFIG_MAPPING[kind](**_shared(args), **values, architectures=[architecture])
    return config


def _family(args: Any, folder: Path) -> tuple[str, str, dict[str, Any]]:
    """transformers' model type and architecture, and the values that this family has besides."""
    experts, qkv_bias = getattr(args, "num_experts", None), bool(getattr(args, "add_qkv_bias", False))
    qk_norm, attention_bias = bool(getattr(args, "qk_layernorm", False)), {"attention_bias": qkv_bias}
    if experts and qk_norm:
        values = _expert_values(args) | {"num_experts": experts, "norm_topk_prob": True, **attention_bias}
        return "qwen3_moe", "Qwen3MoeForCausalLM", values
    if experts and not qkv_bias:
        values = {
            **_expert_values(args),
            "num_local_experts": experts,
            "intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        }
        return "mixtral", "MixtralForCausalLM", values
    if experts:
        raise CheckpointError(
            f"the arguments in {folder} do not tell which Hugging Face model it is: "
            f"num_experts={experts} with add_qkv_bias=True and qk_layernorm=False; {_REMEDY}"
        )
    dense = {"intermediate_size": args.ffn_hidden_size}
    if qk_norm:
        return "qwen3", "Qwen3ForCausalLM", dense | attention_bias
    if qkv_bias:
        return "qwen2", "Qwen2ForCausalLM", dense
    return "llama", "LlamaForCausalLM", dense


def _expert_values(args: Any) -> dict[str, Any]:
    return {
        "intermediate_size": args.ffn_hidden_size,
        "moe_intermediate_size": getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size,
        "num_experts_per_tok": args.moe_router_topk,
    }


def _shared(args: Any) -> dict[str, Any]:
    """What all these families' configurations have, by the same names."""
    grouped = getattr(args, "group_query_attention", False)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        rope |= {"rope_type": "llama3", "factor": float(getattr(args, "rope_scaling_factor", 8.0)), **_LLAMA3_SCALING}
    return {
        "num_hidden_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups if grouped else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": args.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "dtype": _dtype(args),
        # The tokenizer's, which the arguments do not tell; transformers would make some up.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _dtype(args: Any) -> str:
    if getattr(args, "bf16", False):
        return "bfloat16"
    return "float16" if getattr(args, "fp16", False) else "float32"


def read_args(folder: Path) -> Any:
    """The arguments that a checkpoint folder carries, as attributes; None where it carries none.

    Raises:
        CheckpointError: the file that should hold them cannot be read.
    """
    import torch

    stream, file = _common_stream(folder)
    if stream is None:
        return None
    try:
        common = torch.load(stream, map_location="cpu", pickle_module=_InertPickle, weights_only=False)
        common = common[0] if isinstance(common, list) else common
        args = common.get("args")
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({error}); take another copy of the checkpoint") from error
    return args if isinstance(args, argparse.Namespace) else None


def _common_stream(folder: Path) -> tuple[Any, Path]:
    """The saved values that are not tensors: in older checkpoints a file of their own, in newer one entry of many."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from megatron.bridge.conversion.dist_checkpoint import read_metadata

    if (folder / _COMMON_FILE).is_file():
        return io.BytesIO((folder / _COMMON_FILE).read_bytes()), folder / _COMMON_FILE
    info = (read_metadata(folder).storage_data or {}).get(MetadataIndex(_COMMON_KEY))
    if info is None:
        return None, folder
    file = folder / info.relative_path
    try:
        with file.open("rb") as stream:
            stream.seek(info.offset)
            return io.BytesIO(stream.read(info.length)), file
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}; take another copy of the checkpoint"
        ) from error


class _Unknown(SimpleNamespace):
    """Stands for an object of a class that is not known here; holds nothing and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Nothing is taken over."""

    def append(self, item: Any) -> None:
        """Nothing is kept."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing is kept."""


class _InertUnpickler(pickle.Unpickler):
    """Makes plain values and a `Namespace`; all else becomes `_Unknown`, so that no code of the file's is run."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("argparse", "Namespace"): argparse.Namespace, ("collections", "OrderedDict"): OrderedDict}
        return known.get((module, name), _Unknown)


class _InertPickle:
    """What `torch.load` asks of a pickle module."""

    Unpickler = _InertUnpickler
    load = staticmethod(pickle.load)
