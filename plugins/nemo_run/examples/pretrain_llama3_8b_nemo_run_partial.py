"""Llama 3 8B by NeMo-Run's `run.Partial`: python pretrain_llama3_8b_nemo_run_partial.py --nproc-per-node=2

What the task is given is written down by NeMo-Run, so it is named and not built: a recipe, and overrides of it.
"""

import argparse

import nemo_run as run
from nemo_run_bridge.tasks import partial


def main() -> None:
    """Start the ranks on this machine, or say what would be started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--recipe", default="llama3_8b_pretrain_config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()

    task = partial(options.recipe, ["train.train_iters=10", *options.overrides])
    executor = run.LocalExecutor(ntasks_per_node=options.nproc_per_node, launcher="torchrun")
    run.run(task, executor, name=options.recipe, dryrun=options.dry_run)


if __name__ == "__main__":
    main()
