"""Imports Megatron-Core once, in the process that ranks will be forked from."""

import logging
import warnings


def import_engine() -> None:
    """Import the parts of Megatron-Core that every run uses (about 10 s), without its notices.

    It remarks on every optional GPU package that is absent, which `megatron-bridge doctor` reports with the remedy, and on
    every GPT model that another model class will follow one day.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import torch.distributed.checkpoint  # noqa: F401
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.distributed").setLevel(logging.ERROR)
