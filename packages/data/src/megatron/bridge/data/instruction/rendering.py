"""A conversation as text, with the exact place of each answer in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.bridge.data.instruction.messages import BadRow, Conversation, Message
from megatron.bridge.data.instruction.templates import PromptTemplate
from megatron.bridge.errors import BridgeError, did_you_mean

ASSISTANT_LOSS, LAST_TURN, COMPLETION, ALL = "assistant", "last_turn", "completion", "all"
LOSSES = (ASSISTANT_LOSS, LAST_TURN, COMPLETION, ALL)

type Span = tuple[int, int]


@dataclass(frozen=True)
class Rendering:
    """`spans`: the characters `[start, stop)` of `text` that are trained, ascending."""

    text: str
    spans: Sequence[Span]


def check_loss(loss: str) -> None:
    """Refuse an unknown part to train."""
    if loss not in LOSSES:
        raise BridgeError(f"dataset.loss={loss!r} is unknown{did_you_mean(loss, LOSSES)} (known: {', '.join(LOSSES)})")


class Renderer:
    """Writes conversations by one template.

    Args:
        template: how.
        tokenizer: a transformers tokenizer, asked for its special tokens.
        loss: what is trained: every answer (`assistant`), the `last_turn`'s, all from the first answer on
            (`completion`), or `all`.
    """

    def __init__(self, template: PromptTemplate, tokenizer: Any, loss: str) -> None:
        check_loss(loss)
        self.template, self.loss = template, loss
        self._tokenizer = tokenizer
        self._special = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True
        )

    def __call__(self, conversation: Conversation) -> Rendering:
        """The text and what of it is trained.

        Raises:
            BadRow: the template cannot write the conversation, or where its answers are cannot be proven.
        """
        self._check(conversation)
        wanted = self._wanted(conversation)
        text, found = self._marked(conversation) if self.template.marks_answers else self._proven(conversation, wanted)
        answers = {place: self._with_end(text, found[place]) for place in wanted}
        if self.loss == ALL:
            return Rendering(text, [(0, len(text))])
        if self.loss == COMPLETION:
            return Rendering(text, [(answers[wanted[0]][0], len(text.rstrip()))])
        return Rendering(text, [answers[place] for place in wanted])

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant would answer `messages`.

        Raises:
            BadRow: the template cannot write them.
        """
        conversation = Conversation(messages)
        self._check(conversation)
        return self._render(conversation, len(messages), prompt=True)[0]

    def _wanted(self, conversation: Conversation) -> list[int]:
        trained = [place for place in conversation.answers() if conversation.messages[place].trained]
        if self.loss == LAST_TURN:
            trained = [place for place in trained if place == len(conversation.messages) - 1]
        if not trained:
            raise BadRow("the last answer has weight 0, and it alone would be trained (dataset.loss='last_turn')")
        return trained

    def _check(self, conversation: Conversation) -> None:
        template = self.template
        for message in conversation.messages:
            if message.role not in template.roles or (message.extra.get("tool_calls") and not template.tools):
                what = message.role if message.role not in template.roles else "tool call"
                raise BadRow(f"the template {template.name!r} has no place for a {what} message; {_OTHERS}")
            token = None if template.control_tokens else self._control.search(message.content)
            if token:
                raise BadRow(
                    f"a {message.role} message contains {token[0]!r}, a special token of the tokenizer, which would "
                    "take effect; remove it from the text"
                )
        if conversation.tools and not template.tools:
            raise BadRow(f"the template {template.name!r} has no place for tools; {_OTHERS}")

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special)) or r"(?!)")

    def _marked(self, conversation: Conversation) -> tuple[str, dict[int, Span]]:
        text, spans = self._render(conversation, len(conversation.messages), marked=True)
        places = conversation.answers()
        if len(spans) != len(places):
            raise BadRow(
                f"the template {self.template.name!r} marks {len(spans)} answers, and the conversation has "
                f"{len(places)}; every answer needs one {{% generation %}} block"
            )
        return text, dict(zip(places, spans, strict=True))

    def _proven(self, conversation: Conversation, wanted: Sequence[int]) -> tuple[str, dict[int, Span]]:
        """Answers of a template without marks: what each adds to the prompt before it, in the whole text unchanged."""
        whole, _ = self._render(conversation, len(conversation.messages))
        spans = {}
        for place in wanted:
            before, _ = self._render(conversation, place, prompt=True)
            after, _ = self._render(conversation, place + 1)
            if not (after.startswith(before) and whole.startswith(after) and len(after) > len(before)):
                raise BadRow(
                    f"the template {self.template.name!r} does not mark its answers, and writes the turns up to answer "
                    f"{place} otherwise when more follow, so that the loss mask cannot be proven; put "
                    "{% generation %} and {% endgeneration %} around the answers, or set dataset.loss='last_turn'"
                )
            spans[place] = len(before), len(after)
        return whole, spans

    def _render(
        self, conversation: Conversation, count: int, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        """The first `count` messages."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [message.as_dict() for message in conversation.messages[:count]]
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=None if conversation.tools is None else [dict(tool) for tool in conversation.tools],
                chat_template=self.template.jinja,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                begin=self._begin,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow(f"the template {self.template.name!r} refuses the conversation: {error}") from error
        return texts[0], [(start, stop) for start, stop in spans[0]] if marked else []

    @cached_property
    def _variables(self) -> dict[str, str]:
        return {"bos_token": "", "eos_token": "", **self._tokenizer.special_tokens_map}

    @cached_property
    def _begin(self) -> str:
        first = self._tokenizer("")["input_ids"][:1]
        has = first and first[0] == self._tokenizer.bos_token_id
        return self._tokenizer.bos_token if has else ""

    def _with_end(self, text: str, span: Span) -> Span:
        """The answer up to its end-of-turn token; white space behind that is never generated and not trained."""
        start, stop = span
        kept = text[start:stop].rstrip()
        if kept.endswith(tuple(self._special)):
            return start, start + len(kept)
        follows = self._control.match(text, stop)
        if follows is None:
            raise BadRow(
                f"the template {self.template.name!r} writes no end-of-turn token behind an answer, so that a model "
                "would never learn to stop; let it write eos_token there"
            )
        return start, follows.end()


_OTHERS = "choose dataset.prompt_template='chat_template' with a tokenizer whose own template has one, or 'custom'"
