"""Weight tables of multi-token prediction (arXiv:2412.19437), made from a decoder's own."""

import dataclasses
from collections.abc import Collection, Iterator

from megatron.bridge.conversion.shards import COLUMN
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.conversion.transforms import Repeated

_LAYER = "decoder.layers.{l}"
_HF_LAYER = "model.layers.{l}"
_DENSE_MLP = f"{_LAYER}.mlp.linear_fc"
# Hugging Face weights of a prediction layer that repeat one of the model -> that one in Megatron-Core.
REPEATS = {
    "embed_tokens.weight": "embedding.word_embeddings.weight",
    "shared_head.head.weight": "output_layer.weight",
}


def hf_layer(number: int) -> str:
    """The Hugging Face name of a prediction layer, which are counted on behind the decoder's."""
    return _HF_LAYER.replace("{l}", str(number))


def with_prediction_layers(table: WeightTable, first: int, repeating: Collection[str]) -> WeightTable:
    """A table with rules for prediction layers, which hold what the decoder's mixtures of experts hold.

    Args:
        table: of the model without them, in the Llama layout.
        first: the Hugging Face number of the first prediction layer.
        repeating: weights of prediction layers that the files repeat, by their Hugging Face names.
    """
    by_weight: dict[str, list[str]] = {}
    held = {rule.megatron for rule in table.rules}
    for name in repeating:
        weight = next(own for hf, own in REPEATS.items() if name.endswith(hf))
        # Without an output layer of its own, the model's is the embedding.
        by_weight.setdefault(weight if weight in held else "embedding.word_embeddings.weight", []).append(name)
    rules = [_repeated(rule, by_weight.get(rule.megatron, [])) for rule in table.rules]
    return dataclasses.replace(table, rules=(*rules, *_prediction_rules(table, first)))


def _repeated(rule: WeightRule, names: list[str]) -> WeightRule:
    if not names:
        return rule
    return dataclasses.replace(rule, hf=(*rule.hf_names, *names), transform=Repeated(1 + len(names), rule.transform))


def _prediction_rules(table: WeightTable, first: int) -> Iterator[WeightRule]:
    own, hf = "mtp.layers.{l}", _HF_LAYER.replace("{l}", f"{{l+{first}}}")
    for part in ("enorm", "hnorm"):
        yield WeightRule(f"{own}.{part}.weight", f"{hf}.{part}.weight")
    yield WeightRule(f"{own}.eh_proj.weight", f"{hf}.eh_proj.weight", shard=COLUMN)
    for rule in table.rules:
        if rule.megatron.startswith(_LAYER) and not rule.megatron.startswith(_DENSE_MLP):
            yield dataclasses.replace(
                rule,
                megatron=rule.megatron.replace(_LAYER, f"{own}.transformer_layer"),
                hf=tuple(name.replace(_HF_LAYER, hf) for name in rule.hf_names),
            )
    yield WeightRule(f"{own}.final_layernorm.weight", f"{hf}.shared_head.norm.weight")
