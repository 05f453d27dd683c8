"""LoRA's speed on this machine beside Hugging Face peft, and the size of what it saves.

`uv run python benchmarks/finetune.py` trains the same LoRA on the same Llama and tokens in fp32, in one process:

- bridge: this project's provider, `LoRA`, and Megatron-Core's DDP and optimizer;
- peft: `peft.get_peft_model` around transformers' model, scaled-dot-product attention, and torch's fused AdamW.

Their steps take turns, so that whatever else runs here slows both alike, and each is compared with the one beside it:
by the clock, and by CPU time, which tells more on a busy machine (`OMP_NUM_THREADS=1` makes it sharper still). Then
the bytes of an adapter-only checkpoint, and of the folder for peft, are set against the adapter's own.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

RATE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
type Step = Callable[[], float]


def rows(batch: int, length: int, vocabulary: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and those that follow them, the same for both."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def save_base(folder: Path, args: argparse.Namespace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=args.length,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def peft_loop(folder: Path, args: argparse.Namespace) -> Step:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS)
    model = peft.get_peft_model(base, config).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    data = rows(args.batch, args.length, args.vocabulary)

    def step() -> float:
        tokens, labels = next(data)
        loss = torch.nn.functional.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def bridge_loop(folder: Path, args: argparse.Namespace) -> tuple[Step, Any, list[Any]]:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron.bridge import AutoBridge
    from megatron.bridge.models.wrapping import with_ddp
    from megatron.bridge.peft import LoRA
    from megatron.bridge.training.fused_update import fuse_updates

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    method = LoRA(dim=args.rank, alpha=2 * args.rank, target_modules=TARGETS)
    bare = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=method)
    (model,) = with_ddp(bare, bare[0].config, None)
    settings = OptimizerConfig(optimizer="adam", lr=RATE, weight_decay=0.0, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [model])
    fuse_updates(optimizer)  # as our training loop does
    data = rows(args.batch, args.length, args.vocabulary)
    positions = torch.arange(args.length)[None]

    def step() -> float:
        tokens, labels = next(data)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=labels).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        return loss.item()

    return step, bridge, bare


def timed(step: Step) -> tuple[tuple[float, float], float]:
    """Seconds by the clock and of CPU, and the loss of one step."""
    clock, cpu = time.perf_counter(), time.process_time()
    loss = step()
    return (time.perf_counter() - clock, time.process_time() - cpu), loss


def sizes(bridge: Any, model: list[Any], folder: Path) -> dict[str, float]:
    """Bytes saved over bytes of the adapter."""
    from megatron.bridge.conversion import dist_checkpoint
    from megatron.bridge.conversion.megatron_checkpoint import model_state, state_keys
    from megatron.bridge.training.peft_section import trained_part

    own = sum(each.nbytes for name, each in model[0].named_parameters() if ".adapters." in name)
    state = trained_part(model_state(model), model, state_keys(1))
    saved = dist_checkpoint.save(folder / "checkpoint", 1, state)
    written = bridge.save_hf_adapter(model, folder / "peft")
    exported = sum(each.nbytes for _, each in bridge.export_adapter_weights(model))
    return {"checkpoint": _bytes(saved) / own, "peft's folder": _bytes(written) / exported}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, value in (("layers", 4), ("hidden", 512), ("vocabulary", 2048), ("length", 256), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        save_base(base, args)
        ours, bridge, model = bridge_loop(base, args)
        loops: dict[str, Step] = {"bridge": ours, "peft": peft_loop(base, args)}
        losses = {name: [loop(), loop()] for name, loop in loops.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for each in range(args.rounds):
            # Whoever comes second finds the caches as the other left them, so the order alternates.
            for name in sorted(loops, reverse=bool(each % 2)):
                taken, loss = timed(loops[name])
                times[name].append(taken)
                losses[name].append(loss)
        tokens = args.batch * args.length
        for name, taken in times.items():
            clock, cpu = (tokens / statistics.median(column) for column in zip(*taken, strict=True))
            told = f"loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}"
            print(f"{name:7} {clock:9,.0f} tokens/s, {cpu:9,.0f} per second of CPU   {told}")
        for at, what in enumerate(("the clock", "CPU time")):
            pairs = zip(times["bridge"], times["peft"], strict=True)
            ratio = statistics.median(theirs[at] / ours[at] for ours, theirs in pairs)
            print(f"bridge over peft by {what}: {ratio:.3f}x (median of {args.rounds} pairs of steps)")
        for name, ratio in sizes(bridge, model, Path(place)).items():
            print(f"{name}: {ratio:.3f}x the adapter's bytes")


if __name__ == "__main__":
    main()
