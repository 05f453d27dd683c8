"""The zoo's inhabitants: the tiny configurations of the family tests, by architecture."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.testing.families import FamilyCase, family_case

FAMILY_TESTS = Path(__file__).parents[2] / "packages/models/tests"


@dataclass(frozen=True)
class Exhibit:
    """One tiny configuration.

    A test module offers `CONFIGS` (name -> configuration), and where a case takes more than a configuration (images,
    decoder inputs) `make_case(name, folder)` besides.
    """

    name: str
    config: Any
    module: ModuleType

    @property
    def architecture(self) -> str:
        """The class that transformers makes of the configuration, as `config.json` will name it."""
        from transformers.models.auto import modeling_auto

        kind = self.config.model_type
        stated = getattr(self.config, "architectures", None) or []
        for names in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        ):
            if stated or kind in names:
                return str((stated or [names[kind]])[0])
        raise BridgeError(f"{self.name}: transformers has no language model of the type {kind!r}")

    def case(self, root: Path) -> FamilyCase:
        """A random model of it below `root`, with transformers' answer."""
        made = getattr(self.module, "make_case", None)
        folder = root / self.name
        case: FamilyCase = made(self.name, folder) if made else family_case(self.config, folder, self.name)
        return case


def exhibits(folder: Path = FAMILY_TESTS) -> dict[str, list[Exhibit]]:
    """Every configuration of the family tests in a folder, by architecture."""
    found: dict[str, list[Exhibit]] = defaultdict(list)
    names: dict[str, Path] = {}
    for path in sorted(folder.glob("test_*families.py")):
        for exhibit in _of_module(path):
            if exhibit.name in names:
                raise BridgeError(f"{path} and {names[exhibit.name]} both have a case {exhibit.name!r}; rename one")
            names[exhibit.name] = path
            found[exhibit.architecture].append(exhibit)
    return dict(sorted(found.items()))


def _of_module(path: Path) -> Iterator[Exhibit]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BridgeError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    configs: Mapping[str, Any] = getattr(module, "CONFIGS", {})
    for name, config in configs.items():
        yield Exhibit(name, config, module)


def chosen(names: tuple[str, ...], architectures: dict[str, list[Exhibit]]) -> list[str]:
    """The architectures that start with one of `names` (case does not matter); all of them without any.

    Raises:
        BridgeError: a name that none starts with.
    """
    if not names:
        return list(architectures)
    for name in names:
        if not any(each.casefold().startswith(name.casefold()) for each in architectures):
            raise BridgeError(f"the zoo has no {name!r}{did_you_mean(name, architectures)}")
    wanted = tuple(name.casefold() for name in names)
    return [each for each in architectures if each.casefold().startswith(wanted)]
