"""What is wrong with the modules of a MIMO model, apart from where they stand. Nothing is built for it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.bridge.errors import did_you_mean
from megatron.bridge.mimo.adapters import encoder_adapter_problems
from megatron.bridge.mimo.module_settings import PROJECTOR, settings_problems
from megatron.bridge.mimo.projector import projector_of

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig

    from megatron.bridge.mimo.provider import MimoProvider


def module_problems(provider: "MimoProvider") -> Iterator[str]:
    """What is wrong with encoders, language model and their settings, each with its remedy."""
    yield from _encoder_problems(provider)
    yield from _layout_problems(provider)
    yield from _language_problems(provider)
    yield from optimizer_problems(provider)
    yield from encoder_adapter_problems(provider)


def optimizer_problems(provider: "MimoProvider", settings: "OptimizerConfig | None" = None) -> Iterator[str]:
    """What is wrong with the optimizer's settings by module.

    Args:
        provider: the model's.
        settings: of the run; None where they are not known.
    """
    known = [*_encoders_and_projectors(provider), provider.placement.llm_module_name]
    yield from settings_problems(provider.optimizers, known, settings)


def adapter_problems(provider: "MimoProvider", *, adapted: bool) -> Iterator[str]:
    """What is wrong with what is trained beside adapters.

    Args:
        provider: the model's.
        adapted: a PEFT method is applied.
    """
    known = _encoders_and_projectors(provider)
    for name in provider.trained_beside_adapters:
        if name not in known:
            what = f"no such encoder{did_you_mean(name, known)}; there are {', '.join(known)}"
            yield f"model.trained_beside_adapters: {name!r}: {what}"
    alone = [name for name in provider.trained_beside_adapters if name.removesuffix(PROJECTOR) not in provider.adapters]
    if alone and not adapted:
        yield (
            f"model.trained_beside_adapters={alone} is set, and peft is not; set peft, or freeze modules "
            "(Encoder.frozen)"
        )
    if provider.frozen_language and adapted:
        yield "model.frozen_language=True: peft adapts the language model; leave one of the two out"


def _encoders_and_projectors(provider: "MimoProvider") -> list[str]:
    return [each for name in provider.encoders for each in (name, name + PROJECTOR)]


def _encoder_problems(provider: "MimoProvider") -> Iterator[str]:
    hidden = provider.language.hidden_size
    for name, encoder in provider.encoders.items():
        ranks = provider.placement.module_parallelisms[name].tensor_parallel
        yield from (f"{name!r}: {problem}" for problem in encoder.problems(ranks))
        if not encoder.projects:
            problems = projector_of(encoder.projector).problems(encoder.features_per_item)
            yield from (f"{name!r}: {problem}" for problem in problems)
        elif encoder.width != hidden:
            yield (
                f"{name!r}: its features have width {encoder.width}, the language model has hidden_size={hidden}, and "
                "the encoder's own projector ends before; take the projector that was made for this language model"
            )
    if len(provider.deciding) > 1:
        yield f"{' and '.join(provider.deciding)} each decide the positions of tokens; keep one of them"


def _layout_problems(provider: "MimoProvider") -> Iterator[str]:
    for name, layout in provider.placement.module_parallelisms.items():
        if name in provider.encoders and provider.placement.mode == "heterogeneous" and layout.pipeline_parallel != 1:
            yield (
                f"{name!r}: pipeline_parallel={layout.pipeline_parallel}: an encoder's layers are not divided; set "
                "pipeline_parallel=1"
            )


def _language_problems(provider: "MimoProvider") -> Iterator[str]:
    language = provider.language
    if language.fp16:
        yield "fp16=True: modules would each have a loss scale of their own; use bf16"
    if language.mtp_num_layers:
        yield f"mtp_num_layers={language.mtp_num_layers}: they predict from tokens alone; set it to None"
    if language.virtual_pipeline_model_parallel_size is not None:
        yield "virtual_pipeline_model_parallel_size: modules are not interleaved; set it to None"
