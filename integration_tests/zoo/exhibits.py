"""The zoo's inhabitants: the tiny configurations of the family tests, by architecture."""

import dataclasses
import importlib.util
import json
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron.bridge.errors import BridgeError, did_you_mean
from megatron.bridge.registry import Registry
from megatron.bridge.testing.families import FamilyCase, family_case

FAMILY_TESTS = Path(__file__).parents[2] / "packages/models/tests"


@dataclass(frozen=True)
class Exhibit:
    """One tiny configuration, which a module of family tests offers in its `CONFIGS`."""

    name: str
    config: Any
    # What config.json says where models are published under a name of their own for another's class.
    published_as: str | None = None

    @property
    def architecture(self) -> str:
        """The class that transformers makes of the configuration, as `config.json` will name it."""
        from transformers.models.auto import modeling_auto

        if self.published_as is not None:
            return self.published_as
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
        case = family_case(self.config, root / self.name, self.name)
        if self.published_as is not None:
            file = case.folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [self.published_as]}))
        return case


def exhibits(folder: Path = FAMILY_TESTS) -> dict[str, list[Exhibit]]:
    """Every configuration of the family tests in a folder, by architecture."""
    found: dict[str, list[Exhibit]] = defaultdict(list)
    names: set[str] = set()
    for path in sorted(folder.glob("test_*families.py")):
        area = path.stem.removeprefix("test_").removesuffix("_families")
        for exhibit in _of_module(path):
            # Two areas may have a case of the same name: a model, and its language half.
            single = dataclasses.replace(exhibit, name=f"{exhibit.name}-{area}") if exhibit.name in names else exhibit
            names.add(single.name)
            found[single.architecture].append(single)
    for name, known in _other_names(found).items():
        first = found[known][0]
        found[name] = [Exhibit(f"{first.name}-as-{name}", first.config, published_as=name)]
    return dict(sorted(found.items()))


def _other_names(found: Container[str]) -> dict[str, str]:
    """Offered architecture that no case has -> one that the very same bridge serves and some case has."""
    offers = Registry[object]("megatron.bridge.model_bridges", object, "model bridge").offers()
    served = {offer.target: offer.name for offer in offers if offer.name in found}
    return {offer.name: served[offer.target] for offer in offers if offer.name not in found and offer.target in served}


def module_at(path: Path) -> ModuleType:
    """A module of tests, imported.

    Raises:
        BridgeError: it cannot be.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BridgeError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_module(path: Path) -> Iterator[Exhibit]:
    configs: Mapping[str, Any] = getattr(module_at(path), "CONFIGS", {})
    for name, config in configs.items():
        yield Exhibit(name, config)


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
