"""The names of a new plugin, all of which follow from one."""

import importlib.util
import keyword
import re
import sys
from dataclasses import dataclass

from megatron.bridge.errors import BridgeError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# Longer ones would not fit into the lines of the templates.
_LONGEST = 24


@dataclass(frozen=True)
class Names:
    """A plugin's names.

    Attributes:
        name: of the distribution: `acme-norms`.
    """

    name: str

    @property
    def module(self) -> str:
        """For imports: `acme_norms`."""
        return self.name.replace("-", "_")

    @property
    def class_name(self) -> str:
        """For classes: `AcmeNorms`."""
        return "".join(part.capitalize() for part in self.name.split("-"))

    @property
    def fields(self) -> dict[str, str]:
        """What templates may ask for."""
        return {"name": self.name, "module": self.module, "Class": self.class_name}


def names_of(given: str) -> Names:
    """The names of a plugin called `given`.

    Raises:
        BridgeError: it cannot be a distribution's, or an import under it means something already.
    """
    name = given.lower().replace("_", "-")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise BridgeError(
            f"{given!r} cannot be a plugin's name; write up to {_LONGEST} letters and digits that begin with a letter, "
            "parted by hyphens: acme-norms"
        )
    names = Names(name)
    if keyword.iskeyword(names.module) or names.module in sys.stdlib_module_names:
        raise BridgeError(f"{given!r} is Python's own: `import {names.module}`; choose another name")
    if importlib.util.find_spec(names.module) is not None:
        raise BridgeError(
            f"`import {names.module}` finds an installed package already; choose another name than {given!r}"
        )
    return names
