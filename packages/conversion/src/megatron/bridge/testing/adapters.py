"""The adapter test kit: a PEFT method against Hugging Face peft at several parallel layouts, in three lines.

from megatron.bridge.testing import check_adapter

def test_my_method():
    check_adapter(LlamaConfig(hidden_size=64, ...), peft.VeraConfig(r=4, target_modules=["q_proj"]))
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.platform.launch import run_ranks
from megatron.bridge.testing.hf_models import random_model, save_random_model
from megatron.bridge.testing.layouts import layout_fields, ranks_of

if TYPE_CHECKING:
    import peft
    import torch
    from transformers import PretrainedConfig

    from megatron.bridge.conversion.auto_bridge import AutoBridge

STEPS, RATE, LENGTH = 20, 1e-2, 16
DENSE_LAYOUTS = ("single", "tp2", "sp2", "pp2")
# Megatron-Core trains a mixture of experts over tensor-parallel ranks with sequence parallelism only.
EXPERT_LAYOUTS = ("single", "sp2", "pp2", "ep2")
_FILE, _EXPERTS = "adapter_model.safetensors", ".experts."


class AdapterMismatch(AssertionError):
    """An adapter does not compute, learn or convert as it does in peft; the message says where."""


@dataclass(frozen=True)
class AdapterCase:
    """An adapter that peft made on a tiny random model, and what it computes and learns there.

    Args:
        name: of the case, for messages.
        config: of the model.
        folder: of the adapter, as peft wrote it.
        logits: of `batch(config)`, [rows, sequence, vocabulary].
        gradients: of the first step's loss, by peft's names of the weights.
        losses: of 20 steps of AdamW.
    """

    name: str
    config: "PretrainedConfig"
    folder: Path
    logits: "torch.Tensor"
    gradients: "Mapping[str, torch.Tensor]"
    losses: list[float]


@dataclass(frozen=True)
class AdapterResult:
    """What one rank makes of an adapter here.

    Args:
        logits, gradients, losses: as in `AdapterCase`; the last pipeline stage has the losses.
        weights: what was written again for peft, by its names.
        merged, apart: the model's weights by Hugging Face names, with the adapter in them, and without.
        saved: the folder that was written for peft.
    """

    logits: "torch.Tensor"
    gradients: "Mapping[str, torch.Tensor]"
    losses: list[float]
    weights: "Mapping[str, torch.Tensor]"
    merged: "Mapping[str, torch.Tensor]"
    apart: "Mapping[str, torch.Tensor]"
    saved: Path


def check_adapter(
    config: "PretrainedConfig", method: "peft.PeftConfig", layouts: Iterable[str] = DENSE_LAYOUTS
) -> None:
    """Prove a method on a tiny random model of `config`, from an adapter that peft makes by `method`.

    At every layout: peft's logits within 1e-5, gradients within 1e-4 of the largest, and losses of 20 steps within
    1e-4; the adapter is written as it was read, bit for bit; peft loads what was written; the merged weights compute
    what the adapter does, within 1e-5.

    Args:
        config: of a model that is small enough for a test, in float32.
        method: of peft.
        layouts: names of `testing.layouts`.

    Raises:
        AdapterMismatch: what differs, and where.
        BridgeError: the adapter is refused.
    """
    import torch

    torch.set_num_threads(1)  # ranks are forked from this process
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        save_random_model(config, root / "base")
        case = adapter_case("adapter", config, method, root / "adapter")
        for layout in layouts:
            (result,) = run_adapters(root / "base", layout, [case], root / layout).values()
            expect_what_peft_computes(case, result)
            expect_same_file(case, result)
            expect_that_peft_loads(case, result)
            expect_merged(case, result, root / "base", root / f"{layout} merged")


def batch(config: "PretrainedConfig") -> "tuple[torch.Tensor, torch.Tensor]":
    """Two rows of tokens and those that follow them, [2, 16] each."""
    import torch

    tokens = torch.randint(0, config.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def adapter_case(
    name: str, config: "PretrainedConfig", method: "peft.PeftConfig", folder: Path, *, tie_experts: bool = False
) -> AdapterCase:
    """Let peft make an adapter with no special values on `random_model(config)`, save it to `folder`, and train it.

    Args:
        name: for messages.
        config: of the model.
        method: of peft.
        folder: for the adapter.
        tie_experts: give all experts of a layer the matrices of the first, and the sum of their gradients.
    """
    import peft
    import torch

    model: Any = peft.get_peft_model(random_model(config), method)
    torch.manual_seed(5)
    trained = [each for each in model.parameters() if each.requires_grad]
    with torch.no_grad():
        for each in trained:
            each.add_(torch.randn_like(each), alpha=0.05)
        for own, each in model.named_parameters():
            if tie_experts and each.requires_grad and _EXPERTS in own:
                each.copy_(_alike(own, each, config, lambda experts: experts[:1]))
    model.save_pretrained(folder, save_embedding_layers=False)
    tokens, labels = batch(config)
    with torch.no_grad():
        logits = model(tokens).logits
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        losses.append(loss.item())
        for own, each in model.named_parameters():
            if tie_experts and each.requires_grad and _EXPERTS in own:
                each.grad = _alike(own, each.grad, config, lambda experts: experts.sum(0, keepdim=True))
        gradients = gradients or {
            _file_name(own): each.grad.clone() for own, each in model.named_parameters() if each.requires_grad
        }
        optimizer.step()
    return AdapterCase(name, config, folder, logits, gradients, losses)


def _alike(own: str, stacked: "torch.Tensor", config: Any, made: "Callable[[torch.Tensor], torch.Tensor]") -> Any:
    """What peft has of stacked experts, with what `made` gives, [1, ...], for each of them."""
    from megatron.bridge.conversion.hf_adapter import packed, unpacked

    name = _file_name(own)
    experts = unpacked(name, stacked, config.num_experts)
    return packed(name, made(experts).expand_as(experts)).contiguous()


def _file_name(parameter: str) -> str:
    """peft's files have no adapter's name, and the magnitudes of DoRA without the module that holds them."""
    return parameter.replace(".default", "").replace("vector.weight", "vector")


def run_adapters(
    base: Path, layout: str, cases: Iterable[AdapterCase], out: Path, timeout: float = 280
) -> dict[str, AdapterResult]:
    """Read, compare, train and write each case's adapter in the ranks of one layout; by case, of the last rank."""
    fields, held = layout_fields(layout), list(cases)
    results: dict[str, AdapterResult] = run_ranks(ranks_of(fields), _work, base, fields, held, out, timeout=timeout)[-1]
    return results


def _work(base: Path, fields: Mapping[str, Any], cases: list[AdapterCase], out: Path) -> dict[str, AdapterResult]:
    from megatron.bridge.conversion.auto_bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(base)
    return {case.name: _result(bridge, fields, case, out / case.name) for case in cases}


def _result(bridge: "AutoBridge", fields: Mapping[str, Any], case: AdapterCase, out: Path) -> AdapterResult:
    from safetensors.torch import load_file

    from megatron.bridge.conversion.logits import megatron_logits

    provider = bridge.to_megatron_provider()
    for name, value in {**fields, "layer_spec": "torch", "gradient_accumulation_fusion": False}.items():
        setattr(provider, name, value)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_adapter(model, case.folder, training=True)
    logits = megatron_logits(model, batch(case.config)[0])[..., : case.config.vocab_size]
    saved = bridge.save_hf_adapter(model, out)
    merged = dict(bridge.export_hf_weights(model, cpu=True))
    apart = dict(bridge.export_hf_weights(model, cpu=True, merge_adapter_weights=False))
    gradients, losses = _train(bridge, model, case.config)
    return AdapterResult(logits, gradients, losses, load_file(saved / _FILE), merged, apart, saved)


def _train(
    bridge: "AutoBridge", model: list[Any], config: "PretrainedConfig"
) -> "tuple[dict[str, torch.Tensor], list[float]]":
    """Gradients of the first of 20 steps, and the losses of all, on Megatron-Core's schedule, DDP and optimizer."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron.bridge.models.wrapping import with_ddp

    chunks: list[Any] = with_ddp(model, model[0].config, None)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=RATE, weight_decay=0.0, clip_grad=0.0, adam_beta2=0.999), chunks
    )
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    gradients: dict[str, torch.Tensor] = {}
    losses = []
    for _ in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = _schedule(chunks, config)
        losses.append(sum(loss.item() for loss in found) / 2 if found else 0.0)
        gradients = gradients or _gradients(bridge, chunks)
        optimizer.step()
    return gradients, losses


def _schedule(chunks: list[Any], config: "PretrainedConfig") -> "list[torch.Tensor]":
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens, labels = batch(config)
    positions = torch.arange(LENGTH).expand(1, -1)

    def forward_step(rows: Iterator[Any], model: Any) -> Any:
        row, targets = next(rows)
        loss = model(row, positions, None, labels=targets)
        return loss, lambda output: (output.mean(), output.detach().mean())

    losses: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(list(zip(tokens.split(1), labels.split(1), strict=True))),
        model=chunks,
        num_microbatches=2,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    return losses


def _gradients(bridge: "AutoBridge", chunks: list[Any]) -> "dict[str, torch.Tensor]":
    """Gradients under the names that peft has for their weights: exported as if they were the weights."""
    from megatron.bridge.conversion.adapters import adapted

    bare = [chunk.module for chunk in chunks]
    kept = {}
    for each in adapted(bare):
        parameters: Any = each.layer.adapters["default"]
        for parameter in parameters.parameters():
            if parameter not in kept:
                kept[parameter] = parameter.data
                parameter.data = parameter.main_grad.clone()
    found = {name: tensor.clone() for name, tensor in bridge.export_adapter_weights(bare)}
    for parameter, data in kept.items():
        parameter.data = data
    return found


def expect_what_peft_computes(case: AdapterCase, result: AdapterResult) -> None:
    """Compare logits within 1e-5, gradients within 1e-4 of the largest, losses within 1e-4.

    Raises:
        AdapterMismatch: what differs; or the losses hardly fall, so that they prove nothing.
    """
    _expect_close(result.logits, case.logits, 1e-5, f"{case.name}: logits")
    _expect_same_names(result.gradients, case.gradients, f"{case.name}: gradients")
    largest = max(each.abs().max().item() for each in case.gradients.values())
    for name, gradient in case.gradients.items():
        difference = (result.gradients[name] - gradient).abs().max().item()
        if not difference <= 1e-4 * largest:
            raise AdapterMismatch(f"{case.name}: the gradient of {name} differs by {difference} of {largest}")
    furthest = max(abs(ours - theirs) for ours, theirs in zip(result.losses, case.losses, strict=True))
    if not furthest <= 1e-4:
        raise AdapterMismatch(f"{case.name}: losses differ by {furthest}: {result.losses}, and in peft {case.losses}")
    if not case.losses[-1] < case.losses[0] - 0.01:
        raise AdapterMismatch(f"{case.name}: the losses hardly fall in peft itself: {case.losses}")


def expect_same_file(case: AdapterCase, result: AdapterResult) -> None:
    """Compare what was written with peft's own file, bit for bit; tensors without a module of their own stay behind.

    Raises:
        AdapterMismatch: names that differ, or a weight that has changed.
    """
    import torch
    from safetensors.torch import load_file

    # What all layers share is made anew from a seed (VeRA's projections).
    written = {name: each for name, each in load_file(case.folder / _FILE).items() if name in case.gradients}
    _expect_same_names(result.weights, written, f"{case.name}: the adapter's file")
    changed = [name for name, tensor in written.items() if not torch.equal(result.weights[name], tensor)]
    if changed:
        raise AdapterMismatch(f"{case.name}: these weights came back changed: {', '.join(changed)}")


def expect_that_peft_loads(case: AdapterCase, result: AdapterResult) -> None:
    """Load what was written in peft, on a new model: the logits must be those of the adapter, within 1e-5.

    Raises:
        AdapterMismatch: they are not.
    """
    import peft
    import torch

    base: Any = random_model(case.config)
    loaded = peft.PeftModel.from_pretrained(base, str(result.saved))
    with torch.no_grad():
        _expect_close(loaded(batch(case.config)[0]).logits, case.logits, 1e-5, f"{case.name}: what peft loads")


def expect_merged(case: AdapterCase, result: AdapterResult, base: Path, folder: Path) -> None:
    """The weights beneath the adapter are those of `base`; merged, they compute in transformers what the adapter does.

    Args:
        case, result: of the same adapter.
        base: the model's folder.
        folder: for the merged model.

    Raises:
        AdapterMismatch: they are not, or do not.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    plain = load_file(base / "model.safetensors")
    _expect_same_names(result.apart, plain, f"{case.name}: the weights beneath")
    if not all(torch.equal(result.apart[name], tensor) for name, tensor in plain.items()):
        raise AdapterMismatch(f"{case.name}: the weights beneath the adapter have changed")
    folder.mkdir(parents=True)
    save_file({name: each.contiguous() for name, each in result.merged.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text("utf-8"), "utf-8")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        _expect_close(merged(batch(case.config)[0]).logits, case.logits, 1e-5, f"{case.name}: merged")


def _expect_same_names(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    if ours.keys() != theirs.keys():
        raise AdapterMismatch(f"{what}: only one side has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")


def _expect_close(ours: "torch.Tensor", theirs: "torch.Tensor", tolerance: float, what: str) -> None:
    if ours.shape != theirs.shape:
        raise AdapterMismatch(f"{what}: {tuple(ours.shape)}, and in peft {tuple(theirs.shape)}")
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance * max(theirs.abs().max().item(), 1e-6):
        raise AdapterMismatch(f"{what} differ by {difference}")
