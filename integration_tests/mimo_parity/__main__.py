"""`just mimo-parity`: train at every placement beside transformers and write `docs/mimo-parity.md`."""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from megatron.bridge.testing import import_engine
from mimo_parity.cases import QUICK, WIDE
from mimo_parity.measured import measured
from mimo_parity.page import page

PAGE = Path(__file__).parents[2] / "docs/mimo-parity.md"
PACKAGES = ("torch", "megatron-core", "transformers")


def main() -> int:
    """Measure all placements and write the page."""
    import torch

    import_engine()
    torch.set_num_threads(1)
    cases = sorted((*QUICK, *WIDE), key=lambda case: ("homogeneous", "colocated", "heterogeneous").index(case.mode))
    with tempfile.TemporaryDirectory() as folder:
        results = measured(cases, Path(folder))
    for name, found in results.items():
        print(f"{name:64}{found}", flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    PAGE.write_text(page(results, versions), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
