"""From what a person names (a recipe, a Hugging Face folder) to the question that the planner answers."""

from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.training.planner.hardware import Cluster
from megatron.bridge.training.planner.hf_reading import read_config, shape_of_hf
from megatron.bridge.training.planner.plan import Question
from megatron.bridge.training.planner.precision import bytes_of
from megatron.bridge.training.planner.shape import ModelShape, shape_of

# Tokens of a step where nobody says how many: what Llama 2 was trained with (arXiv:2307.09288, section 2.2).
TOKENS_PER_STEP = 1 << 22
_EIGHT_BITS = ("fp8", "mxfp8")


def question(
    cluster: Cluster,
    *,
    recipe: str | None = None,
    hf: str | None = None,
    seq_length: int | None = None,
    global_batch: int | None = None,
    eight_bit: bool = False,
) -> Question:
    """The question about one of the two.

    Args:
        cluster: where it is to run.
        recipe: name of a recipe.
        hf: a Hugging Face folder or hub id.
        seq_length, global_batch: instead of the recipe's own, or of the model's.
        eight_bit: plan for products in FP8.

    Raises:
        BridgeError: neither or both are named, or the model cannot be planned.
    """
    if (recipe is None) == (hf is None):
        raise BridgeError("name one of --recipe and --hf")
    shape, settings = _of_recipe(recipe) if recipe is not None else (shape_of_hf(read_config(hf or "")), {})
    length = seq_length or settings.get("model.seq_length") or min(8192, shape.max_position_embeddings or 8192)
    shape = shape.replace(seq_length=length)
    if settings.get("peft") is not None:
        raise BridgeError(f"{recipe} trains an adapter, which is not planned for; plan the recipe of all weights")
    return Question(
        shape=shape,
        cluster=cluster,
        global_batch=global_batch or _batch(shape, settings.get("train.global_batch_size"), cluster),
        size=bytes_of(
            str(settings.get("model.params_dtype", "bfloat16")),
            gradients_in_fp32=settings.get("ddp.grad_reduce_in_fp32", True),
            distributed=settings.get("ddp.use_distributed_optimizer", True),
        ),
        eight_bit=eight_bit or settings.get("mixed_precision.precision") in _EIGHT_BITS,
    )


def _batch(shape: ModelShape, stated: int | None, cluster: Cluster) -> int:
    """The recipe's batch where it has a sequence for every device; else about `TOKENS_PER_STEP`, divided by all."""
    if stated is not None and stated >= cluster.count:
        return stated
    return max(1, round(TOKENS_PER_STEP / shape.seq_length / cluster.count)) * cluster.count


def _of_recipe(name: str) -> tuple[ModelShape, dict[str, Any]]:
    """Sizes and settings; a recipe that can say them without torch is asked so."""
    from megatron.bridge.training.recipe_registry import RECIPES

    recipe = RECIPES[name]
    if hasattr(recipe, "describe"):
        described = recipe.describe()
        settings = {key: each.value for key, each in described.settings.items()}
        if described.settings["train.global_batch_size"].source.startswith("ours"):
            # Nobody published one, and what suits a try on one machine does not suit a cluster.
            del settings["train.global_batch_size"]
        return shape_of_hf(described.hf_config), settings
    from megatron.bridge.platform.engine import import_engine

    import_engine()
    cfg = recipe()
    return shape_of(cfg.model), {
        "model.seq_length": cfg.model.seq_length,
        "model.params_dtype": str(cfg.model.params_dtype).removeprefix("torch."),
        "train.global_batch_size": cfg.train.global_batch_size,
        "ddp.grad_reduce_in_fp32": cfg.ddp.grad_reduce_in_fp32,
        "ddp.use_distributed_optimizer": cfg.ddp.use_distributed_optimizer,
        "mixed_precision.precision": cfg.mixed_precision.precision,
        "peft": cfg.peft,
    }
