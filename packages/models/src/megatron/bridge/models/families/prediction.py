"""Decoders with further layers that predict the tokens after the next (arXiv:2412.19437)."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.conversion.table import WeightTable
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.families.moe import MoEBridge
from megatron.bridge.models.prediction_fragments import REPEATS, hf_layer, with_prediction_layers

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.models.gpt_provider import GPTModelProvider


class PredictionBridge(MoEBridge):
    """A decoder that `num_nextn_predict_layers` prediction layers follow; to be named before other bridges.

    Configurations state these layers whether files hold them or not (transformers drops them when it saves), so the
    files decide where there are any.
    """

    def prediction_layers(self) -> int:
        """Prediction layers of the model.

        Raises:
            BridgeError: the files hold some of those that the configuration states.
        """
        stated = self._stated_layers()
        names = self.weight_names() if stated else None
        if names is None:
            return stated
        present = [layer for layer in self._hf_layers(stated) if f"{layer}.eh_proj.weight" in names]
        if len(present) not in (0, stated):
            raise BridgeError(
                f"config.json: num_nextn_predict_layers={stated}, but the files hold {present} only; fetch the others, "
                "or correct the number and remove those"
            )
        return len(present)

    def _stated_layers(self) -> int:
        return int(getattr(self.hf_config, "num_nextn_predict_layers", None) or 0)

    def _hf_layers(self, count: int) -> list[str]:
        return [hf_layer(self.hf_config.num_hidden_layers + number) for number in range(count)]

    def provider_bridge(self) -> "GPTModelProvider":
        return super().provider_bridge().replace(mtp_num_layers=self.prediction_layers() or None)

    def mapping_registry(self) -> WeightTable:
        table, count = super().mapping_registry(), self.prediction_layers()
        if count == 0:
            return table
        repeating = [f"{layer}.{weight}" for layer in self._hf_layers(count) for weight in REPEATS]
        names = self.weight_names()
        held = repeating if names is None else [name for name in repeating if name in names]
        return with_prediction_layers(table, self.hf_config.num_hidden_layers, held)

    def settled_changes(self) -> dict[str, Any]:
        return self._restated(self.prediction_layers())

    def further_changes(self, config: "TransformerConfig") -> dict[str, Any]:
        return self._restated(config.mtp_num_layers or 0)

    def _restated(self, count: int) -> dict[str, Any]:
        return {} if count == self._stated_layers() else {"num_nextn_predict_layers": count}
