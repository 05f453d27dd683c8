"""The layer specs build GPT models that agree with each other: keys, logits and gradients."""

import importlib.machinery
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs import LAYER_SPECS, default_layer_spec
from megatron.bridge.testing import run_ranks

VOCABULARY = 96
LENGTH = 24

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one head per query": {"num_query_groups": 8},
    "one key head": {"num_query_groups": 1},
    "window": {"window_size": (5, 0)},
    "window in every second layer": {"window_size": (5, 0), "window_attn_skip_freq": 2},
    "qk norm": {"qk_layernorm": True},
    "LayerNorm and biases": {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False},
    "gated gelu": {"activation_func": torch.nn.functional.gelu},
    "clamped gate": {"activation_func_clamp_value": 0.1, "glu_linear_offset": 1.0},
    "softmax scale": {"softmax_scale": 0.3},
    "interleaved rotation": {"rotary_interleaved": True},
    "no rotation in one layer": {"no_rope_freq": [0, 1]},
    "biased qkv": {"add_qkv_bias": True},
    "half rotated": {"rotary_percent": 0.5},
    "output gate": {"attention_output_gate": True},
    "recomputed attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "recomputed layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

EXPERTS: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}


def start(tensor_parallel: int = 1) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    model_parallel_cuda_manual_seed(7)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result in a rank of its own, so that this process stays free to fork further ranks."""

    def prepared() -> Any:
        start()
        return function(*args)

    return run_ranks(1, prepared, timeout=60)[0]


def make_config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "init_method_std": 0.2,
    }
    return TransformerConfig(**(settings | changes))


def make_model(spec: str, rotary_percent: float = 1.0, **changes: Any) -> Any:
    """A GPT model whose weights depend on their names and shapes alone, norms and biases perturbed."""
    config = make_config(**changes)
    model = GPTModel(
        config,
        LAYER_SPECS[spec](config, vp_stage=None),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        rotary_percent=rotary_percent,
        share_embeddings_and_output_weights=False,
    )
    generator = torch.Generator().manual_seed(11)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        center = 1.0 if parameter.dim() == 1 else 0.0
        scale = 0.1 if parameter.dim() == 1 else 1 / math.sqrt(parameter.shape[-1])
        parameter.data.copy_(center + scale * noise)
    return model


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any, rows: torch.Tensor, **extra: Any) -> torch.Tensor:
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    logits: torch.Tensor = model(rows, positions, extra.pop("attention_mask", None), **extra)
    return logits


def logits_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    logits = logits_of(model, tokens())
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"logits": logits.detach(), **gradients}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].abs().max() > 0 for name in theirs)
    return max((((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item(), name) for name in theirs)


def disagreement(changes: dict[str, Any]) -> tuple[float, str]:
    return largest_difference(*(logits_and_gradients(make_model(spec, **changes)) for spec in ("torch", "local")))


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_agrees_with_stock_megatron(shape: str) -> None:
    difference, name = alone(disagreement, SHAPES[shape])
    assert difference < 1e-5, name


def checkpoint_entries(spec: str, changes: dict[str, Any]) -> dict[str, Any]:
    saved = make_model(spec, **changes).sharded_state_dict()
    return {value.key: getattr(value, "global_shape", None) for value in saved.values()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_layernorm": True, "normalization": "LayerNorm"}, EXPERTS],
    ids=["dense", "LayerNorm", "experts"],
)
def test_specs_share_their_checkpoint_keys(changes: dict[str, Any]) -> None:
    ours = alone(checkpoint_entries, "torch", changes)
    assert ours == alone(checkpoint_entries, "local", changes)
    norm = "pre_mlp_layernorm.weight" if "num_moe_experts" in changes else "mlp.linear_fc1.layer_norm_weight"
    assert f"decoder.layers.{norm}" in ours
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in ours


def packed_and_separate(changes: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Logits of packed documents, of the same documents one by one, and of the row taken as one document."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = make_model("torch", **changes)
    bounds = torch.tensor([0, 7, 8, 20, LENGTH], dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=12, max_seqlen_kv=12)
    rows = tokens(batch=1)
    spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    with torch.no_grad():
        together = logits_of(model, rows, packed_seq_params=packed)
        apart = torch.cat([logits_of(model, rows[:, begin:end]) for begin, end in spans], dim=1)
        return together, apart, logits_of(model, rows)


@pytest.mark.parametrize("changes", [{}, {"window_size": (4, 0)}, {"rotary_interleaved": True}], ids=str)
def test_packed_documents_equal_separate_ones(changes: dict[str, Any]) -> None:
    together, apart, joined = alone(packed_and_separate, changes)
    assert (together - apart).abs().max() / apart.abs().max() < 1e-5
    assert (together - joined).abs().max() / apart.abs().max() > 1e-2


def decoded_and_whole() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits from a key-value cache filled in pieces of several sizes, and from one pass."""
    from megatron.core.inference.contexts import StaticInferenceContext

    model = make_model("torch").eval()
    rows = tokens()
    pieces = []
    with torch.no_grad():
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=LENGTH)
        for begin, end in ((0, 10), (10, 11), (11, 15), (15, LENGTH)):
            positions = torch.arange(begin, end).expand(2, -1)
            pieces.append(model(rows[:, begin:end], positions, None, inference_context=context))
            context.sequence_len_offset += end - begin
        return torch.cat(pieces, dim=1), logits_of(model, rows)


def test_cached_decoding_equals_one_pass() -> None:
    cached, whole = alone(decoded_and_whole)
    assert (cached - whole).abs().max() / whole.abs().max() < 1e-5


def gradients_of_rank(tensor_parallel: int, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Gathered gradients of the sum of all logits' squares, as Megatron-Core's own training would reduce them."""
    start(tensor_parallel)
    rank = parallel_state.get_tensor_model_parallel_rank()
    model = make_model(
        "torch", tensor_model_parallel_size=tensor_parallel, sequence_parallel=sequence_parallel, qk_layernorm=True
    )
    whole = dict(make_whole_weights(tensor_parallel))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(shard(whole[name], parameter.shape, rank, name))
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    rows = tokens()
    positions = torch.arange(LENGTH).expand_as(rows)
    logits = gather_from_tensor_model_parallel_region(wrapped(rows, positions, None))
    logits.square().sum().backward()
    finalize_model_grads([wrapped])
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        found[name] = gathered(parameter.main_grad, whole[name].shape, name)
    return found


def make_whole_weights(tensor_parallel: int) -> dict[str, torch.Tensor]:
    shapes = {
        "embedding.word_embeddings.weight": (VOCABULARY, 64),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (VOCABULARY, 64),
    }
    for layer in range(2):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (64,),
            prefix + "pre_mlp_layernorm.weight": (64,),
            prefix + "self_attention.linear_qkv.weight": (96, 64),
            prefix + "self_attention.linear_proj.weight": (64, 64),
            prefix + "self_attention.q_layernorm.weight": (8,),
            prefix + "self_attention.k_layernorm.weight": (8,),
            prefix + "mlp.linear_fc1.weight": (192, 64),
            prefix + "mlp.linear_fc2.weight": (64, 96),
        }
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def shard(whole: torch.Tensor, shape: torch.Size, rank: int, name: str) -> torch.Tensor:
    """This rank's part: the axis that differs is cut; gate and up of the first MLP layer are cut each."""
    if whole.shape == shape:
        return whole
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.split(shape[0] // 2)[rank] for half in whole.chunk(2)])
    axis = next(axis for axis in range(whole.dim()) if whole.shape[axis] != shape[axis])
    return whole.split(shape[axis], dim=axis)[rank]


def gathered(part: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """The inverse of `shard` over all ranks of the world."""
    if part.shape == shape:
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, part.contiguous())
    if name.endswith("linear_fc1.weight"):
        halves = [piece.chunk(2) for piece in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    axis = next(axis for axis in range(len(shape)) if part.shape[axis] != shape[axis])
    return torch.cat(parts, dim=axis)


@pytest.fixture(scope="module")
def one_rank_gradients() -> dict[str, torch.Tensor]:
    results: list[dict[str, torch.Tensor]] = run_ranks(1, gradients_of_rank, 1, False, timeout=60)
    return results[0]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2+SP"])
def test_tensor_parallel_equals_one_rank(one_rank_gradients: dict[str, torch.Tensor], sequence_parallel: bool) -> None:
    for rank in run_ranks(2, gradients_of_rank, 2, sequence_parallel, timeout=60):
        difference, name = largest_difference(rank, one_rank_gradients)
        assert difference < 1e-5, name


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"softmax_type": "off-by-one"}, "softmax_type"),
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling"),
        ({"persist_layer_norm": True}, "persist_layer_norm"),
    ],
)
def test_torch_refuses_what_it_cannot_do(changes: dict[str, Any], culprit: str) -> None:
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(BridgeError, match=culprit):
        LAYER_SPECS["torch"](config, vp_stage=None)


def test_local_refuses_sequence_parallelism() -> None:
    with pytest.raises(BridgeError, match="sequence_parallel"):
        LAYER_SPECS["local"](make_config(sequence_parallel=True, tensor_model_parallel_size=2), vp_stage=None)


def test_transformer_engine_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(BridgeError, match=r"megatron-bridge-models\[te\]"):
        LAYER_SPECS["transformer_engine"](make_config(), vp_stage=None)


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [("cuda", True, "transformer_engine"), ("cuda", False, "torch"), ("cpu", True, "torch"), ("cpu", False, "torch")],
)
def test_default_needs_cuda_and_transformer_engine(
    device: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("transformer_engine")
    module.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", module if installed else None)
    monkeypatch.setattr("megatron.bridge.platform.device", lambda: torch.device(device))
    assert default_layer_spec() == expected


def test_offers_name_this_package() -> None:
    offered = {offer.name: offer.distribution for offer in LAYER_SPECS.offers()}
    assert offered.items() >= dict.fromkeys(("local", "torch", "transformer_engine"), "megatron-bridge-models").items()
