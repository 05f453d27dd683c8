"""A conversation, whatever format its row had, and what is wrong with one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.errors import BridgeError

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)


class BadRow(BridgeError):
    """A row cannot be used; `skip_bad_rows` tolerates some."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        extra: what else a chat template may look at, e.g. `tool_calls`, `name`, or Alpaca's `instruction` and `input`.
        trained: whether an answer is one to learn from; only the assistant's are.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True

    def as_dict(self) -> dict[str, Any]:
        """As chat templates expect a message."""
        return {**self.extra, "role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and the tools (JSON schemas) that the assistant may call."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None

    def answers(self) -> list[int]:
        """Where the assistant speaks."""
        return [place for place, message in enumerate(self.messages) if message.role == ASSISTANT]


def check(conversation: Conversation) -> None:
    """Refuse what no template can mean well.

    Raises:
        BadRow: no answer, an unknown role, turns out of order or empty.
    """
    for problem in _problems(conversation.messages):
        raise BadRow(problem)


def _problems(messages: Sequence[Message]) -> Iterator[str]:
    unknown = [message.role for message in messages if message.role not in ROLES]
    if unknown:
        yield f"a message has the role {unknown[0]!r}; known are {', '.join(ROLES)}"
    turns = [message for message in messages if message.role != SYSTEM]
    if not turns:
        yield "the conversation has no messages" if not messages else "the conversation has a system prompt only"
    if len(messages) - len(turns) > (messages[0].role == SYSTEM):
        yield "a system message stands behind the beginning; only the first message may be one"
    if turns[0].role != USER:
        yield f"the conversation starts with the {turns[0].role}; remove what stands before the first user message"
    yield from _order(turns)
    if turns[-1].role != ASSISTANT:
        yield f"the conversation ends with a {turns[-1].role} message that nobody answers; remove it"
    if not any(message.role == ASSISTANT and message.trained for message in turns):
        yield "no answer of the conversation is to be trained: all have weight 0"


def _order(turns: Sequence[Message]) -> Iterator[str]:
    before = None
    for message in turns:
        if message.role == before and before in (USER, ASSISTANT):
            yield f"two {before} messages follow each other; join them, or remove one"
        if message.role == TOOL and before not in (ASSISTANT, TOOL):
            yield f"a tool message follows a {before} message; a tool answers the assistant"
        if message.role in (USER, ASSISTANT) and not message.content.strip() and not message.extra.get("tool_calls"):
            yield f"a message of the {message.role} is empty"
        before = message.role
