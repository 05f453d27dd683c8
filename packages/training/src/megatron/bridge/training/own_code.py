"""Code of a user's own, named on a command line as `module:name`. Torch-free."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback


def own(name: str, option: str) -> Any:
    """What `module:name` means; modules of the working folder are found, too.

    Args:
        name: e.g. `my_losses:forward_step`.
        option: where it was given, for messages.

    Raises:
        BridgeError: there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BridgeError(f"{option} {name!r} cannot be imported: {error}; write it as module:name") from error


def own_callback(name: str) -> "Callback":
    """The callback that `module:name` means: an object, or a class that is made without arguments.

    Raises:
        BridgeError: it is none.
    """
    from megatron.bridge.training.callbacks import Callback

    found = own(name, "--callback")
    try:
        made = found() if isinstance(found, type) else found
    except TypeError as error:
        raise BridgeError(f"--callback {name!r} cannot be made without arguments: {error}; name an object") from error
    if not isinstance(made, Callback):
        raise BridgeError(f"--callback {name!r} is {made!r}, and no megatron.bridge.training.callbacks.Callback")
    return made
