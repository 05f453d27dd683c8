"""What starting costs: commands that load little, and a run up to the end of its first step.

A run is a tiny model in a fresh process: first `import torch, megatron.core` with what a loop needs of Megatron-Core,
which nobody can do without, and from there one step on mock data, with all that is imported for it. The second part is
ours. Commands stand beside an interpreter that does nothing; `doctor` imports torch and Megatron-Core to look at them.

    uv run python benchmarks/start.py
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time

COMMANDS = ("", "--help", "plugins", "models", "recipes ls", "doctor")

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


MARK = """
import time
print("at", time.perf_counter(), time.process_time())
"""


def run() -> list[tuple[float, float]]:
    """Seconds on the clock and of CPU in a fresh process: for the imports, and from there to the end of the step."""
    code = "".join((MARK, IMPORTS, MARK, FIRST_STEP, MARK))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    marks = [list(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("at ")]
    return [(end[0] - begin[0], end[1] - begin[1]) for begin, end in itertools.pairwise(marks)]


def command(words: str) -> tuple[float, float]:
    """Seconds on the clock and of CPU of `megatron-bridge` with these words; of the bare interpreter without any."""
    code = "import sys; from megatron.bridge.cli.root import main; main()" if words else "pass"
    begin, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code, *words.split()], check=True, capture_output=True)
    clock, after = time.perf_counter() - begin, os.times()
    return clock, sum(after[2:4]) - sum(before[2:4])  # of children: user and system


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes (default: 3)")
    arguments = parser.parse_args()
    rounds = [run() for _ in range(arguments.rounds)]
    print(f"{'median of ' + str(arguments.rounds):42}{'seconds':>10}{'CPU s':>10}")
    for words in COMMANDS:
        taken = [command(words) for _ in range(arguments.rounds)]
        clock, cpu = (statistics.median(each[kind] for each in taken) for kind in (0, 1))
        print(f"{'megatron-bridge ' + words if words else 'python -c pass':42}{clock:10.2f}{cpu:10.2f}")
    for part, name in enumerate(("bare imports", "from there to the end of the first step")):
        clock, cpu = (statistics.median(each[part][kind] for each in rounds) for kind in (0, 1))
        print(f"{name:42}{clock:10.2f}{cpu:10.2f}")


if __name__ == "__main__":
    main()
