"""Imports what every run uses, once, in the process that ranks will be forked from; and quietens the engine."""

import importlib
import logging
import os
import warnings

_MODULES = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "transformers.models.auto.modeling_auto",
)
# Loggers that remark on what cannot be changed from here: a model class that will have a successor, a layout that is
# computed a moment later.
_REMARKS = (
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "torch.utils.cpp_extension",
)


def import_engine(*modules: str) -> None:
    """Import the parts of Megatron-Core and transformers that every run uses (about 10 s), and `modules` besides.

    Megatron-Core remarks on every optional GPU package that is absent, which `megatron-bridge doctor` reports with the
    remedy; from here on those notices are left out in this process and in ranks that are forked from it.
    """
    # Counting GPUs by the driver's own library leaves CUDA untouched, so that this process can still be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in _REMARKS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (*_MODULES, *modules):
            importlib.import_module(module)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)(\.|$)")
