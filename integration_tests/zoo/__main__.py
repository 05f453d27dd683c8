"""`just zoo [NAME...]`: prove architectures and bring the record up to date.

Each architecture is recorded as soon as it is proven, so a run that was stopped goes on with `just zoo --missing`.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.capabilities import RECORD, Capability, Record, read_record
from megatron.bridge.testing import import_engine
from megatron.bridge.testing.layouts import ALL_LAYOUTS
from zoo.exhibits import chosen, exhibits
from zoo.page import page
from zoo.proofs import is_current, prove

PAGE = Path(__file__).parents[2] / "docs/capabilities.md"


def main() -> int:
    """Prove what the command line names; 1 when something could not be proven at all."""
    parser = argparse.ArgumentParser(prog="just zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures, by how they start; all without any")
    parser.add_argument("--missing", action="store_true", help="only what the record does not hold as tried today")
    options = parser.parse_args()
    try:
        return _run(tuple(options.names), missing=options.missing)
    except BridgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(names: tuple[str, ...], *, missing: bool) -> int:
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    import_engine()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    # That a proof is missing is why we are here.
    logging.getLogger("megatron.bridge.models.capabilities").setLevel(logging.ERROR)
    everything = exhibits()
    held = dict(read_record().architectures) if RECORD.exists() else {}
    held = {name: each for name, each in held.items() if name in everything}
    failed = 0
    for name in chosen(names, everything):
        if missing and name in held and is_current(held[name], everything[name]):
            continue
        begin = time.monotonic()
        print(name, flush=True)
        held[name] = prove(everything[name], lambda line: print(f"  {line}", flush=True))
        failed += not held[name].layouts
        write(held)
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    write(held)
    return int(failed > 0)


def write(held: dict[str, Capability]) -> None:
    """Put record and page in their places, whole."""
    record = Record(ALL_LAYOUTS, {name: held[name] for name in sorted(held)})
    for path, text in ((RECORD, record.to_text()), (PAGE, page(record))):
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)


if __name__ == "__main__":
    sys.exit(main())
