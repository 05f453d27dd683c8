"""Settings of the optimizer for single modules of a MIMO model, where these differ from the run's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import did_you_mean

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge.mimo.encoder_module import EncoderModule

# What follows an encoder's name where its projector alone is meant.
PROJECTOR = ".projector"


@dataclass(kw_only=True)
class ModuleOptimizerConfig:
    """What is the run's, where it is None.

    Attributes:
        lr: learning rate after the warm-up. Its way there and back has the shape of the run's.
        min_lr: learning rate at the end of its decay.
        weight_decay: the same in all steps.
    """

    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float | None = None

    def problems(self, key: str, settings: "OptimizerConfig") -> Iterator[str]:
        """What is wrong, each with its remedy.

        Args:
            key: of the module.
            settings: of the run.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        yield from (f"{key!r}: {name}={value} must not be negative" for name, value in given.items() if value < 0)
        least = settings.min_lr or 0.0
        lr, low = self.lr if self.lr is not None else settings.lr, self.min_lr if self.min_lr is not None else least
        if lr is not None and lr < low:
            yield f"{key!r}: lr={lr} is below min_lr={low}, which {_origin(self.min_lr)}; set a lower min_lr for it"


def _origin(own: float | None) -> str:
    return "is the run's" if own is None else "is its own"


def settings_problems(
    by_module: Mapping[str, ModuleOptimizerConfig], modules: Iterable[str], settings: "OptimizerConfig | None"
) -> Iterator[str]:
    """What is wrong with the settings of all modules.

    Args:
        by_module: a module's name, or an encoder's with `.projector` behind it -> what differs there.
        modules: what there is of such names.
        settings: of the run; None where it is not known yet.
    """
    known = list(modules)
    for key, own in by_module.items():
        if key not in known:
            yield f"optimizers[{key!r}]: no such module{did_you_mean(key, known)}; there are {', '.join(known)}"
        elif settings is not None:
            yield from (f"optimizers: {problem}" for problem in own.problems(key, settings))


def overrides_for(own: ModuleOptimizerConfig) -> dict[str, float]:
    """Megatron-Core's override of a group of parameters."""
    rates = {"max_lr": own.lr, "min_lr": own.min_lr}
    decay = {"start_wd": own.weight_decay, "end_wd": own.weight_decay}
    return {name: value for name, value in {**rates, **decay}.items() if value is not None}


def module_overrides(
    name: str, by_module: Mapping[str, ModuleOptimizerConfig], module: "EncoderModule | None"
) -> dict[Any, dict[str, float]]:
    """Megatron-Core's `config_overrides` for one module: what differs in it, and in its projector.

    Args:
        name: of the module.
        by_module: see `settings_problems`.
        module: of an encoder, without what wraps it; None for the language model.
    """
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    def key(what: str, projector: bool | None) -> Any:
        def meant(parameter: Any, full: str) -> bool:
            return projector is None or module is None or module.is_projector(_bare(full)) == projector

        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=what, fn=meant))

    whole, part = by_module.get(name), by_module.get(name + PROJECTOR)
    found = {} if whole is None else {key(name, None if part is None else False): overrides_for(whole)}
    if part is not None:
        merged = ModuleOptimizerConfig(
            **{
                field: value if value is not None else getattr(whole, field, None)
                for field, value in vars(part).items()
            }
        )
        found[key(name + PROJECTOR, True)] = overrides_for(merged)
    return found


def _bare(name: str) -> str:
    """A parameter's name without what Megatron-Core's wrappers put before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
