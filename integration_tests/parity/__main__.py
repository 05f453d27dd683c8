"""`just parity [MODEL...]`: train at every layout, and models of every kind one step, and write `docs/parity.md`."""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from megatron.bridge.testing import import_engine
from parity.kinds import KINDS, one_step
from parity.measured import measured
from parity.models import MODELS
from parity.page import page

PAGE = Path(__file__).parents[2] / "docs/parity.md"
PACKAGES = ("torch", "megatron-core", "transformers")


def main(names: list[str]) -> int:
    """Measure the models named, or all, and write the page when it is of all."""
    import torch

    import_engine()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or MODELS:
            results[name] = measured(MODELS[name], Path(folder) / name, MODELS[name].layouts)
            for layout, found in results[name].items():
                print(f"{name:28}{layout:42}{found}", flush=True)
        if names:
            return 0
        steps = one_step(KINDS, Path(folder) / "kinds")
        for name, found in steps.items():
            print(f"{name:28}{found}", flush=True)
        versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        PAGE.write_text(page(results, steps, versions), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
