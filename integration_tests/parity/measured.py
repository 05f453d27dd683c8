"""What one model's training differs by, at every layout that it has."""

from collections.abc import Mapping
from pathlib import Path

from parity.curves import Curve, Difference, at_layouts, in_plain_torch
from parity.layouts import ONE, Layout
from parity.models import Model
from parity.page import PLAIN


def measured(model: Model, folder: Path, layouts: Mapping[str, Layout]) -> dict[str, Difference | str]:
    """Layout -> the difference from one rank, or why it is refused; `PLAIN` is the plain loop over transformers.

    Args:
        model: to train.
        folder: to be made, for its weights.
        layouts: at which it trains; one rank is among them.
    """
    model.save(folder)
    curves = at_layouts(model, folder, layouts)
    one = curves.pop(ONE)
    assert isinstance(one, Curve), one
    # A curve that does not move would be the same everywhere.
    assert one.losses[-1] < one.losses[0] - 0.5, one.losses
    found = {name: each if isinstance(each, str) else Difference.between(each, one) for name, each in curves.items()}
    if not model.plain:
        return found
    return {PLAIN: Difference.between(one, in_plain_torch(model, folder)), **found}
