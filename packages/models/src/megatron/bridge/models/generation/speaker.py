"""A model with its tokenizer: text in, text out, token by token."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.generation.choice import Choice
from megatron.bridge.models.generation.generate import generate


@dataclass(frozen=True)
class Speaker:
    """A model that answers.

    Attributes:
        chunks: of this rank.
        tokenizer: transformers'.
        stops: tokens that end an answer.
    """

    chunks: list[Any]
    tokenizer: Any
    stops: frozenset[int]

    @classmethod
    def opened(
        cls, model: str, adapter: str | None = None, *, trust_remote_code: bool = False, **layout: Any
    ) -> "Speaker":
        """Build a model with its weights. Collective.

        Args:
            model: a Hugging Face folder, a hub id or a Megatron checkpoint.
            adapter: a folder that Hugging Face peft wrote.
            trust_remote_code: run the code that the model ships.
            layout: provider fields.

        Raises:
            BridgeError: no such model, or one that has no tokenizer beside it.
        """
        from megatron.bridge.conversion.auto_bridge import AutoBridge
        from megatron.bridge.conversion.inspection import is_megatron

        if is_megatron(model):
            bridge = AutoBridge.from_megatron_checkpoint(model, trust_remote_code=trust_remote_code)
            chunks = bridge.load_megatron_model(model, **layout)
        else:
            bridge = AutoBridge.from_hf_pretrained(model, trust_remote_code=trust_remote_code)
            chunks = bridge.to_megatron_model(**layout)
        if adapter is not None:
            bridge.load_hf_adapter(chunks, adapter)
        if bridge.source is None:
            raise BridgeError(f"{model} has no tokenizer beside it; convert it to a Hugging Face folder, and add one")
        tokenizer = _tokenizer(bridge.source.folder, trust_remote_code=trust_remote_code)
        return cls(chunks, tokenizer, _stops(bridge.source.folder, tokenizer))

    def continuation(self, text: str, max_new_tokens: int, choice: Choice) -> Iterator[int]:
        """Yield the tokens that follow a text, without the stop. Collective."""
        return self._tokens(self.tokenizer(text)["input_ids"], max_new_tokens, choice)

    def answer(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int, choice: Choice) -> Iterator[int]:
        """Yield the tokens of the next turn of a conversation. Collective.

        Args:
            messages: turns with `role` and `content`; the last is the user's.
            max_new_tokens: longest answer.
            choice: how tokens are chosen.

        Raises:
            BridgeError: the tokenizer has no chat template.
        """
        self.refuse_without_template()
        written = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        return self._tokens(ids, max_new_tokens, choice)

    def refuse_without_template(self) -> None:
        """Raise where it is not known how a conversation is written."""
        if not self.tokenizer.chat_template:
            raise BridgeError(
                "the model's tokenizer has no chat template, so it is not known how a conversation is written; use "
                "`megatron-bridge generate` for plain text"
            )

    def _tokens(self, ids: Sequence[int], max_new_tokens: int, choice: Choice) -> Iterator[int]:
        import torch

        from megatron.bridge.platform import device

        prompt = torch.tensor([list(ids)], dtype=torch.long, device=device())
        settings: dict[str, Any] = {"stops": self.stops, "choice": choice, "vocab_size": len(self.tokenizer)}
        for token in generate(self.chunks, prompt, max_new_tokens, **settings):
            if int(token[0]) in self.stops:
                return
            yield int(token[0])


def _tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BridgeError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def _stops(folder: Path, tokenizer: Any) -> frozenset[int]:
    """What the generation configuration calls the ends of a text, and the tokenizer's own."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        found |= set(ends if isinstance(ends, list) else [ends])
    return frozenset(found - {None})
