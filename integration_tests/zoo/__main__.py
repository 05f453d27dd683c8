"""`just zoo [NAME...]`: prove architectures and bring the record up to date.

Every few architectures are recorded as soon as they are proven: a run that was stopped goes on with `just zoo
--missing`, and two runs may share the work.
"""

import argparse
import fcntl
import logging
import sys
import time
from collections.abc import Container, Mapping
from itertools import batched
from pathlib import Path

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.capabilities import RECORD, Capability, Record, read_record
from megatron.bridge.testing import import_engine
from megatron.bridge.testing.layouts import ALL_LAYOUTS
from zoo.exhibits import chosen, exhibits
from zoo.page import page
from zoo.proofs import is_current, prove

GROUP = 8  # architectures that are proven at once; what an interrupted run loses
PAGE = Path(__file__).parents[2] / "docs/capabilities.md"


def main() -> int:
    """Prove what the command line names; 1 when something could not be proven at all."""
    parser = argparse.ArgumentParser(prog="just zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures, by how they start; all without any")
    parser.add_argument("--missing", action="store_true", help="only what the record does not hold as tried today")
    parser.add_argument("--quick", action="store_true", help="only the layouts at which every architecture must hold")
    options = parser.parse_args()
    try:
        return _run(tuple(options.names), missing=options.missing, quick=options.quick)
    except BridgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(names: tuple[str, ...], *, missing: bool, quick: bool) -> int:
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    import_engine()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    # That a proof is missing is why we are here.
    logging.getLogger("megatron.bridge.models.capabilities").setLevel(logging.ERROR)
    everything = exhibits()
    held = update({}, everything)
    wanted = [
        name
        for name in chosen(names, everything)
        if not (missing and name in held and is_current(held[name], everything[name], quick=quick))
    ]
    failed = 0
    for group in batched(wanted, GROUP):
        begin = time.monotonic()
        print(" ".join(group), flush=True)
        members = {name: everything[name] for name in group}
        proven = prove(members, lambda line: print(f"  {line}", flush=True), quick=quick)
        failed += sum(not each.layouts for each in proven.values())
        update(proven, everything)
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    return int(failed > 0)


def update(new: Mapping[str, Capability], inhabitants: Container[str]) -> dict[str, Capability]:
    """Put record and page in their places, with `new` and without who has left; several runs may do so at once."""
    with (RECORD.parent / "capabilities.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = dict(read_record().architectures) if RECORD.exists() else {}
        held = {name: each for name, each in {**held, **new}.items() if name in inhabitants}
        record = Record(ALL_LAYOUTS, {name: held[name] for name in sorted(held)})
        for path, text in ((RECORD, record.to_text()), (PAGE, page(record))):
            partial = path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    return held


if __name__ == "__main__":
    sys.exit(main())
