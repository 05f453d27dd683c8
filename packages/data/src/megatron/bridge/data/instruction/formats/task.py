"""What alpaca and dolly share: a task, the material it is about, and an answer."""

from collections.abc import Sequence

from megatron.bridge.data.instruction.fields import Row
from megatron.bridge.data.instruction.messages import ASSISTANT, SYSTEM, USER, BadRow, Conversation, Message


def task(
    *, instruction: str, about: str, answer: str, system: str = "", history: Sequence[tuple[str, str]] = ()
) -> Conversation:
    """The conversation of one task; templates that show the material apart find it in `input`."""
    messages = [Message(SYSTEM, system)] if system else []
    for earlier, answered in history:
        messages += [Message(USER, earlier), Message(ASSISTANT, answered)]
    if about.strip():
        asked = Message(USER, f"{instruction}\n\n{about}", {"instruction": instruction, "input": about})
    else:
        asked = Message(USER, instruction)
    return Conversation([*messages, asked, Message(ASSISTANT, answer)])


def history_of(row: Row) -> list[tuple[str, str]]:
    """Pairs of question and answer in `history`.

    Raises:
        BadRow: it holds anything else.
    """
    pairs = row.get("history") or []
    if not all(isinstance(pair, Sequence) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise BadRow("the field 'history' must hold pairs of texts: [[question, answer], ...]")
    return [(question, answer) for question, answer in pairs]
