"""`just mimo-experiments`: run `recipes/ablations/digits`, and put its report and its pictures into `docs/mimo.md`."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from megatron.bridge.cli.root import run

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs/mimo.md"
# What stands before and after the report.
BEGIN, END = "Measured by `just mimo-experiments`:\n", "![Samples per second of every placement"
PICTURES = ("throughput", "timeline")


def placed(page: str, report: str, load: float) -> str:
    """The page with another report between its marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    told = f"Two CPU cores, to which other work of the machine gave a load average of {load:.0f}.\n"
    return f"{head}{BEGIN}\n{report}\n{told}\n{END}{tail}"


def main() -> int:
    """Run the experiments and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--experiments-dir", str(REPOSITORY / "recipes/ablations/digits"), "--output", folder]
        code = run(["mimo", "run", *words, *sys.argv[1:]])
        if code == 0:
            report = (Path(folder) / "report.md").read_text("utf-8")
            PAGE.write_text(placed(PAGE.read_text("utf-8"), report, os.getloadavg()[1]), "utf-8")
            for name in PICTURES:
                shutil.copyfile(Path(folder) / f"{name}.svg", PAGE.with_name(f"mimo-{name}.svg"))
    return code


if __name__ == "__main__":
    sys.exit(main())
