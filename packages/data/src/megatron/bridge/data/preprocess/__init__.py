"""Text to `.bin`/`.idx`, as Megatron-Core's datasets read it. Imports neither torch nor Megatron-Core."""

from megatron.bridge.data.preprocess.corpus import preprocess_corpus
from megatron.bridge.data.preprocess.progress import Progress

__all__ = ["Progress", "preprocess_corpus"]
