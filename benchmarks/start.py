"""From a configuration to the end of the first step, beside the bare imports that nobody can do without.

A tiny model, one process, each measured in processes of their own: `import torch, megatron.core` with what a loop needs
of Megatron-Core, and a run of one step on mock data. What lies between the two is ours.

    uv run python benchmarks/start.py
"""

import argparse
import statistics
import subprocess
import sys
import time

IMPORTS = """
import torch
import megatron.core
import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer
import megatron.core.pipeline_parallel
"""

FIRST_STEP = """
from megatron.bridge.models import GPTModelProvider
from megatron.bridge.training import config as c
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

if __name__ == "__main__":
    model = GPTModelProvider(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=256, seq_length=32
    )
    cfg = c.ConfigContainer(
        model=model,
        dataset=c.GPTDatasetConfig(mock=True, sequence_length=32),
        train=c.TrainingConfig(train_iters=1, global_batch_size=2),
        tokenizer=c.TokenizerConfig(vocab_size=256),
    )
    assert pretrain(cfg, forward_step).iteration == 1
"""


def seconds(code: str) -> tuple[float, float]:
    """Of a fresh process that runs `code`: on the clock, and of CPU."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    clock = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each (default: 3)")
    arguments = parser.parse_args()
    bare, first = [], []
    for _ in range(arguments.rounds):
        bare.append(seconds(IMPORTS))
        first.append(seconds(FIRST_STEP))
    print(f"{'median of ' + str(arguments.rounds):28}{'seconds':>10}{'CPU s':>10}")
    medians = {}
    for name, measured in {"bare imports": bare, "to the end of the first step": first}.items():
        medians[name] = [statistics.median(column) for column in zip(*measured, strict=True)]
        print(f"{name:28}{medians[name][0]:10.2f}{medians[name][1]:10.2f}")
    ours = [step - imports for imports, step in zip(*medians.values(), strict=True)]
    print(f"{'difference':28}{ours[0]:10.2f}{ours[1]:10.2f}")


if __name__ == "__main__":
    main()
