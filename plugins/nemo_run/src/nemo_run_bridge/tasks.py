"""What NeMo-Run runs: the command line as a `run.Script`, and training by a recipe as a `run.Partial`."""

import shlex
from collections.abc import Sequence
from typing import Any

from nemo_run_bridge.spelled import spelled


def script(words: Sequence[str]) -> Any:
    """`python -m megatron.bridge.cli WORDS` as a `run.Script`.

    Args:
        words: what follows `megatron-bridge` on a command line: `["train", "--recipe", ...]`.
    """
    import nemo_run

    if any(shlex.quote(word) != word for word in words):
        return nemo_run.Script(path="nemo_run_bridge.spelled", args=[spelled(words)], entrypoint="python", m=True)
    return nemo_run.Script(path="megatron.bridge.cli", args=list(words), entrypoint="python", m=True)


def partial(recipe: str, overrides: Sequence[str] = (), **more: Any) -> Any:
    """`train` as a `run.Partial`.

    Args:
        recipe: name of the group `megatron.bridge.recipes`.
        overrides: `section.field=value`.
        more: further arguments of `train`.
    """
    import nemo_run

    return nemo_run.Partial(train, recipe=recipe, overrides=list(overrides), **more)


def train(
    recipe: str,
    overrides: list[str],
    config: str | None = None,
    run_folder: str | None = None,
    resume: bool = False,
) -> None:
    """Train as one rank, as `megatron-bridge train` does. All that it is given can be written down.

    Args:
        recipe, config, overrides: what to train by, see `megatron-bridge train --help`.
        run_folder: folder for all that the run writes.
        resume: go on with the run in it; begin it where there is none.

    Raises:
        BridgeError: what cannot run.
    """
    from megatron.bridge.training.cli import TrainCommand

    TrainCommand(recipe=recipe, config=config, overrides=tuple(overrides), run_folder=run_folder, resume=resume)()
