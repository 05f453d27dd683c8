"""`MegatronMappingRegistry`: the established name of a family's weight table."""

from typing import TYPE_CHECKING

from megatron.bridge.conversion.table import Tied, WeightRule, WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class MegatronMappingRegistry:
    """All mappings of a family, one per kind of weight."""

    def __init__(self, *mappings: MegatronParamMapping) -> None:
        strangers = [mapping for mapping in mappings if not isinstance(mapping, MegatronParamMapping)]
        if strangers:
            raise BridgeError(
                f"MegatronMappingRegistry takes mappings of megatron.bridge.models.conversion.param_mapping, not "
                f"{strangers[0]!r}; pass a list as MegatronMappingRegistry(*mappings)"
            )
        self.mappings = mappings

    def table(self, provider: "GPTModelProvider") -> WeightTable:
        """The weight table of the model that `provider` builds.

        Raises:
            BridgeError: a mapping cannot be expressed, or two of them disagree about a Megatron weight.
        """
        # The same weight may be listed under the names that different layer specs give it.
        rules = list(dict.fromkeys(mapping.rule(provider) for mapping in self.mappings))
        if not provider.share_embeddings_and_output_weights:
            return WeightTable.of(rules)
        named = {rule.megatron: rule for rule in rules}
        tied = [Tied(_sole(named[_OUTPUT]), _sole(named[_EMBEDDING]))] if _OUTPUT in named else []
        return WeightTable.of([rule for rule in rules if rule.megatron != _OUTPUT], tied=tied)


def _sole(rule: WeightRule) -> str:
    return rule.hf_names[0]
