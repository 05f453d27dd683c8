"""Classification and reward heads: every decoder family that is offered, with such a head in place of its vocabulary.

A headed model is found by its architecture's name too: transformers' own lists of models say which architecture has the
decoder of which, and only a decoder that is itself offered by name gets a head.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.model_bridge import MODEL_BRIDGES, MegatronModelBridge
from megatron.bridge.conversion.table import WeightRule, WeightTable
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SUFFIXES = ("ForSequenceClassification", "ForTokenClassification")
# Architectures that are more than a decoder; transformers lists some of them among the causal language models. Others
# are listed there by the decoder that they have; that one is of a kind of its own too, called `KIND_text`.
_OF_PARTS = "ForConditionalGeneration"
# Families whose token classifiers are older than transformers' shared one; their head has a bias in any case.
_WITH_CLASSIFIER = ("Bloom", "BioGpt", "Falcon", "GPT2", "GPTBigCode", "GPTNeo", "GPTNeoX", "Mpt")
_OUTPUT = "output_layer."
# Kinds of models whose head for sequences bears that name too.
_SEQUENCE_CLASSIFIER = ("ctrl",)
# What belongs to the vocabulary's logits: a head on the last hidden state takes no part in it.
_OF_THE_VOCABULARY: dict[str, Any] = {
    "share_embeddings_and_output_weights": False,
    "output_bias": False,
    "logits_multiplier": 1.0,
    "logits_softcap": None,
    "mtp_num_layers": None,
}


@dataclass(frozen=True)
class Head:
    """A head and the architecture whose decoder it sits on.

    Args:
        decoder: architecture of the causal language model with the same decoder.
        weight: Hugging Face name of the head's module.
        per_token: every token has its labels (token classification); otherwise the sequence has.
        always_bias: whatever the configuration says, the head has a bias.
    """

    decoder: str
    weight: str
    per_token: bool
    always_bias: bool = False

    def has_bias(self, config: "PretrainedConfig") -> bool:
        """Whether the head has a bias."""
        return self.per_token and (self.always_bias or bool(getattr(config, "token_classification_bias", True)))

    def dropout(self, config: "PretrainedConfig") -> float:
        """Dropout before the head."""
        stated = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        return next((float(value) for value in stated if value is not None), 0.1) if self.per_token else 0.0


def head_of(architecture: str) -> Head | None:
    """The head of an architecture whose decoder is offered, or None."""
    if not architecture.endswith(_SUFFIXES):
        return None
    head = _known_heads().get(architecture)
    return head if head is not None and head.decoder in MODEL_BRIDGES else None


def headed_architectures() -> list[str]:
    """Architecture names that are one of the offered decoders with a head, sorted."""
    return sorted(name for name, head in _known_heads().items() if head.decoder in MODEL_BRIDGES)


def head_on(decoder: str, *, per_token: bool) -> str:
    """The architecture that has a decoder's weights under a head.

    Args:
        decoder: the architecture of the causal language model.
        per_token: a head with labels for every token; otherwise for the sequence.

    Raises:
        BridgeError: transformers has no such model, so that nothing could load what came of it.
    """
    for name, head in _known_heads().items():
        if (head.decoder, head.per_token) == (decoder, per_token):
            return name
    kind = "token" if per_token else "sequence"
    others = sorted({name for name, head in _known_heads().items() if head.decoder == decoder})
    raise BridgeError(f"transformers has no {kind} classification head on {decoder} (it has: {others or 'none'})")


@functools.cache
def _known_heads() -> dict[str, Head]:
    """Every headed decoder that transformers knows."""
    from transformers.models.auto import modeling_auto as auto

    decoders = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = {}
    for per_token, names in (
        (False, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (True, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ):
        for kind, architecture in names.items():
            own = per_token and architecture.removesuffix("ForTokenClassification") in _WITH_CLASSIFIER
            of_parts = f"{kind}_text" in decoders or decoders.get(kind, "").endswith(_OF_PARTS)
            if kind in decoders and not of_parts:
                weight = "classifier" if own or kind in _SEQUENCE_CLASSIFIER else "score"
                found[architecture] = Head(decoders[kind], weight, per_token, always_bias=own)
    return found


class HeadedBridge(MegatronModelBridge):
    """A family's decoder with a classification or reward head as its output layer.

    Args:
        hf_config: of the headed model.
        head: from `head_of`.
    """

    def __init__(self, hf_config: "PretrainedConfig", head: Head) -> None:
        super().__init__(hf_config)
        if hf_config.get_text_config() is not hf_config:
            raise BridgeError(
                f"{type(hf_config).__name__} describes more than a decoder; classification heads are supported on text "
                f"decoders such as {head.decoder} alone"
            )
        self.head = head
        # Whether the bridge's own folder is the causal language model's, which has no such head.
        self.is_new = False
        self.family = MODEL_BRIDGES[head.decoder](hf_config)
        # Whatever the configuration says, no prediction layers come with such a head.
        self.family.weight_names = frozenset
        shared = {key: value for key, value in self.family.shared_fields.items() if key not in _OF_THE_VOCABULARY}
        self.shared_fields = {**shared, "num_labels": "num_labels"}  # type: ignore[misc]

    def provider_bridge(self) -> Any:
        provider = self.family.provider_bridge()
        fields = {field.name for field in dataclasses.fields(provider)}
        if "num_labels" not in fields:
            raise BridgeError(f"{type(provider).__name__} builds no classification heads, which {self.head} needs")
        return provider.replace(
            **{field: value for field, value in _OF_THE_VOCABULARY.items() if field in fields},
            num_labels=self.hf_config.num_labels,
            head_bias=self.head.has_bias(self.hf_config),
            head_dropout=self.head.dropout(self.hf_config),
            pad_token_id=getattr(self.hf_config, "pad_token_id", None),
        )

    def moe_layers(self) -> Sequence[bool] | None:
        return self.family.moe_layers()

    def mapping_registry(self) -> WeightTable:
        decoder = self._decoder_table()
        head = (WeightRule(name, f"{self.head.weight}.{name.partition('.')[2]}") for name in self.head_weights())
        return WeightTable((*decoder.rules, *head), (), decoder.ignored)

    def head_weights(self) -> tuple[str, ...]:
        """The head's weights by their Megatron names."""
        bias = ("output_layer.bias",) if self.head.has_bias(self.hf_config) else ()
        return ("output_layer.weight", *bias)

    def headless_table(self) -> WeightTable:
        """The decoder's weights in a folder of the causal language model, whose output layer is left aside."""
        decoder, family = self._decoder_table(), self.family.mapping_registry()
        outputs = [name for rule in family.rules if rule.megatron.startswith(_OUTPUT) for name in rule.hf_names]
        return dataclasses.replace(decoder, ignored=(*decoder.ignored, *outputs, *(tie.name for tie in family.tied)))

    def _decoder_table(self) -> WeightTable:
        table = self.family.mapping_registry()
        rules = tuple(rule for rule in table.rules if not rule.megatron.startswith((_OUTPUT, "mtp.")))
        # Decoders tie nothing but their vocabulary's output layer.
        return WeightTable(rules, (), table.ignored)
