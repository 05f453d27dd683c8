"""Trains a small byte-level BPE tokenizer and writes it as a complete Hugging Face folder."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError

_BYTES = 256


def train_bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    *,
    bos_token: str = "<|begin_of_text|>",
    eos_token: str = "<|end_of_text|>",
    pad_token: str = "<|pad|>",
    show_progress: bool = False,
) -> Path:
    """Train on `texts` and write `folder`, which `AutoTokenizer.from_pretrained` loads.

    Every text comes back exactly: `decode(encode(text)) == text`. Encoding adds no special token; ids 0, 1 and 2 are
    `bos_token`, `eos_token` and `pad_token`. The same texts give the same folder.

    Returns:
        The folder.

    Raises:
        BridgeError: the folder exists, the vocabulary is too small for 256 bytes and the special tokens, or the texts
            do not yield as many tokens.
    """
    target = Path(folder)
    special = [bos_token, eos_token, pad_token]
    if len(set(special)) < len(special):
        raise BridgeError(f"bos_token, eos_token and pad_token must differ from each other, not be {special}")
    if target.exists():
        raise BridgeError(f"the tokenizer folder {str(target)!r} exists; remove it or choose another")
    smallest = _BYTES + len(special)
    if vocab_size < smallest:
        raise BridgeError(
            f"vocab_size={vocab_size} is too small: {_BYTES} bytes and {len(special)} special tokens need {smallest}"
        )
    tokenizer = _train(texts, vocab_size, special, show_progress)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise BridgeError(
            f"the texts yield only {found} of the vocab_size={vocab_size} tokens; give more text, or ask for {found}"
        )
    _write(tokenizer, target, dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True)))
    return target


def _train(texts: Iterable[str], vocab_size: int, special: list[str], show_progress: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write(tokenizer: Any, target: Path, special: dict[str, str]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tokenizer.save(str(staging / "tokenizer.json"))
        (staging / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        staging.chmod(0o755)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
