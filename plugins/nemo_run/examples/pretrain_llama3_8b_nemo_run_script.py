"""Llama 3 8B by NeMo-Run's `run.Script`: python pretrain_llama3_8b_nemo_run_script.py --nproc-per-node=2 [overrides]

What is no option here is handed on to the command, as an override of the recipe: train.train_iters=10.
"""

import argparse

import nemo_run as run
from nemo_run_bridge.tasks import script


def main() -> None:
    """Start the ranks on this machine, or say what would be started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--recipe", default="llama3_8b_pretrain_config")
    parser.add_argument("--dry-run", action="store_true")
    options, overrides = parser.parse_known_args()

    task = script(["train", "--recipe", options.recipe, *overrides])
    executor = run.LocalExecutor(ntasks_per_node=options.nproc_per_node, launcher="torchrun")
    run.run(task, executor, name=options.recipe, dryrun=options.dry_run)


if __name__ == "__main__":
    main()
