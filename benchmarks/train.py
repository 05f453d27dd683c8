"""Training speed on this machine: three loops around one Llama, in turn, as tokens per second.

`uv run python benchmarks/train.py` compares, in fp32 and one process each,

- bridge: this project's provider, layer spec `torch` and training step (`megatron.bridge.training`);
- megatron: a bare loop on Megatron-Core's schedule, DDP and optimizer with its own layer spec `local`;
- transformers: `LlamaForCausalLM` with scaled-dot-product attention and `torch.optim.AdamW`.

Every loop clips gradients to norm 1 and sees the same tokens. Each has a process of its own, kept warm, and they take
turns, so that whatever else runs here slows all alike; the medians over the rounds are compared. On a busy machine the
tokens per second of CPU tell more than those on the clock; `OMP_NUM_THREADS=1` makes them sharper still.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """The Llama that is trained: 8 query heads to every 4 key heads (GQA), untied embeddings."""

    layers: int = 8
    hidden: int = 512
    ffn: int = 1408
    heads: int = 8
    key_heads: int = 4
    vocabulary: int = 2048
    length: int = 512
    batch: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length


type Step = Callable[[], float]
LEARNING_RATE = 3e-4


def batches(shape: Shape) -> Iterator[torch.Tensor]:
    """Rows of `length + 1` random tokens, the same for every loop."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, shape.vocabulary, (shape.batch, shape.length + 1), generator=generator)


def transformers_loop(shape: Shape) -> Step:
    """A plain loop around transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
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

    return step


def bridge_loop(shape: Shape) -> Step:
    """Our training loop's own step, on the tokens of the other loops."""
    from megatron.bridge import platform
    from megatron.bridge.models import GPTModelProvider
    from megatron.bridge.training import config as c
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.setup import setup
    from megatron.bridge.training.step import train_step

    platform.initialize_distributed()
    provider = GPTModelProvider(
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
        layer_spec="torch",
    )
    run = setup(
        c.ConfigContainer(
            model=provider,
            dataset=c.GPTDatasetConfig(mock=True, sequence_length=shape.length),
            tokenizer=c.TokenizerConfig(vocab_size=shape.vocabulary),
            train=c.TrainingConfig(train_iters=1000, global_batch_size=shape.batch, micro_batch_size=shape.batch),
            optimizer=c.OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, clip_grad=1.0),
        )
    )
    rows = batches(shape)
    positions = torch.arange(shape.length).expand(shape.batch, -1)
    mask = torch.ones(shape.batch, shape.length)

    def same_tokens() -> Iterator[dict[str, torch.Tensor]]:
        for row in rows:
            tokens, labels = row[:, :-1].contiguous(), row[:, 1:].contiguous()
            yield {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}

    run.train_data = [same_tokens()]
    return lambda: train_step(run, forward_step).loss


def megatron_loop(shape: Shape, spec: str) -> Step:
    """Megatron-Core's own schedule, DDP and optimizer around a GPT model of the named layer spec."""
    from megatron.bridge.platform import initialize_distributed

    initialize_distributed()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = _gpt_model(shape, spec)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, clip_grad=1.0), [wrapped])
    forward_backward = get_forward_backward_func()
    rows = batches(shape)
    positions = torch.arange(shape.length).expand(shape.batch, -1)

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

    return step


def _gpt_model(shape: Shape, spec: str) -> Any:
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
    )
    return GPTModel(
        config,
        LAYER_SPECS[spec](config, vp_stage=None),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


LOOPS: dict[str, Callable[[Shape], Step]] = {
    "bridge": bridge_loop,
    "megatron, our spec": lambda shape: megatron_loop(shape, "torch"),
    "megatron": lambda shape: megatron_loop(shape, "local"),
    "transformers": transformers_loop,
}


@dataclass(frozen=True)
class Turn:
    """What a loop did in one turn: seconds on the clock, seconds of CPU over all its threads, the last step's loss."""

    seconds: float
    cpu_seconds: float
    loss: float


def serve(name: str, shape: Shape, requests: Connection) -> None:
    """Run in a process of its own: answer each request for n steps with a `Turn`."""
    step = LOOPS[name](shape)
    while count := requests.recv():
        begin, cpu_begin = time.perf_counter(), time.process_time()
        losses = [step() for _ in range(count)]
        requests.send(Turn(time.perf_counter() - begin, time.process_time() - cpu_begin, losses[-1]))


def measure(names: list[str], shape: Shape, rounds: int, steps: int) -> dict[str, list[Turn]]:
    """The turns of each loop."""
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    for name in names:
        here, there = context.Pipe()
        context.Process(target=serve, args=(name, shape, there), daemon=True).start()
        there.close()
        lines[name] = here
        _ask(here, 2)  # warm up, and start one after another
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, line in lines.items():
            turns[name].append(_ask(line, steps))
    for line in lines.values():
        line.send(0)
    return turns


def _ask(line: Connection, steps: int) -> Turn:
    line.send(steps)
    turn: Turn = line.recv()
    return turn


def table(results: dict[str, list[Turn]], tokens: int) -> str:
    """Medians over the turns of `tokens` tokens each, and how many times as fast the first loop is as each."""
    clock = {name: statistics.median(tokens / turn.seconds for turn in turns) for name, turns in results.items()}
    cpu = {name: statistics.median(tokens / turn.cpu_seconds for turn in turns) for name, turns in results.items()}
    first = next(iter(results))
    lines = [f"{'loop':20}{'tokens/s':>10}{f'{first} is':>12}{'tokens/CPU s':>15}{f'{first} is':>12}{'last loss':>11}"]
    for name, turns in results.items():
        by_clock, by_cpu = (f"{speeds[first] / speeds[name]:.2f} x" for speeds in (clock, cpu))
        lines.append(f"{name:20}{clock[name]:10.0f}{by_clock:>12}{cpu[name]:15.0f}{by_cpu:>12}{turns[-1].loss:11.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loop (default: 7)")
    parser.add_argument("--steps", type=int, default=2, help="training steps in a turn (default: 2)")
    parser.add_argument("--batch", type=int, default=4, help="rows of 512 tokens in a step (default: 4)")
    parser.add_argument("--only", nargs="+", choices=LOOPS, default=list(LOOPS), help="loops to run")
    arguments = parser.parse_args()
    shape = Shape(batch=arguments.batch)
    results = measure(arguments.only, shape, arguments.rounds, arguments.steps)
    print(f"{shape}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"median of {arguments.rounds} rounds of {arguments.steps} steps, taken in turn\n")
    print(table(results, arguments.steps * shape.tokens))


if __name__ == "__main__":
    main()
