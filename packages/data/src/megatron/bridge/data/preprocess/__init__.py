"""Text to `.bin`/`.idx`, as Megatron-Core's datasets read it. Imports neither torch nor Megatron-Core."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.data.preprocess.corpus import preprocess_corpus as preprocess_corpus

__all__ = ["preprocess_corpus"]


def __getattr__(name: str) -> Any:
    # The command line's help reads a module of this package, and must not wait for numpy.
    if name == "preprocess_corpus":
        from megatron.bridge.data.preprocess.corpus import preprocess_corpus

        return preprocess_corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
