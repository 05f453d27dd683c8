"""Multi-token prediction: which architectures' cases of its own tests hold."""

from collections.abc import Callable, Collection
from pathlib import Path

from megatron.bridge.errors import BridgeError
from megatron.bridge.testing import run_ranks
from megatron.bridge.testing.layouts import EVERYWHERE, layout_fields, ranks_of
from zoo.exhibits import FAMILY_TESTS, Exhibit, module_at

TESTS = FAMILY_TESTS / "test_prediction_layers.py"
TOLERANCE = 1e-4
SECONDS = 60  # for one case at one layout


def proven_predictions(names: Collection[str], root: Path, told: Callable[[str], None]) -> set[str]:
    """The architectures among `names` all of whose cases hold at every layout of `EVERYWHERE`.

    Transformers' logits of every prediction layer, and all weights bit for bit after the way through Megatron and back.

    Args:
        names: of architectures.
        root: an empty folder for the models.
        told: called with a line about each layout.
    """
    tests = module_at(TESTS)
    of_case = {name: Exhibit(name, config).architecture for name, config in tests.CONFIGS.items()}
    cases = {name: tests.case(tests.CONFIGS[name], root / name) for name, owner in of_case.items() if owner in names}
    failed: set[str] = set()
    for layout in EVERYWHERE if cases else ():
        fields = layout_fields(layout)
        try:
            found = run_ranks(ranks_of(fields), tests.compare, cases, fields, timeout=SECONDS * len(cases))
        except BridgeError as error:
            told(f"multi-token prediction at {layout}: {error}")
            return set()
        worst = {name: max(each[name] for each in found) for name in cases}
        failed |= {of_case[name] for name, difference in worst.items() if not difference < TOLERANCE}
        told(f"multi-token prediction at {layout}: {len(cases)} cases, logits within {max(worst.values()):.1e}")
    return {of_case[name] for name in cases} - failed
