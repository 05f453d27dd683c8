"""Parameters that are whole on every rank.

With `overlap_param_gather` the distributed optimizer's update reaches a rank's parameters with the next forward pass,
layer by layer; until then most of them are those of the step before.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole_parameters(model: list[Any]) -> Iterator[None]:
    """Within the block every chunk has the parameters of the last update. Collective; cheap without overlap."""
    lazy = [chunk for chunk in model if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False)]
    for chunk in lazy:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in lazy:
        chunk.enable_forward_pre_hook()
