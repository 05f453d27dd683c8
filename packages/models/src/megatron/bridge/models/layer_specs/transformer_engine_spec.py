"""The layer spec `transformer_engine`: NVIDIA's fused modules, for CUDA."""

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.layer_specs.decoder_block import stock_block
from megatron.bridge.platform import device


def build(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Transformer Engine's modules; see `LayerSpecBuilder`.

    Raises:
        BridgeError: Transformer Engine does not import, or there is no CUDA device.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        raise BridgeError(
            f"the layer spec 'transformer_engine' needs Transformer Engine, which does not import here ({error}); "
            "install it with `uv pip install 'megatron-bridge-models[te]'`, or use layer_spec='torch'"
        ) from error
    if device().type != "cuda":
        raise BridgeError(
            "the layer spec 'transformer_engine' needs a CUDA device, and there is none; use layer_spec='torch'"
        )
    return stock_block(config, vp_stage, engine=True)
