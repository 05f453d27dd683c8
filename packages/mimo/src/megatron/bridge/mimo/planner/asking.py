"""From what a person names (folders, a recipe) to the question that the search answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.mimo.parallelism import DEPLOYMENT_MODES
from megatron.bridge.mimo.planner.encoder_shape import EncoderShape, encoder_of_folder, tower_shape
from megatron.bridge.mimo.planner.search import MimoQuestion
from megatron.bridge.training.planner.asking import question as language_question
from megatron.bridge.training.planner.hardware import Cluster
from megatron.bridge.training.planner.plan import Question
from megatron.bridge.training.planner.precision import bytes_of
from megatron.bridge.training.planner.shape import shape_of


def question(
    cluster: Cluster,
    *,
    language: str | None,
    encoders: Sequence[str],
    recipe: str | None,
    mode: str | None,
    items: float,
    frozen: Sequence[str],
    seq_length: int | None,
    global_batch: int | None,
) -> MimoQuestion:
    """The question about folders of the modules, or about a recipe.

    Args:
        cluster: where they are to run.
        language, encoders: Hugging Face folders or hub ids; of encoders `NAME=FOLDER`.
        recipe: a MIMO recipe instead.
        mode: the one to look at; None for all.
        items: of each modality in a sample.
        frozen: encoders that are not trained.
        seq_length, global_batch: instead of the model's or the recipe's own.

    Raises:
        BridgeError: neither or both are named, or something cannot be planned.
    """
    if (recipe is None) == (language is None):
        raise BridgeError("name the modules by --llm FOLDER and --encoder NAME=FOLDER, or by --recipe NAME")
    if recipe is not None:
        asked, towers = _of_recipe(recipe, cluster, items, seq_length, global_batch)
    else:
        asked = language_question(cluster, hf=language, seq_length=seq_length, global_batch=global_batch)
        towers = {
            name: encoder_of_folder(folder, asked.shape.hidden_size, items=items, frozen=False)
            for name, folder in map(_named, encoders)
        }
    if not towers:
        raise BridgeError("there is no encoder to place; give --encoder NAME=FOLDER, e.g. images=openai/clip-vit-large")
    if unknown := [name for name in frozen if name not in towers]:
        raise BridgeError(f"--frozen {unknown[0]}: the encoders are {', '.join(towers)}")
    towers = {name: dataclasses.replace(each, frozen=each.frozen or name in frozen) for name, each in towers.items()}
    _refuse_longer(asked, towers)
    return MimoQuestion(asked, towers, DEPLOYMENT_MODES if mode is None else (mode,))


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise BridgeError(f"--encoder {text!r} is not of the form NAME=FOLDER")
    return name, folder


def _refuse_longer(asked: Question, towers: Mapping[str, EncoderShape]) -> None:
    features = sum(each.items * each.features for each in towers.values())
    if features > asked.shape.seq_length:
        raise BridgeError(
            f"the features of a sample's items are {features:g} tokens, more than the {asked.shape.seq_length} of a "
            "sequence; raise --seq or lower --items"
        )


def _of_recipe(
    name: str, cluster: Cluster, items: float, seq_length: int | None, global_batch: int | None
) -> tuple[Question, dict[str, EncoderShape]]:
    from megatron.bridge.mimo.mimo_recipe import mimo_config
    from megatron.bridge.platform.engine import import_engine

    import_engine()
    cfg = mimo_config(name)
    shape = shape_of(cfg.model.language)
    dtype = str(cfg.model.params_dtype).removeprefix("torch.")
    asked = Question(
        shape=shape.replace(seq_length=seq_length or shape.seq_length),
        cluster=cluster,
        global_batch=global_batch or cfg.train.global_batch_size,
        size=bytes_of(dtype, distributed=cfg.ddp.use_distributed_optimizer),
    )
    towers = {
        modality: _of_encoder(modality, encoder, shape.hidden_size, items)
        for modality, encoder in cfg.model.encoders.items()
    }
    return asked, towers


def _of_encoder(name: str, encoder: Any, hidden_size: int, items: float) -> EncoderShape:
    values = getattr(encoder, "hf_config", None)
    if values is None:
        raise BridgeError(f"{name!r}: a {type(encoder).__name__} says nothing of its sizes; name it by --encoder")
    if encoder.projector != "mlp":
        raise BridgeError(
            f"{name!r}: the projector {encoder.projector!r} changes how many features there are, which is not planned "
            "for; plan it with 'mlp', or name the modules by --llm and --encoder"
        )
    tower, patch_weights = tower_shape(values, repr(name))
    return EncoderShape(
        tower=tower, patch_weights=patch_weights, hidden_size=hidden_size, items=items, frozen=encoder.frozen
    )
