"""MIMO experiments under torchrun, by their documented path: `megatron-bridge mimo run`, with the digits as its model.

python -m torch.distributed.run --nproc_per_node=2 experiment_runner.py --config FILE.yaml | --experiments-dir FOLDER
"""

import sys

from megatron.bridge.cli.root import run

RECIPE = "megatron.bridge.recipes.mimo.digits:digits_vlm_config"

if __name__ == "__main__":
    sys.exit(run(["mimo", "run", "--recipe", RECIPE, *sys.argv[1:]]))
