"""Training speed on this machine: loops around one Llama, in turn, as tokens per second.

`uv run python benchmarks/train.py` compares in fp32 or, with `--bf16`, in bf16, on whatever device is there, on one
process each, or with `--ranks 2` on data-parallel ones,

- bridge: `megatron.bridge.training.train.train`, all of the loop but data loading: steps, reports to a file, the ranks'
  agreement whether to go on; of this project's model with the layer spec `torch`;
- same model: a bare loop on Megatron-Core's schedule, DDP and optimizer around the very same model, and with the same
  allocator settings: what lies between the two is what our loop costs;
- megatron: the bare loop around Megatron-Core's own model and its layer spec `local`;
- transformers: `LlamaForCausalLM` with scaled-dot-product attention and torch's fused AdamW, its trainer's default (one
  process); in bf16 its weights and moments are bf16, where Megatron-Core keeps fp32 ones beside them.

Every loop clips gradients to norm 1 and sees the same tokens. Each has processes of its own, kept warm, and they take
turns, so that whatever else runs here slows all alike; turns are compared round by round, and medians are told. Where
a process's memory comes to lie makes it up to 5% faster or slower than its twin for as long as it lives: differences
as small take several starts (`--starts`), whose medians are told by their median and range. On a
busy machine the figures of CPU time say more than those on the clock; `OMP_NUM_THREADS=1` makes them sharper still.
Model FLOPs utilisation is told where the device's peak is known: `--shape llama32_1b --bf16 --only bridge transformers`
on one GPU.
"""

import argparse
import dataclasses
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """The Llama that is trained."""

    layers: int = 8
    hidden: int = 512
    ffn: int = 1408
    heads: int = 8
    key_heads: int = 4
    vocabulary: int = 2048
    length: int = 512
    batch: int = 4
    tied: bool = False
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Tokens of one step on one rank."""
        return self.batch * self.length


SHAPES = {
    "small": Shape(),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama32_1b": Shape(16, 2048, 8192, 32, 8, vocabulary=128256, length=4096, batch=1, tied=True),
}


@dataclass(frozen=True)
class Turn:
    """What a loop did in one turn: seconds on the clock, seconds of CPU over all its threads, the last step's loss."""

    seconds: float
    cpu_seconds: float
    loss: float


class Turns:
    """Asks a loop for some steps at a time, and answers each request with a `Turn`."""

    def __init__(self, requests: Connection) -> None:
        self._requests, self._left = requests, 0
        self._begin = self._cpu_begin = 0.0

    def wait(self) -> bool:
        """Wait for a turn; whether there is one."""
        self._left = self._requests.recv()
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()
        return self._left > 0

    def done(self, loss: float) -> bool:
        """A step is done; whether another is to follow, now or in another turn."""
        self._left -= 1
        if self._left > 0:
            return True
        self._requests.send(Turn(time.perf_counter() - self._begin, time.process_time() - self._cpu_begin, loss))
        return self.wait()

    def take(self, step: Callable[[], float]) -> None:
        """Do steps as long as they are asked for."""
        going = self.wait()
        while going:
            going = self.done(step())


type Loop = Callable[[Shape, Turns], None]
LEARNING_RATE = 3e-4


def batches(shape: Shape) -> Iterator[torch.Tensor]:
    """Rows of `length + 1` random tokens on this process's device, the same for every loop."""
    from megatron.bridge.platform import device

    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))
    while True:
        yield torch.randint(0, shape.vocabulary, (shape.batch, shape.length + 1), generator=generator).to(device())


def transformers_loop(shape: Shape, turns: Turns) -> None:
    """A plain loop around transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron.bridge.platform import device

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device(), getattr(torch, shape.dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    rows = batches(shape)

    def step() -> float:
        row = next(rows)
        targets = row[:, 1:].contiguous()
        loss = model(input_ids=row[:, :-1], labels=targets, shift_labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    turns.take(step)


def _provider(shape: Shape) -> Any:
    from megatron.bridge.models import GPTModelProvider

    return GPTModelProvider(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.key_heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        vocab_size=shape.vocabulary,
        seq_length=shape.length,
        share_embeddings_and_output_weights=shape.tied,
        layer_spec="torch",
        **low_precision(shape),
    )


def low_precision(shape: Shape) -> dict[str, Any]:
    """What Megatron-Core's configurations say of bf16."""
    dtype = getattr(torch, shape.dtype)
    return {"bf16": True, "params_dtype": dtype, "pipeline_dtype": dtype} if shape.dtype == "bfloat16" else {}


def _our_model(shape: Shape) -> Any:
    from megatron.bridge.platform import keep_freed_memory

    keep_freed_memory()  # as the whole loop does
    return _provider(shape).provide_distributed_model(wrap_with_ddp=False)[0]


def bridge_loop(shape: Shape, turns: Turns) -> None:
    """Our training loop, on the tokens of the other loops."""
    from megatron.bridge import platform
    from megatron.bridge.training import config as c
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.setup import setup
    from megatron.bridge.training.train import train

    class InTurns(Callback):
        def on_train_start(self, run: Any) -> None:
            turns.wait()

        def on_step_end(self, run: Any, result: Any) -> None:
            if not turns.done(result.loss):
                run.request_stop("measured")

    platform.initialize_distributed()
    batch = shape.batch * platform.world_size()
    cfg = c.ConfigContainer(
        model=_provider(shape),
        dataset=c.GPTDatasetConfig(mock=True, sequence_length=shape.length),
        tokenizer=c.TokenizerConfig(vocab_size=shape.vocabulary),
        train=c.TrainingConfig(train_iters=1000, global_batch_size=batch, micro_batch_size=shape.batch),
        optimizer=c.OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, clip_grad=1.0),
        mixed_precision="bf16_mixed" if shape.dtype == "bfloat16" else "fp32",
        logger=c.LoggerConfig(progress=False, folder=tempfile.mkdtemp()),
    )
    run = setup(cfg, [InTurns()])
    rows = batches(shape)
    positions = torch.arange(shape.length, device=platform.device()).expand(shape.batch, -1)
    mask = torch.ones(shape.batch, shape.length, device=platform.device())

    def same_tokens() -> Iterator[dict[str, torch.Tensor]]:
        for row in rows:
            tokens, labels = row[:, :-1].contiguous(), row[:, 1:].contiguous()
            yield {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}

    run.train_data = [run.phases.waiting(same_tokens())]
    train(run, forward_step)


def megatron_loop(shape: Shape, turns: Turns, build: Callable[[Shape], Any]) -> None:
    """Megatron-Core's own schedule, DDP and optimizer around a GPT model."""
    from megatron.bridge import platform

    platform.initialize_distributed()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = build(shape).to(platform.device())
    model.config.finalize_model_grads_func = finalize_model_grads
    if (low := low_precision(shape)) and not isinstance(model, Float16Module):
        model = Float16Module(model.config, model)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.broadcast_params()
    settings = OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, clip_grad=1.0, **low)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    forward_backward = get_forward_backward_func()
    rows = batches(shape)
    positions = torch.arange(shape.length, device=platform.device()).expand(shape.batch, -1)

    def forward(iterator: Iterator[torch.Tensor], module: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        row = next(iterator)
        losses = module(row[:, :-1].contiguous(), positions, None, labels=row[:, 1:].contiguous())
        return losses, lambda output: (output.mean(), {"loss": output.detach().mean()})

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = forward_backward(
            forward_step_func=forward,
            data_iterator=rows,
            model=[wrapped],
            num_microbatches=1,
            seq_length=shape.length,
            micro_batch_size=shape.batch,
            forward_only=False,
        )
        optimizer.step()
        return float(reduced[0]["loss"])

    turns.take(step)


def _core_model(shape: Shape) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.models.layer_specs import LAYER_SPECS

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.key_heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        **low_precision(shape),
    )
    return GPTModel(
        config,
        LAYER_SPECS["local"](config, vp_stage=None),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
    )


LOOPS: dict[str, Loop] = {
    "bridge": bridge_loop,
    "same model": lambda shape, turns: megatron_loop(shape, turns, _our_model),
    "megatron": lambda shape, turns: megatron_loop(shape, turns, _core_model),
    "transformers": transformers_loop,
}
ON_SEVERAL_RANKS = ("bridge", "same model", "megatron")


def serve(name: str, shape: Shape, place: dict[str, str], requests: Connection) -> None:
    """Run in a process of its own, as one rank: answer requests for steps."""
    os.environ.update(place)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // int(place["WORLD_SIZE"]))))
    LOOPS[name](shape, Turns(requests))


def start(name: str, shape: Shape, ranks: int) -> list[Connection]:
    """The processes of a loop, one for each rank, by the lines to them."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    lines = []
    for rank in range(ranks):
        here, there = context.Pipe()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        context.Process(target=serve, args=(name, shape, place, there), daemon=True).start()
        there.close()
        lines.append(here)
    return lines


def ask(lines: list[Connection], steps: int) -> Turn:
    """A turn of all ranks: the slowest one's seconds, the seconds of CPU of all, rank 0's loss."""
    for line in lines:
        line.send(steps)
    turns: list[Turn] = [line.recv() for line in lines]
    return Turn(max(turn.seconds for turn in turns), sum(turn.cpu_seconds for turn in turns), turns[0].loss)


def measure(names: list[str], shape: Shape, rounds: int, steps: int, ranks: int) -> dict[str, list[Turn]]:
    """The turns of each loop in processes started afresh, in an order that changes from round to round."""
    loops: dict[str, list[Connection]] = {}
    for name in names:
        loops[name] = start(name, shape, ranks)
        ask(loops[name], 2)  # warm up, and start one after another
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            turns[name].append(ask(loops[name], steps))
    for line in (line for lines in loops.values() for line in lines):
        line.send(0)
    return turns


def utilisation(shape: Shape, tokens_per_second: float, ranks: int) -> str:
    """Model FLOPs utilisation, where the device's peak is known."""
    from megatron.bridge.platform import device_name
    from megatron.bridge.training.flops import step_flops
    from megatron.bridge.training.peaks import peak_tflops

    peak = peak_tflops(device_name(), shape.dtype)
    if peak is None:
        return "-"
    flops_per_token = (step_flops(_provider(shape), 1) or 0.0) / shape.length
    return f"{flops_per_token * tokens_per_second / ranks / (peak * 1e12):.1%}"


def ratios(starts: list[dict[str, list[Turn]]], name: str, kind: str) -> list[float]:
    """What the first loop took to what another took in the same turn: the median of each start."""
    first = next(iter(starts[0]))
    pairs = [zip(start[first], start[name], strict=True) for start in starts]
    return [statistics.median(getattr(mine, kind) / getattr(other, kind) for mine, other in each) for each in pairs]


def table(starts: list[dict[str, list[Turn]]], tokens: int, mfu: Callable[[float], str]) -> str:
    """Medians over the turns of `tokens` tokens each, and of the starts' ratios, with their range."""
    first = next(iter(starts[0]))
    headline = f"{f'time of {first}':>24}"
    lines = [f"{'loop':16}{'tokens/s':>10}{headline}{'tokens/CPU s':>15}{headline}{'MFU':>8}{'last loss':>11}"]
    for name in starts[0]:
        turns, cells = [turn for start in starts for turn in start[name]], ""
        for kind, width in (("seconds", 10), ("cpu_seconds", 15)):
            speed = statistics.median(tokens / getattr(turn, kind) for turn in turns)
            found = ratios(starts, name, kind)
            spread = f" {min(found):.2f}-{max(found):.2f}" if len(found) > 1 else ""
            cells += f"{speed:{width}.0f}{f'{statistics.median(found):.3f} x{spread}':>24}"
        speed = statistics.median(tokens / turn.seconds for turn in turns)
        lines.append(f"{name:16}{cells}{mfu(speed):>8}{turns[-1].loss:11.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loop (default: 7)")
    parser.add_argument("--starts", type=int, default=1, help="times that all loops are started afresh (default: 1)")
    parser.add_argument("--steps", type=int, default=2, help="training steps in a turn (default: 2)")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the model's (default: small)")
    for size in ("batch", "length", "layers"):
        parser.add_argument(f"--{size}", type=int, help=f"another {size} than the shape's")
    parser.add_argument("--bf16", action="store_true", help="in bf16, not in fp32")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks of each loop (default: 1)")
    parser.add_argument("--only", nargs="+", choices=LOOPS, help="loops to run; the first is compared with the others")
    arguments = parser.parse_args()
    given = {size: value for size in ("batch", "length", "layers") if (value := getattr(arguments, size)) is not None}
    dtype = "bfloat16" if arguments.bf16 else "float32"
    shape = dataclasses.replace(SHAPES[arguments.shape], dtype=dtype, **given)
    names = arguments.only or list(LOOPS if arguments.ranks == 1 else ON_SEVERAL_RANKS)
    sizes = shape, arguments.rounds, arguments.steps, arguments.ranks
    starts = [measure(names, *sizes) for _ in range(arguments.starts)]
    print(f"{shape}, ranks: {arguments.ranks}, torch {torch.__version__}")
    print(f"medians of {arguments.starts} starts of {arguments.rounds} rounds of {arguments.steps} steps, in turn\n")
    mfu = partial(utilisation, shape, ranks=arguments.ranks)
    print(table(starts, arguments.steps * shape.tokens * arguments.ranks, mfu))


if __name__ == "__main__":
    main()
