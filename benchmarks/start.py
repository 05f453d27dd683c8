"""From a configuration to the end of the first step, beside the bare imports that nobody can do without.

A tiny model in a fresh process: first `import torch, megatron.core` with what a loop needs of Megatron-Core, and from
there a run of one step on mock data, with all that is imported for it. The second part is ours.

    uv run python benchmarks/start.py
"""

import argparse
import itertools
import statistics
import subprocess
import sys

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes (default: 3)")
    arguments = parser.parse_args()
    rounds = [run() for _ in range(arguments.rounds)]
    print(f"{'median of ' + str(arguments.rounds):36}{'seconds':>10}{'CPU s':>10}")
    for part, name in enumerate(("bare imports", "from there to the end of the first step")):
        clock, cpu = (statistics.median(each[part][kind] for each in rounds) for kind in (0, 1))
        print(f"{name:36}{clock:10.2f}{cpu:10.2f}")


if __name__ == "__main__":
    main()
